"""Matrices of 4-bit groups as their formats store them, without decoding. `decode.py` defines their numbers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ....checkpoint.int4 import stays_int4
from ....checkpoint.quantised.matrices import AwqMatrix, GptqMatrix, PackedMatrix, StoredMatrix
from ...ops.int4 import CENTRE, Int4Matrix, pairs
from .decode import PIECE_NUMBERS, awq_unpacked
from .numbers import nibbles, unpacked

_Take = Callable[[str], Tensor]


def read_int4(take: _Take, matrix: StoredMatrix) -> Int4Matrix | None:
    """Read a matrix whose stored tensors `take` reads. None: it does not stay in 4-bit groups (checkpoint/int4.py), or
    its columns' groups are of unlike sizes.

    Raises:
        CheckpointError: a stored tensor cannot be read; names it and its file.
    """
    if not stays_int4(matrix):
        return None
    if isinstance(matrix, AwqMatrix):
        return _awq(take, matrix)
    if isinstance(matrix, GptqMatrix):
        words, scales = take(matrix.weight).t(), take(matrix.scale).t()
        zeros = unpacked(take(matrix.zeros), 4, range(matrix.rows)).t()
        return _ordered(take, matrix, words, scales, (zeros + matrix.zero_offset) & 15)
    assert isinstance(matrix, PackedMatrix)
    stored = None if matrix.zeros is None else unpacked(take(matrix.zeros).t(), 4, range(matrix.rows)).t()
    return _ordered(take, matrix, take(matrix.weight), take(matrix.scale).reshape(matrix.rows, -1), stored)


def _ordered(
    take: _Take, matrix: PackedMatrix | GptqMatrix, words: Tensor, scales: Tensor, zeros: Tensor | None
) -> Int4Matrix | None:
    """The matrix of int32 words [rows, columns / 8], with columns of a group brought together."""
    numbers = words.contiguous().view(torch.uint8)
    index = None if matrix.group_index is None else take(matrix.group_index).long()
    order = None
    if index is not None and not bool((index < 0).any()):  # -1 stands for columns in order
        order = torch.argsort(index, stable=True)
        if not torch.equal(index[order], torch.arange(matrix.columns) // matrix.group):
            return None  # groups of unlike sizes
        if torch.equal(order, torch.arange(matrix.columns)):
            order = None
    if order is not None:
        numbers = _pieces(matrix, lambda rows: nibbles(numbers[rows.start : rows.stop], high_first=False)[:, order])
    return Int4Matrix(numbers, scales, _needed(zeros), None if order is None else order.int())


def _awq(take: _Take, matrix: AwqMatrix) -> Int4Matrix:
    words = take(matrix.weight)
    numbers = _pieces(matrix, lambda rows: awq_unpacked(words, rows).t())
    zeros = None if matrix.zeros is None else awq_unpacked(take(matrix.zeros), range(matrix.rows)).t()
    return Int4Matrix(numbers, take(matrix.scale).t(), _needed(zeros))


def _pieces(matrix: StoredMatrix, numbers_of: Callable[[range], Tensor]) -> Tensor:
    """All numbers, packed in pairs, of a function that unpacks some rows."""
    out = torch.empty(matrix.rows, matrix.columns // 2, dtype=torch.uint8)
    height = max(1, PIECE_NUMBERS // matrix.columns)
    for first in range(0, matrix.rows, height):
        rows = range(first, min(first + height, matrix.rows))
        out[rows.start : rows.stop] = pairs(numbers_of(rows))
    return out


def _needed(zeros: Tensor | None) -> Tensor | None:
    """Zero points; None if all are the one that a matrix without zero points has."""
    return None if zeros is None or bool((zeros == CENTRE).all()) else zeros
