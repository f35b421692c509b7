"""One rank's end of a group: sums and exchanges with the other ranks of a model through memory that they share.

The memory has no name in any file system: it is a file descriptor that the worker's process makes and its ranks
inherit, so it is gone with the last of their processes, however they end. `kernels/cpu/group.h` draws its layout.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...core.errors import RankLost, RanksDiffer
from ...kernels.cpu import library as native

CALL_TIMEOUT_S = 60.0  # longest wait for another rank within a step; a rank that lives but is stuck
SILENCE_S = 0.8  # a rank whose process is dead or stopped for so long is gone; one that is only starved, after 8 s
MESSAGE_BYTES = 1 << 16  # columns in which `gather_bytes` passes an array through the slots
_WHY_GONE = {
    native.DECLARED: "is gone",
    native.SILENT: "shows no sign of life",
    native.LEFT: "has left its group",
    native.LATE: "did not do its part in time",
}
_KINDS = {torch.float32: native.FLOAT32, torch.bfloat16: native.BFLOAT16}


def shared_region(size: int, slot_bytes: int) -> int:
    """File descriptor of zeroed memory for a group of `size` ranks; pages take memory when they are first written."""
    region = os.memfd_create("twostroke-group", os.MFD_CLOEXEC)
    os.ftruncate(region, native.load().group_bytes(size, slot_bytes))
    return region


class SharedMemoryGroup:
    """One rank of a group, for one thread at a time. Implements `Collectives`.

    All ranks make the same calls in the same order.
    Results have the same bits at every rank and in every run: sums are added in the order of ranks, in float32, and
    rounded once. For tensors of float32 or bfloat16 on the CPU.
    """

    def __init__(
        self,
        region: int,
        rank: int,
        size: int,
        slot_bytes: int,
        *,
        timeout_s: float = CALL_TIMEOUT_S,
        silence_s: float = SILENCE_S,
    ) -> None:
        """`region`: of `shared_region` with the same `size` and `slot_bytes`; it may be closed afterwards."""
        self.rank, self.size = rank, size
        self._library = native.load()
        self._slot_bytes = slot_bytes
        self._memory = mmap.mmap(region, self._library.group_bytes(size, slot_bytes), mmap.MAP_SHARED)
        self._view = (ctypes.c_char * len(self._memory)).from_buffer(self._memory)
        self._group = ctypes.c_void_p(
            self._library.join_group(
                ctypes.addressof(self._view), rank, size, slot_bytes, int(timeout_s * 1000), int(silence_s * 1000)
            )
        )
        self._closing = threading.Lock()

    @property
    def address(self) -> int:
        """The group as `native.Step.group` names it; valid until `close`."""
        assert self._group.value is not None, "the group is closed"
        return self._group.value

    def all_reduce(self, x: Tensor) -> Tensor:
        """Add all ranks' x, of any shape, in place; returns x. int32 too, for counts.

        Raises:
            RankLost, RanksDiffer: as `check`.
        """
        assert x.is_contiguous(), "sums are made in place"
        if x.dtype == torch.int32:
            counts = self.all_gather(x.view(1, -1), self.size * x.numel()).view(self.size, -1)
            return x.copy_(counts.sum(0, dtype=torch.int32).view(x.shape))
        self.check(self._library.all_reduce(self._group, None, x.data_ptr(), x.numel(), _KINDS[x.dtype]))
        return x

    def all_gather(self, x: Tensor, width: int) -> Tensor:
        """The columns of all ranks' x [rows, columns] side by side, in the order of ranks: the first `width` of them.

        Raises:
            RankLost, RanksDiffer: as `check`.
        """
        rows, columns = x.shape
        x = x.contiguous()
        out = torch.empty(rows, self.size * columns, dtype=x.dtype)
        row_bytes = columns * x.element_size()
        pieces = -(-row_bytes // self._slot_bytes)
        if pieces > 1:  # a row is wider than a slot
            wide = -(-columns // pieces)
            parts = [self.all_gather(part, self.size * part.shape[1]) for part in torch.split(x, wide, 1)]
            out = torch.cat([part.view(rows, self.size, -1) for part in parts], 2).view(rows, -1)
        else:
            self.check(self._library.all_gather(self._group, x.data_ptr(), rows, row_bytes, out.data_ptr()))
        return out if out.shape[1] == width else out[:, :width].contiguous()

    def gather_bytes(self, mine: NDArray[Any], to_rank: int = 0) -> list[NDArray[Any]] | None:
        """Every rank's array, of one dtype and shape, in the order of ranks, at rank `to_rank`; None at the others.

        Raises:
            RankLost, RanksDiffer: as `check`.
        """
        flat = np.ascontiguousarray(mine).reshape(-1).view(np.uint8)
        columns = max(1, min(MESSAGE_BYTES, self._slot_bytes))
        rows = -(-len(flat) // columns)
        padded = np.zeros(rows * columns, np.uint8)
        padded[: len(flat)] = flat
        out = np.empty((rows, self.size, columns), np.uint8) if self.rank == to_rank else None
        to = None if out is None else out.ctypes.data
        self.check(self._library.all_gather(self._group, padded.ctypes.data, rows, columns, to))
        if out is None:
            return None
        each = out.transpose(1, 0, 2).reshape(self.size, -1)[:, : len(flat)]
        return [np.ascontiguousarray(part).view(mine.dtype).reshape(mine.shape) for part in each]

    def agree(self, mine: int) -> Sequence[int]:
        """Every rank's number, 64 bits with a sign, in the order of ranks.

        Raises:
            RankLost, RanksDiffer: as `check`.
        """
        found = (ctypes.c_int64 * self.size)()
        self.check(self._library.agree(self._group, mine, found))
        return list(found)

    def check(self, failure: int) -> None:
        """Raise the error of a failed call.

        Raises:
            RankLost: a rank's process is dead, frozen or stuck; the group is of no use any more.
            RanksDiffer: another rank ended its step early; the next call works again.
        """
        if failure == native.GROUP_DIFFERS:
            raise RanksDiffer("the ranks of this model made different calls")
        if failure:
            why, rank = divmod(failure - 1, 256)
            raise RankLost(f"rank {rank} of {self.size} {_WHY_GONE[why]}")

    def fail(self, rank: int) -> None:
        """Declare a rank gone: calls that wait for it end with `RankLost`, at every rank. From any thread."""
        with self._closing:
            if self._group:
                self._library.fail_group(self._group, rank)

    def lost_rank(self) -> int | None:
        """The rank that is gone; None while all are there. From any thread."""
        with self._closing:
            failure = self._library.group_failure(self._group) if self._group else 0
        return (failure - 1) % 256 if failure else None

    def close(self) -> None:
        """Leave the group: another rank that waits for this one gets `RankLost`. Not during a call."""
        with self._closing:
            group, self._group = self._group, ctypes.c_void_p()
            if group:
                self._library.leave_group(group)

    def __del__(self) -> None:
        if hasattr(self, "_closing"):  # a thread of the group uses the memory
            self.close()
