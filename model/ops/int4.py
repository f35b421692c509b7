"""Matrices of 4-bit numbers in groups, as checkpoints store them. Knows no device and no file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

CENTRE = 8  # zero point of a matrix without zero points


@dataclass(frozen=True, slots=True, eq=False)
class Int4Matrix:
    """Matrix [rows, columns]: a number q counts as (q - zero) * scale of its group, in float32."""

    numbers: Tensor  # uint8 [rows, columns / 2]: two neighbours per byte, the first in the low bits
    scales: (
        Tensor  # [rows, groups] float32, bfloat16 or float16; a group is columns / groups neighbours, a multiple of 8
    )
    zeros: Tensor | None = None  # uint8 [rows, groups], 0 to 15; None: CENTRE everywhere
    order: Tensor | None = None  # int32 [columns]: the stored column i is the matrix's column order[i]; None: i

    @property
    def columns(self) -> int:
        """Number of columns."""
        return 2 * self.numbers.shape[1]

    @property
    def group(self) -> int:
        """Stored columns that share a scale."""
        return self.columns // self.scales.shape[1]


def joined(parts: Sequence[Int4Matrix | None]) -> Int4Matrix | None:
    """One matrix of the rows of all parts. None: a part is None, or their groups or orders of columns differ."""
    found = [part for part in parts if part is not None]
    first = found[0] if found else None
    if first is None or len(found) < len(parts) or any(not _alike(part, first) for part in found[1:]):
        return None
    if len(found) == 1:
        return first
    dtypes = {part.scales.dtype for part in found}
    scales = torch.cat([part.scales if len(dtypes) == 1 else part.scales.float() for part in found])
    zeros = None
    if any(part.zeros is not None for part in found):
        zeros = torch.cat([_zeros(part) for part in found])
    return Int4Matrix(torch.cat([part.numbers for part in found]), scales, zeros, first.order)


def with_rows(matrix: Int4Matrix, reorder: Callable[[Tensor], Tensor]) -> Int4Matrix:
    """The matrix with its rows reordered by a function of tensors [rows, n]."""
    zeros = None if matrix.zeros is None else reorder(matrix.zeros)
    return replace(matrix, numbers=reorder(matrix.numbers), scales=reorder(matrix.scales), zeros=zeros)


def pairs(numbers: Tensor) -> Tensor:
    """Pack numbers uint8 [rows, columns], each 0 to 15, two per byte: uint8 [rows, columns / 2]."""
    return numbers[:, 0::2] | (numbers[:, 1::2] << 4)


def decoded(matrix: Int4Matrix) -> Tensor:
    """The matrix in float32 [rows, columns]: its definition."""
    low, high = matrix.numbers & 15, matrix.numbers >> 4
    numbers = torch.stack((low, high), -1).float().view(len(low), matrix.scales.shape[1], -1)
    wide = (numbers - _zeros(matrix).float().unsqueeze(2)) * matrix.scales.float().unsqueeze(2)
    stored = wide.flatten(1)
    if matrix.order is None:
        return stored
    return torch.empty_like(stored).index_copy_(1, matrix.order.long(), stored)


def _alike(part: Int4Matrix, first: Int4Matrix) -> bool:
    if part.columns != first.columns or part.group != first.group or (part.order is None) != (first.order is None):
        return False
    return part.order is None or first.order is None or torch.equal(part.order, first.order)


def _zeros(matrix: Int4Matrix) -> Tensor:
    if matrix.zeros is not None:
        return matrix.zeros
    return torch.full(matrix.scales.shape, CENTRE, dtype=torch.uint8)
