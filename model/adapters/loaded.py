"""Adapters in memory, and the changes that they make to a step's rows. Knows no file, no slot, no request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...checkpoint.adapters.adapter import Adapter, AdapterPair, MatrixName, StoredTensor
from ...checkpoint.spec import ModelSpec
from ...core.errors import CheckpointError
from ..ops.seam import Change, LowRank, Ops, RowsOfChange

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
NO_CHANGES: Mapping[MatrixName, Change] = {}


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class LoadedAdapter:
    """An adapter, packed for one device."""

    digest: bytes
    layers: tuple[Mapping[MatrixName, Change], ...]  # per layer of the model: the changes of its matrices

    @property
    def num_bytes(self) -> int:
        """Memory of its matrices, in bytes."""
        return sum(change.num_bytes for layer in self.layers for change in layer.values())


class AdapterRows(NamedTuple):
    """Rows of a step that one adapter changes."""

    adapter: LoadedAdapter
    rows: Tensor  # [n] int64, ascending, on the device of the ops; n > 0


class LayerChanges(NamedTuple):
    """Changes of the rows of a step in one layer."""

    ops: Ops
    adapters: Sequence[AdapterRows]
    layer: int

    def of(self, matrix: MatrixName) -> list[RowsOfChange]:
        """Rows with a change of this matrix."""
        found = []
        for adapter, rows in self.adapters:
            change = adapter.layers[self.layer].get(matrix)
            if change is not None:
                found.append(RowsOfChange(change, rows))
        return found

    def add(self, matrix: MatrixName, y: Tensor, x: Tensor) -> Tensor:
        """Change y = x times the matrix, in place; returns y."""
        changes = self.of(matrix) if self.adapters else ()
        if changes:
            self.ops.add_changes(y, x, changes)
        return y


def pack_adapter(adapter: Adapter, ops: Ops, spec: ModelSpec) -> LoadedAdapter:
    """Pack an adapter for the device of `ops`. Any thread may call it.

    Raises:
        CheckpointError: a number is not finite; the message names the module.
    """
    layers: list[dict[MatrixName, Change]] = [{} for _ in spec.layers]
    by_matrix: dict[tuple[int, MatrixName], list[AdapterPair]] = {}
    for pair in adapter.pairs:
        by_matrix.setdefault((pair.place.layer, pair.place.matrix), []).append(pair)
    for (layer, matrix), pairs in by_matrix.items():
        parts = [_part(pair, adapter.directory) for pair in pairs]
        width = spec.layers[layer].ffn.width if matrix == "gate_up" else None
        layers[layer][matrix] = ops.pack_change(parts, gate_width=width)
    return LoadedAdapter(adapter.digest, tuple(layers))


def _part(pair: AdapterPair, directory: str) -> LowRank:
    a, b = _tensor(pair.a), _tensor(pair.b)
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise CheckpointError(f"{directory}: {pair.module} has numbers that are not finite; train or save it again")
    return LowRank(a, b, pair.scale, pair.place.first_row)


def _tensor(stored: StoredTensor) -> Tensor:
    content = bytearray(stored.data)  # a copy: the file's bytes may be aligned to less than a number
    return torch.frombuffer(content, dtype=_DTYPES[stored.dtype]).view(stored.shape)
