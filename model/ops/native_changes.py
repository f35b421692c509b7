"""Low-rank changes of matrices as the CPU kernels read them (`kernels/cpu/low_rank.cpp`). Knows no adapter."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.cpu import library as native
from .seam import Change, LowRank, RowsOfChange


@dataclass(frozen=True, slots=True, eq=False)
class PackedChange:
    """A change of one matrix, and the memory that its parts point to."""

    parts: tuple[native.LowRank, ...]
    memory: tuple[Tensor, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of memory that it owns."""
        return sum(part.nbytes for part in self.memory)

    @classmethod
    def of(cls, parts: Sequence[LowRank], gate_width: int | None) -> PackedChange:
        """Pack parts, bfloat16 as such and others as float32. `gate_width`: as for `Ops.pack_change`."""
        packed: list[native.LowRank] = []
        memory: list[Tensor] = []
        for part in parts:
            kind, dtype = native.FLOAT32, torch.float32
            if part.a.dtype == part.b.dtype == torch.bfloat16:
                kind, dtype = native.BFLOAT16, torch.bfloat16
            down = part.a.to(dtype).contiguous()
            memory.append(down)
            for first, step, b in _columns(part, gate_width):
                up = _blocks(b.to(dtype))
                memory.append(up)
                rank, inner = down.shape
                pointers = (down.data_ptr(), up.data_ptr())
                packed.append(native.LowRank(*pointers, part.scale, kind, rank, inner, len(b), first, step))
        return cls(tuple(packed), tuple(memory))


def _blocks(b: Tensor) -> Tensor:
    """B [count, rank] by ranks, padded to blocks of 32 columns; bfloat16 as pairs of the columns i and i + 16."""
    up = torch.nn.functional.pad(b.t(), (0, -len(b) % (2 * native.LANES)))
    if up.dtype == torch.float32:
        return up.contiguous()
    return up.reshape(len(up), -1, 2, native.LANES).transpose(2, 3).contiguous()


def _columns(part: LowRank, gate_width: int | None) -> list[tuple[int, int, Tensor]]:
    """First column, step and rows of B of what a part changes. Gate and up alternate in panels of sixteen columns."""
    first, end = part.first_row, part.first_row + len(part.b)
    if gate_width is None:
        return [(first, native.LANES, part.b)]
    halves = ((0, part.b[: max(gate_width - first, 0)]), (native.LANES, part.b[max(gate_width - first, 0) :]))
    assert first in (0, gate_width), "a change begins with the gate or with up"
    assert end in (gate_width, 2 * gate_width), "a change ends with the gate or with up"
    return [(column, 2 * native.LANES, b) for column, b in halves if len(b)]


class ChangeTable:
    """Parts of the changes of many matrices, by place, in the form of one adapter of a `native.AdapterRows`."""

    def __init__(self, by_place: Mapping[int, Change], num_places: int) -> None:
        parts: list[native.LowRank] = []
        starts = array("i", (0,))
        for place in range(num_places):
            change = by_place.get(place)
            if change is not None:
                assert isinstance(change, PackedChange)
                parts += change.parts
            starts.append(len(parts))
        self._parts = (native.LowRank * len(parts))(*parts)
        self._starts = starts

    def of_rows(self, rows: Tensor) -> native.AdapterRows:
        """Describe the adapter of `rows` [n] int64. The result is valid while the table and `rows` live."""
        return native.AdapterRows(
            ctypes.addressof(self._parts), self._starts.buffer_info()[0], rows.data_ptr(), len(rows)
        )


def described(changes: Sequence[RowsOfChange]) -> tuple[ctypes.Array[native.AdapterRows], list[ChangeTable]]:
    """Changes of one matrix, at place 0, and the tables that they point to."""
    tables = [ChangeTable({0: change}, 1) for change, _ in changes]
    rows = [table.of_rows(rows) for table, (_, rows) in zip(tables, changes, strict=True)]
    return (native.AdapterRows * len(rows))(*rows), tables
