"""Decodes parts of quantised matrices to float32: (q - zero) * scale, rounded once. Each format's definition in torch.

A part is decoded in pieces of rows, so that integers and indices on the way take little memory beside the result.
`checkpoint/quantised/matrices.py` says how each kind is stored. Floats of fewer bits, as the formats' own libraries
return them, are these values rounded once more.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ....checkpoint.quantised.matrices import (
    AWQ_ORDER,
    AwqMatrix,
    Float4Matrix,
    GptqMatrix,
    PackedMatrix,
    ScaledMatrix,
    StoredMatrix,
    TableMatrix,
)
from .numbers import E2M1, floats, nibbles, unpacked

PIECE_NUMBERS = 1 << 20  # decoded at once

_Take = Callable[[str], Tensor]


class Decoder:
    """Decodes matrices whose stored tensors `take` reads."""

    def __init__(self, take: _Take) -> None:
        self._take = take

    def decode(self, matrix: StoredMatrix, rows: range, columns: range) -> Tensor:
        """Numbers of these rows and columns: float32 [rows, columns]. Either range may be empty.

        Raises:
            CheckpointError: a stored tensor cannot be read; names it and its file.
        """
        out = torch.empty(len(rows), len(columns))
        height = max(1, PIECE_NUMBERS // max(1, len(columns)))
        for first in range(0, len(rows) if len(columns) else 0, height):
            piece = rows[first : first + height]
            out[first : first + len(piece)] = self._piece(matrix, piece, columns)
        return out

    def _piece(self, matrix: StoredMatrix, rows: range, columns: range) -> Tensor:
        if isinstance(matrix, ScaledMatrix):
            return self._scaled(matrix, rows, columns)
        if isinstance(matrix, PackedMatrix):
            return self._packed(matrix, rows, columns)
        if isinstance(matrix, GptqMatrix):
            return self._gptq(matrix, rows, columns)
        if isinstance(matrix, AwqMatrix):
            return self._awq(matrix, rows, columns)
        if isinstance(matrix, Float4Matrix):
            return self._float4(matrix, rows, columns)
        assert isinstance(matrix, TableMatrix)
        return self._table(matrix, rows, columns)

    def _scaled(self, matrix: ScaledMatrix, rows: range, columns: range) -> Tensor:
        high, wide = matrix.block
        shape = -(-matrix.rows // high), -(-matrix.columns // wide)
        block_rows, block_columns = _places(rows, high), _places(columns, wide)

        def spread(name: str) -> Tensor:
            return floats(self._take(name)).reshape(shape)[block_rows][:, block_columns]

        numbers = floats(_cut(self._take(matrix.weight), rows, columns))
        if matrix.zeros is not None:
            numbers = numbers - spread(matrix.zeros)
        if matrix.divisor != 1:  # as the library: times the scale, then times the rounded reciprocal
            return numbers * spread(matrix.scale) * (1.0 / matrix.divisor)
        return numbers * spread(matrix.scale)

    def _packed(self, matrix: PackedMatrix, rows: range, columns: range) -> Tensor:
        words = self._take(matrix.weight)[rows.start : rows.stop]
        numbers = unpacked(words, matrix.bits, columns)
        groups = self._groups(matrix.group_index, matrix.group, columns)
        scale = floats(self._take(matrix.scale).reshape(matrix.rows, -1)[rows.start : rows.stop])[:, groups]
        if matrix.zeros is None:
            zeros: Tensor | int = 1 << (matrix.bits - 1)
        else:
            zeros = unpacked(self._take(matrix.zeros).t(), matrix.bits, rows).t()[:, groups]
        return (numbers - zeros).float() * scale

    def _gptq(self, matrix: GptqMatrix, rows: range, columns: range) -> Tensor:
        words = self._take(matrix.weight)[:, rows.start : rows.stop]
        numbers = unpacked(words.t(), matrix.bits, columns)
        groups = self._groups(matrix.group_index, matrix.group, columns)
        zeros = unpacked(self._take(matrix.zeros), matrix.bits, rows)
        zeros = (zeros + matrix.zero_offset) & ((1 << matrix.bits) - 1)  # a zero point of 0 is stored as all ones
        scale = floats(self._take(matrix.scale)[:, rows.start : rows.stop])
        return (numbers - zeros.t()[:, groups]).float() * scale.t()[:, groups]

    def _awq(self, matrix: AwqMatrix, rows: range, columns: range) -> Tensor:
        groups = _places(columns, matrix.group)
        numbers = _awq_unpacked(self._take(matrix.weight)[columns.start : columns.stop], rows)
        scale = floats(self._take(matrix.scale)[:, rows.start : rows.stop])
        zeros = 8 if matrix.zeros is None else _awq_unpacked(self._take(matrix.zeros), rows)[groups]
        return ((numbers - zeros).float() * scale[groups]).t()

    def _float4(self, matrix: Float4Matrix, rows: range, columns: range) -> Tensor:
        first, last = columns.start // 2, -(-columns.stop // 2)
        pairs = self._take(matrix.weight)[rows.start : rows.stop, first:last]
        indices = nibbles(pairs, high_first=False)[:, columns.start - 2 * first :][:, : len(columns)]
        numbers: Tensor = E2M1[indices]
        scale = floats(self._take(matrix.scale)[rows.start : rows.stop], exponents=True)
        if matrix.global_scale is not None:
            whole = floats(self._take(matrix.global_scale)).reshape(())
            scale = scale / whole if matrix.divides else scale * whole
        result: Tensor = numbers * scale[:, _places(columns, matrix.group)]
        return result

    def _table(self, matrix: TableMatrix, rows: range, columns: range) -> Tensor:
        first, last = rows.start * matrix.columns, rows.stop * matrix.columns  # of the flat row of numbers
        stored = self._take(matrix.weight).reshape(-1).view(torch.uint8)[first // 2 : -(-last // 2)]
        indices = nibbles(stored, high_first=True)[first % 2 :][: last - first]
        blocks = torch.arange(first, last) // matrix.block
        begin = first // matrix.block
        magnitudes = self._magnitudes(matrix, range(begin, (last - 1) // matrix.block + 1))
        flat = floats(self._take(matrix.table))[indices] * magnitudes[blocks - begin]
        return flat.reshape(len(rows), matrix.columns)[:, columns.start : columns.stop]

    def _magnitudes(self, matrix: TableMatrix, blocks: range) -> Tensor:
        """Magnitudes of these blocks of numbers."""
        stored = self._take(matrix.scale)[blocks.start : blocks.stop]
        if matrix.nested is None:
            return floats(stored)
        assert matrix.nested_table is not None
        of_block = floats(self._take(matrix.nested))[_places(blocks, matrix.nested_block)]
        return floats(self._take(matrix.nested_table))[stored.long()] * of_block + matrix.offset

    def _groups(self, index: str | None, group: int, columns: range) -> Tensor:
        """Group of each column: by the index if there is one (-1 everywhere: none), else in order."""
        if index is not None:
            found = self._take(index)[columns.start : columns.stop].long()
            if not bool((found < 0).any()):
                return found
        return _places(columns, group)


def _places(part: range, size: int) -> Tensor:
    """Index of the block of `size` numbers in which each number of a part is."""
    return torch.arange(part.start, part.stop) // size


def _cut(tensor: Tensor, rows: range, columns: range) -> Tensor:
    return tensor[rows.start : rows.stop, columns.start : columns.stop]


def _awq_unpacked(words: Tensor, rows: range) -> Tensor:
    """Numbers of `rows` of the model from words [n, all rows / 8] of AWQ: int32 [n, rows]."""
    first, last = rows.start // 8, -(-rows.stop // 8)
    kept = words[:, first:last]
    shifts = torch.empty(8, dtype=torch.int32)
    shifts[list(AWQ_ORDER)] = torch.arange(0, 32, 4, dtype=torch.int32)
    numbers = (kept.unsqueeze(2) >> shifts) & 15
    return numbers.flatten(1)[:, rows.start - 8 * first :][:, : len(rows)]
