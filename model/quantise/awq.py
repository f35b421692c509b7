"""AWQ: scales the input channels that matter most before rounding, and clips each group where that helps.

The scales are s = mean|x|^a with a on a grid of 20 points in [0, 1), chosen by the error of the output,
‖W X - Q(W diag(s)) diag(s)⁻¹ X‖². Errors come from X Xᵀ, so no activations are kept.
Source: AWQ (Lin et al. 2024), section 3.2, equations 4 and 5; the clipping as in its published code (auto_clip).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .observing import Observed
from .rounding import Grid, grid_of, rounded
from .scheme import Scheme

GRID_POINTS = 20
_MOST_SHRUNK = 0.5  # a group's ends are clipped to half at most
_LEAST = 1e-4


def channel_scale(
    weights: Sequence[Tensor],
    seen: Sequence[Observed],
    scheme: Scheme,
    dtype: torch.dtype,
    tie: Callable[[Tensor], Tensor],
) -> Tensor:
    """Scale [in] of the input channels that several matrices [out, in] share; the best of the grid.

    `tie`: makes numbers [in] equal for channels that one producer gives, see `Fold.tie`.
    """
    mean = sum((one.total for one in seen), torch.zeros_like(seen[0].total)) / max(1, sum(one.count for one in seen))
    mean = tie(mean)
    best, least = torch.ones_like(mean), float("inf")
    for point in range(GRID_POINTS):
        scale = mean.pow(point / GRID_POINTS).clamp(min=_LEAST)
        scale = scale / (scale.max() * scale.min()).sqrt()
        error = 0.0
        for weight, one in zip(weights, seen, strict=True):
            scaled = weight * scale
            again = rounded(scaled, grid_of(scaled, scheme, dtype), scheme).values(scheme) / scale
            error += one.output_error(again - weight)
        if error < least:
            best, least = scale, error
    return best


def clipped_grid(weight: Tensor, observed: Observed, scheme: Scheme, dtype: torch.dtype) -> Grid:
    """Grid of weight [rows, in] whose groups are clipped to the ends with the least error of the group's own output."""
    rows, columns = weight.shape
    width = columns if scheme.group is None else scheme.group
    inner = torch.stack([observed.second[at : at + width, at : at + width] for at in range(0, columns, width)])
    best = torch.ones(rows, columns // width)
    least = torch.full_like(best, float("inf"))
    for point in range(GRID_POINTS):
        shrink = 1 - point / GRID_POINTS * _MOST_SHRUNK
        delta = rounded(weight, grid_of(weight, scheme, dtype, shrink), scheme).values(scheme) - weight
        parts = delta.reshape(rows, -1, width).transpose(0, 1)  # [groups, rows, width]
        error = (torch.bmm(parts, inner) * parts).sum(-1).t()
        better = error < least
        best, least = torch.where(better, shrink, best), torch.where(better, error, least)
    return grid_of(weight, scheme, dtype, best)
