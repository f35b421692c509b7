"""GPTQ: rounds the columns of a matrix one by one and lets the later ones make up for each one's error.

For a layer's inputs X the error ‖W X - Q X‖² has the Hessian H = X Xᵀ. After column i is rounded, the others change by
-(w_i - q_i) / U_ii * U_i,: where U is the upper Cholesky factor of the inverse of H.

Columns go in order of their diagonal in H, greatest first (act order). All groups have their scales before the first
column is rounded (static groups), so the stored form needs no order of columns.
Source: GPTQ (Frantar et al. 2023), algorithm 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.errors import CheckpointError
from .observing import Observed
from .rounding import Grid, Rounded, spread
from .scheme import Scheme

_BLOCK_COLUMNS = 128  # errors go to the columns beyond a block in one product


class Factor:
    """The Hessian of a product's inputs, as GPTQ uses it. Serves all matrices that these inputs meet."""

    def __init__(self, observed: Observed, damp: float, ordered: bool) -> None:
        """`damp`: share of the mean diagonal that is added to the diagonal.

        Raises:
            CheckpointError: the Hessian cannot be factored: inputs were not finite.
        """
        hessian = observed.second / max(1, observed.count)
        self.dead = hessian.diagonal() == 0  # inputs that were always zero
        hessian.diagonal()[self.dead] = 1
        self.order = torch.argsort(hessian.diagonal(), descending=True, stable=True) if ordered else None
        if self.order is not None:
            hessian = hessian[self.order][:, self.order]
        hessian.diagonal().add_(damp * hessian.diagonal().mean())
        try:
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
            self.upper = torch.linalg.cholesky(inverse, upper=True)  # [in, in]
        except RuntimeError as error:  # LinAlgError is one
            raise CheckpointError(
                f"the inputs of a matrix have no invertible Hessian ({error}): the model's activations are not finite, "
                "or the calibration text repeats itself; give another text, or a larger --damp than "
                f"{damp}"
            ) from None


def round_by_columns(weight: Tensor, factor: Factor, grid: Grid, scheme: Scheme) -> Rounded:
    """Round weight [rows, in] onto a grid of integers, column by column."""
    shape, order = weight.shape, factor.order
    left = torch.where(factor.dead, 0.0, weight)
    scale = spread(grid.scale, scheme, shape).expand(shape)
    zeros = torch.zeros(()) if grid.zeros is None else spread(grid.zeros, scheme, shape)
    zeros = zeros.expand(shape)
    if order is not None:
        left, scale, zeros = left[:, order], scale[:, order], zeros[:, order]
    numbers, upper = torch.empty_like(left), factor.upper
    for first in range(0, shape[1], _BLOCK_COLUMNS):
        last = min(first + _BLOCK_COLUMNS, shape[1])
        errors = torch.empty(shape[0], last - first)
        for column in range(first, last):
            now, step, zero = left[:, column], scale[:, column], zeros[:, column]
            numbers[:, column] = (now / step + zero).round().clamp(scheme.least, scheme.most)
            error = (now - (numbers[:, column] - zero) * step) / upper[column, column]
            left[:, column:last] -= error.unsqueeze(1) * upper[column, column:last]
            errors[:, column - first] = error
        left[:, last:] -= errors @ upper[first:last, last:]
    if order is not None:
        numbers = numbers[:, torch.argsort(order)]
    return Rounded(numbers, grid)
