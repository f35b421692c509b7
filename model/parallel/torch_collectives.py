"""Collectives by torch.distributed: gloo between processes on CPUs, NCCL between GPUs. Knows no model.

torch's own all-reduce adds in an order that depends on an element's place in the message. Here all ranks gather all
partial results and add them by `ordered_sum`, so that the bits of a row do not depend on the other rows of a step.
A rank receives (size - 1) messages of full length, where a ring would receive 2 * (size - 1) / size: for two ranks
this is the same, for more it costs bandwidth in long steps.

Groups are made without torch's default group (`init_process_group`): a worker may have several. NCCL was not run: it
needs two GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...checkpoint.shards import Shard
from ...core.errors import RankLost
from .collectives import ordered_sum

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store


class TorchCollectives:
    """Implements `Collectives` by a backend of torch.distributed that supports all-gather."""

    def __init__(self, backend: Any) -> None:  # torch's stub of Backend lacks the collectives
        self._backend = backend
        self.rank: int = backend.rank()
        self.size: int = backend.size()

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum x over the ranks in place."""
        return ordered_sum(self._gathered(x), x)

    def all_gather(self, x: Tensor, width: int) -> Tensor:
        """Columns of all ranks, [rows, width]."""
        return torch.cat(list(self._gathered(x.contiguous())), dim=1)[:, :width].contiguous()

    def _gathered(self, x: Tensor) -> Tensor:
        """All ranks' x: [ranks, ...]. The messages are bytes, because gloo does not know every dtype."""
        assert x.is_contiguous()
        parts = torch.empty((self.size, *x.shape), dtype=x.dtype, device=x.device)
        if not x.numel():
            return parts
        with _ranks_may_be_lost():
            messages = [part.view(-1).view(torch.uint8) for part in parts]
            self._backend.allgather([messages], [x.view(-1).view(torch.uint8)]).wait()
        return parts


def join_gloo(store: Store, shard: Shard, timeout_s: float) -> TorchCollectives:
    """Join a group of processes on CPUs; returns when all ranks have joined.

    `store`: of torch.distributed, shared by the ranks of this group only (e.g. a `TCPStore` or `FileStore`).
    `timeout_s`: bound on joining and on every collective.

    Raises:
        RankLost: a rank did not join in time.
    """
    from torch.distributed import ProcessGroupGloo

    with _ranks_may_be_lost():
        return TorchCollectives(ProcessGroupGloo(store, shard.rank, shard.size, timedelta(seconds=timeout_s)))


def join_nccl(store: Store, shard: Shard, timeout_s: float) -> TorchCollectives:
    """Join a group of GPUs, one per rank, each the current device of its process. Arguments and errors: `join_gloo`."""
    from torch.distributed import ProcessGroupNCCL

    options = ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=timeout_s)
    with _ranks_may_be_lost():
        return TorchCollectives(ProcessGroupNCCL(store, shard.rank, shard.size, options))


@contextmanager
def _ranks_may_be_lost() -> Iterator[None]:
    """Turn torch's errors of a group, which are RuntimeErrors, into RankLost."""
    try:
        yield
    except RuntimeError as error:
        raise RankLost(f"a tensor-parallel rank is lost: {error}") from error
