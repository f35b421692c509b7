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
    AwqMatrix,
    Float4Matrix,
    GptqMatrix,
    PackedMatrix,
    ScaledMatrix,
    StackedFloat4Matrix,
    StoredMatrix,
    TableMatrix,
)
from .numbers import E2M1, floats, looked_up, nibbles, of_groups, unpacked

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
        if isinstance(matrix, StackedFloat4Matrix):
            return self._stacked_float4(matrix, rows, columns)
        assert isinstance(matrix, TableMatrix)
        return self._table(matrix, rows, columns)

    def _scaled(self, matrix: ScaledMatrix, rows: range, columns: range) -> Tensor:
        high, wide = matrix.block
        shape = -(-matrix.rows // high), -(-matrix.columns // wide)
        block_rows = torch.arange(rows.start, rows.stop) // high

        def spread(name: str) -> Tensor:
            return of_groups(floats(self._take(name)).reshape(shape)[block_rows], wide, columns)

        numbers = floats(_cut(self._take(matrix.weight), rows, columns))
        if matrix.zeros is not None:
            numbers -= spread(matrix.zeros)
        numbers *= spread(matrix.scale)
        if matrix.divisor != 1:  # as the library: times the scale, then times the rounded reciprocal
            numbers *= 1.0 / matrix.divisor
        return numbers

    def _packed(self, matrix: PackedMatrix, rows: range, columns: range) -> Tensor:
        numbers = unpacked(self._take(matrix.weight)[rows.start : rows.stop], matrix.bits, columns).float()
        scale = floats(self._take(matrix.scale).reshape(matrix.rows, -1)[rows.start : rows.stop])
        if matrix.zeros is None:
            zeros = torch.full_like(scale, 1 << (matrix.bits - 1))
        else:
            zeros = unpacked(self._take(matrix.zeros).t(), matrix.bits, rows).t().float()
        return self._grouped(numbers, zeros, scale, matrix, columns)

    def _gptq(self, matrix: GptqMatrix, rows: range, columns: range) -> Tensor:
        words = self._take(matrix.weight)[:, rows.start : rows.stop]
        numbers = unpacked(words.t(), matrix.bits, columns).float()
        zeros = unpacked(self._take(matrix.zeros), matrix.bits, rows)
        zeros = (zeros + matrix.zero_offset) & ((1 << matrix.bits) - 1)  # a zero point of 0 is stored as all ones
        scale = floats(self._take(matrix.scale)[:, rows.start : rows.stop])
        return self._grouped(numbers, zeros.t().float(), scale.t(), matrix, columns)

    def _awq(self, matrix: AwqMatrix, rows: range, columns: range) -> Tensor:
        numbers = awq_unpacked(self._take(matrix.weight)[columns.start : columns.stop], rows).t().float()
        scale = floats(self._take(matrix.scale)[:, rows.start : rows.stop]).t()
        if matrix.zeros is None:
            zeros = torch.full_like(scale, 8)
        else:
            zeros = awq_unpacked(self._take(matrix.zeros), rows).t().float()
        return self._grouped(numbers, zeros, scale, matrix, columns)

    def _grouped(
        self, numbers: Tensor, zeros: Tensor, scale: Tensor, matrix: PackedMatrix | GptqMatrix | AwqMatrix, part: range
    ) -> Tensor:
        """(q - zero) * scale, in the memory of `numbers` [rows, part]; zeros and scales are [rows, groups]."""
        index = None if isinstance(matrix, AwqMatrix) else self._group_index(matrix.group_index, part)
        if index is None:
            numbers -= of_groups(zeros, matrix.group, part)
            numbers *= of_groups(scale, matrix.group, part)
        else:
            numbers -= zeros.index_select(1, index)
            numbers *= scale.index_select(1, index)
        return numbers

    def _float4(self, matrix: Float4Matrix, rows: range, columns: range) -> Tensor:
        pairs = self._take(matrix.weight)[rows.start : rows.stop]
        scale = floats(self._take(matrix.scale)[rows.start : rows.stop], exponents=True)
        if matrix.global_scale is not None:
            whole = floats(self._take(matrix.global_scale)).reshape(())
            scale = scale / whole if matrix.divides else scale * whole
        return _from_pairs(pairs, scale, matrix.group, columns)

    def _stacked_float4(self, matrix: StackedFloat4Matrix, rows: range, columns: range) -> Tensor:
        start, stop = (matrix.first + row * matrix.step for row in (rows.start, rows.stop - 1))
        place = matrix.expert, slice(start, stop + 1, matrix.step)
        blocks = self._take(matrix.weight)[place]  # [rows, groups, bytes]
        scale = floats(self._take(matrix.scale)[place], exponents=True)
        return _from_pairs(blocks.flatten(1), scale, 2 * blocks.shape[2], columns)

    def _table(self, matrix: TableMatrix, rows: range, columns: range) -> Tensor:
        part = range(rows.start * matrix.columns, rows.stop * matrix.columns)  # of the flat row of numbers
        stored = self._take(matrix.weight).reshape(-1).view(torch.uint8)[part.start // 2 : -(-part.stop // 2)]
        indices = nibbles(stored, high_first=True)[part.start % 2 :][: len(part)]
        begin = part.start // matrix.block
        magnitudes = self._magnitudes(matrix, range(begin, -(-part.stop // matrix.block)))
        inside = range(part.start - begin * matrix.block, part.stop - begin * matrix.block)
        flat = looked_up(floats(self._take(matrix.table)), indices)
        flat *= of_groups(magnitudes.unsqueeze(0), matrix.block, inside).squeeze(0)
        return flat.reshape(len(rows), matrix.columns)[:, columns.start : columns.stop]

    def _magnitudes(self, matrix: TableMatrix, blocks: range) -> Tensor:
        """Magnitudes of these blocks of numbers."""
        stored = self._take(matrix.scale)[blocks.start : blocks.stop]
        if matrix.nested is None:
            return floats(stored)
        assert matrix.nested_table is not None
        of_block = of_groups(floats(self._take(matrix.nested)).unsqueeze(0), matrix.nested_block, blocks).squeeze(0)
        return looked_up(floats(self._take(matrix.nested_table)), stored) * of_block + matrix.offset

    def _group_index(self, name: str | None, columns: range) -> Tensor | None:
        """Group of each column, if the format stores it; -1 stands for columns in order."""
        if name is None:
            return None
        found = self._take(name)[columns.start : columns.stop].int()
        return None if bool((found < 0).any()) else found


def _cut(tensor: Tensor, rows: range, columns: range) -> Tensor:
    return tensor[rows.start : rows.stop, columns.start : columns.stop]


def _from_pairs(pairs: Tensor, scale: Tensor, group: int, columns: range) -> Tensor:
    """Numbers of `columns` from bytes [rows, all columns / 2] of two e2m1 each and scales [rows, groups]."""
    first, last = columns.start // 2, -(-columns.stop // 2)
    indices = nibbles(pairs[:, first:last], high_first=False)[:, columns.start - 2 * first :][:, : len(columns)]
    numbers = looked_up(E2M1, indices)
    numbers *= of_groups(scale, group, columns)
    return numbers


def awq_unpacked(words: Tensor, rows: range) -> Tensor:
    """Numbers of `rows` of the model from words [n, all rows / 8] of AWQ: uint8 [n, rows]."""
    first, last = rows.start // 8, -(-rows.stop // 8)
    kept = words[:, first:last].clone(memory_format=torch.contiguous_format)  # bytes must be neighbours
    halves = nibbles(kept.view(torch.uint8), high_first=False)
    # A word's low 16 bits have its even rows, the high ones its odd rows (`AWQ_ORDER`).
    numbers = halves.reshape(len(words), -1, 2, 4).transpose(2, 3).flatten(1)
    return numbers[:, rows.start - 8 * first :][:, : len(rows)]
