"""Rounds a matrix to few bits, to the nearest number of a grid; the baseline of all methods.

A grid has a scale, and with zero points a zero, for each group; the value of a number q is (q - zero) * scale. Scales
are rounded to the dtype in which they are stored before any number is rounded with them.
Source: Jacob et al. 2018, section 2.1; the integers' range as in compressed-tensors 0.20 (calculate_qparams). Four-bit
floats are in float4.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .float4 import float4_scales, to_e2m1
from .scheme import BLOCK, Scheme

FLOAT8_MAX = 448.0


@dataclass(frozen=True, slots=True)
class Grid:
    """Scales of a matrix's groups, and zeros if there are any: float32, of one shape."""

    scale: Tensor
    zeros: Tensor | None
    whole: Tensor | None = None  # NVFP4: stored scales are `scale * whole`, in e4m3


@dataclass(frozen=True, slots=True)
class Rounded:
    """A matrix of few bits. `numbers` [rows, columns] float32: integers, or values of e4m3 or e2m1."""

    numbers: Tensor
    grid: Grid

    def values(self, scheme: Scheme) -> Tensor:
        """The matrix that is served: [rows, columns] float32."""
        numbers = self.numbers
        if self.grid.zeros is not None:
            numbers = numbers - spread(self.grid.zeros, scheme, numbers.shape)
        return numbers * spread(self.grid.scale, scheme, numbers.shape)


def grid_of(
    weight: Tensor, scheme: Scheme, dtype: torch.dtype, shrink: Tensor | float = 1.0, most: Tensor | None = None
) -> Grid:
    """Grid from the least and greatest number of each group of weight [rows, columns].

    `dtype`: of stored scales. `shrink`: factor on both ends (scalar, or of the scales' shape), for clipping. `most`:
    greatest magnitude of all matrices that share a tensor's scale; None: of this one.
    """
    if scheme.is_float4:
        assert scheme.group is not None
        tops = weight.reshape(len(weight), -1, scheme.group)
        scale, whole = float4_scales(
            tops, (tops.abs().max() if most is None else most), scheme.strategy == "tensor_group"
        )
        return Grid(scale, None, whole)
    low, high = _ends(weight, scheme)
    low, high = low * shrink, high * shrink
    tiny = torch.finfo(dtype).smallest_normal
    if scheme.is_float:
        return Grid(_stored(torch.maximum(-low, high) / FLOAT8_MAX, tiny, dtype), None)
    if scheme.symmetric:
        half = (scheme.most - scheme.least) / 2
        return Grid(_stored(torch.maximum(-low, high) / half, tiny, dtype), None)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = _stored((high - low) / (scheme.most - scheme.least), tiny, dtype)
    return Grid(scale, (scheme.least - low / scale).round().clamp(scheme.least, scheme.most))


def rounded(weight: Tensor, grid: Grid, scheme: Scheme) -> Rounded:
    """Round weight [rows, columns] to the nearest numbers of a grid."""
    scaled = weight / spread(grid.scale, scheme, weight.shape)
    if scheme.is_float4:
        return Rounded(to_e2m1(scaled), grid)
    if scheme.is_float:
        numbers = scaled.clamp(-FLOAT8_MAX, FLOAT8_MAX).to(torch.float8_e4m3fn).float()
        return Rounded(numbers, grid)
    if grid.zeros is not None:
        scaled = scaled + spread(grid.zeros, scheme, weight.shape)
    return Rounded(scaled.round().clamp(scheme.least, scheme.most), grid)


def spread(scale: Tensor, scheme: Scheme, shape: torch.Size) -> Tensor:
    """Repeat scales so that they broadcast over a matrix of that shape."""
    if scheme.strategy in ("group", "tensor_group"):
        assert scheme.group is not None
        return scale.repeat_interleave(scheme.group, 1)[:, : shape[1]]
    if scheme.strategy == "block":
        return scale.repeat_interleave(BLOCK[0], 0).repeat_interleave(BLOCK[1], 1)[: shape[0], : shape[1]]
    return scale


def rounded_rows(x: Tensor, is_float: bool, scale: Tensor) -> Tensor:
    """Round activations to 8 bits and back; `scale` broadcasts over x. Source: SmoothQuant (2023), equation 1."""
    scaled = x / scale
    if is_float:
        return scaled.clamp(-FLOAT8_MAX, FLOAT8_MAX).to(torch.float8_e4m3fn).float() * scale
    return scaled.round().clamp(-128, 127) * scale


def _ends(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Least and greatest number of each group, in the scales' shape."""
    rows, columns = weight.shape
    if scheme.strategy == "tensor":
        return weight.amin().reshape(1, 1), weight.amax().reshape(1, 1)
    if scheme.strategy == "block":
        high, wide = BLOCK
        padded = torch.nn.functional.pad(weight, (0, -columns % wide, 0, -rows % high))  # zeros: inside all ends
        tiles = padded.reshape(padded.shape[0] // high, high, -1, wide)
        return tiles.amin((1, 3)), tiles.amax((1, 3))
    groups = weight.reshape(rows, -1, columns if scheme.group is None else scheme.group)
    return groups.amin(-1), groups.amax(-1)


def _stored(scale: Tensor, tiny: float, dtype: torch.dtype) -> Tensor:
    """Scale as it is stored. A group of zeros gets 1."""
    return torch.where(scale > 0, scale, 1.0).clamp(min=tiny).to(dtype).float()
