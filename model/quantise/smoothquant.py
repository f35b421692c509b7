"""SmoothQuant: moves the range of activations into the weights, so that both can be rounded to 8 bits.

s_j = max|X_j|^α / max|W_j|^(1 - α); X is divided by s, W multiplied. α is given, or the one of a grid with the least
error of the rounded product on rows of the calibration. Source: SmoothQuant (Xiao et al. 2023), equations 3 and 4.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .observing import Observed, rounded_activations
from .rounding import grid_of, rounded
from .scheme import Activations, Scheme

ALPHAS = tuple(step / 20 for step in range(0, 20))
_LEAST = 1e-5


def channel_scale(
    weights: Sequence[Tensor], seen: Sequence[Observed], scheme: Scheme, dtype: torch.dtype, alpha: float | None
) -> tuple[Tensor, float]:
    """Scale [in] of the input channels that several matrices [out, in] share, and its α; None: the best of `ALPHAS`."""
    ranges = torch.stack([one.most for one in seen]).amax(0)
    heights = torch.cat([weight.abs() for weight in weights]).amax(0)
    if alpha is not None:
        return _scale(ranges, heights, alpha), alpha
    assert scheme.activations is not None
    errors = {a: _error(weights, seen, scheme, dtype, _scale(ranges, heights, a)) for a in ALPHAS}
    found = min(errors, key=errors.__getitem__)
    return _scale(ranges, heights, found), found


def _scale(ranges: Tensor, heights: Tensor, alpha: float) -> Tensor:
    scale = ranges.clamp(min=_LEAST).pow(alpha) / heights.clamp(min=_LEAST).pow(1 - alpha)
    return torch.where((ranges > 0) & (heights > 0), scale.clamp(min=_LEAST), 1.0)


def _error(
    weights: Sequence[Tensor], seen: Sequence[Observed], scheme: Scheme, dtype: torch.dtype, scale: Tensor
) -> float:
    """Error of the rounded products on the sampled rows."""
    how, error = scheme.activations, 0.0
    assert how is not None
    for weight, one in zip(weights, seen, strict=True):
        scaled = weight * scale
        again = rounded(scaled, grid_of(scaled, scheme, dtype), scheme).values(scheme)
        rows = rounded_activations(one.sample / scale, how, static_scale(one.most / scale, how))
        error += float((rows @ again.t() - one.sample @ weight.t()).square().sum())
    return error


def static_scale(most: Tensor, how: Activations) -> Tensor | None:
    """Scale of a tensor's rows, [1], from the greatest |x| of each column; None: it is measured in each step."""
    return None if how.dynamic else (most.amax() / 127.5).clamp(min=_LEAST).reshape(1)
