"""Low-rank changes of matrices, composed of other ops: for torch and for a GPU. Knows no adapter and no device.

A change adds scale * B (A x) to rows of a product. All of it is float32; the sum with the product is rounded once. The
rows of one change are multiplied together, in whole tiles where the ops have tiles: a row's bits do not depend on the
others where the ops' products keep that. Source: Punica (Chen et al. 2023) for products grouped by adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .elementwise import gated
from .seam import Activation, Linear, LowRank, Ops, RowsOfChange


@dataclass(frozen=True, slots=True, eq=False)
class ComposedChange:
    """A change of one matrix as products: all A as one, each B for itself."""

    down: Linear  # [sum of ranks, in]
    scales: Tensor  # [sum of ranks] float32
    ups: tuple[tuple[slice, slice, Linear], ...]  # ranks, columns of the product, B

    @property
    def num_bytes(self) -> int:
        """Memory of its matrices, in bytes."""
        return self.down.num_bytes + sum(up.num_bytes for _, _, up in self.ups)


def pack_change(ops: Ops, parts: Sequence[LowRank]) -> ComposedChange:
    """`Ops.pack_change` by `Ops.pack`."""
    ranks = [len(part.a) for part in parts]
    scales = torch.cat([torch.full((rank,), part.scale) for rank, part in zip(ranks, parts, strict=True)])
    ups, done = [], 0
    for rank, part in zip(ranks, parts, strict=True):
        columns = slice(part.first_row, part.first_row + len(part.b))
        ups.append((slice(done, done + rank), columns, ops.pack(part.b.float(), exact=True)))
        done += rank
    down = ops.pack(torch.cat([part.a.float() for part in parts]), exact=True)
    return ComposedChange(down, scales.to(ops.device), tuple(ups))


def add_changes(ops: Ops, y: Tensor, x: Tensor, changes: Sequence[RowsOfChange]) -> None:
    """`Ops.add_changes` by `Ops.linear`."""
    for change, rows in changes:
        assert isinstance(change, ComposedChange)
        spare = -len(rows) % ops.row_multiple
        chosen = torch.cat((x[rows], x.new_zeros(spare, x.shape[1])))
        inner = ops.linear(chosen, change.down) * change.scales  # [rows, ranks] float32
        for ranks, columns, up in change.ups:
            delta = ops.linear(inner[:, ranks].contiguous(), up)[: len(rows)]
            y[rows, columns] = (y[rows, columns].float() + delta).to(y.dtype)


def gate(halves: Tensor, activation: Activation) -> Tensor:
    """`Ops.gate` for halves that lie one behind the other."""
    first, second = halves.float().chunk(2, dim=-1)
    return gated(first, second, activation).to(halves.dtype)
