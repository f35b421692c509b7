"""Rounding to 8 bits: of matrices (on all devices), and of rows for integer products (on a CPU). Knows no device."""

from __future__ import annotations

import torch
from torch import Tensor

from ...checkpoint.spec import Quantization

GROUP = 64  # numbers in a row that share a scale; kernels/cpu/linear/int8.cpp must have the same value
_LEAST = 2.0**-100  # smaller magnitudes count as zero: 127 / magnitude might not be finite


def described(quantization: Quantization, dtype: torch.dtype) -> str:
    """Text for the description of a CPU's arithmetic in `dtype`. Rows of float32 are never rounded."""
    if quantization == "none":
        return ""
    return ", int8 weights and rows" if dtype == torch.bfloat16 else ", int8 weights"


def to_int8(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Round to symmetric int8 [out, in] per channel. Also returns each row's step: largest magnitude / 127, [out].

    A tensor-parallel rank that has some columns of a matrix takes its steps from these columns only.
    """
    wide = matrix.float()
    step = wide.abs().amax(dim=1) / 127.0
    step = torch.where(step == 0, torch.ones_like(step), step)
    return torch.round(wide / step.unsqueeze(1)).clamp_(-127, 127).to(torch.int8), step


def rounded_to_int8(matrix: Tensor) -> Tensor:
    """Round a matrix by `to_int8` and convert it back: float32 [out, in]."""
    numbers, step = to_int8(matrix)
    return numbers.float() * step.unsqueeze(1)


def rows_to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round x [rows, in] to int8 [rows, groups, GROUP], padded with zeros, and scales float32 [rows, groups].

    A group's scale is its largest magnitude / 127, or NaN if one of its numbers is not finite.
    """
    groups = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % GROUP)).reshape(len(x), -1, GROUP)
    largest = groups.abs().amax(dim=2)
    counts = largest >= _LEAST
    steps = torch.full_like(largest, 127.0)  # a tensor: torch divides a scalar by its reciprocal, which rounds twice
    inverse = torch.where(counts & largest.isfinite(), steps / largest, 0.0)
    numbers = torch.round(groups * inverse.unsqueeze(2)).nan_to_num(0.0).to(torch.int8)
    scale = torch.where(largest.isfinite(), torch.where(counts, largest / steps, 0.0), torch.nan)
    return numbers, scale


def rounded_rows(x: Tensor) -> Tensor:
    """Round rows by `rows_to_int8` and convert them back: float32 [rows, in]."""
    numbers, scale = rows_to_int8(x)
    return (numbers.float() * scale.unsqueeze(2)).flatten(1)[:, : x.shape[1]]
