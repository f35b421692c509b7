"""8 bits: how every device rounds matrices, and a CPU rows where products are of integers. Knows no device."""

from __future__ import annotations

import torch
from torch import Tensor

from ...checkpoint.spec import Quantization

GROUP = 64  # neighbours in a row that share a scale; the kernel has the same number (kernels/cpu/linear_int8.cpp)
_LEAST = 2.0**-100  # magnitudes below count as zero: 127 over them might not be finite


def described(quantization: Quantization, dtype: torch.dtype) -> str:
    """What it adds to the description of a CPU's arithmetic in `dtype`: rows of float32 are never rounded."""
    if quantization == "none":
        return ""
    return ", int8 weights and rows" if dtype == torch.bfloat16 else ", int8 weights"


def to_int8(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Per-channel symmetric int8 [out, in], and the step of each row, float32 [out]: its largest magnitude / 127."""
    wide = matrix.float()
    step = wide.abs().amax(dim=1) / 127.0
    step = torch.where(step == 0, torch.ones_like(step), step)
    return torch.round(wide / step.unsqueeze(1)).clamp_(-127, 127).to(torch.int8), step


def rounded_to_int8(matrix: Tensor) -> Tensor:
    """`to_int8` and back: the numbers that 8-bit weights stand for, float32 [out, in]."""
    numbers, step = to_int8(matrix)
    return numbers.float() * step.unsqueeze(1)


def rows_to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [rows, in] as int8 [rows, groups, GROUP], filled up with zeros; each group's scale, float32 [rows, groups].

    A group's scale is its largest magnitude / 127; NaN where one of its numbers is not finite.
    """
    groups = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % GROUP)).reshape(len(x), -1, GROUP)
    largest = groups.abs().amax(dim=2)
    counts = largest >= _LEAST
    steps = torch.full_like(largest, 127.0)  # a tensor: torch divides a number by way of the reciprocal, rounded twice
    inverse = torch.where(counts & largest.isfinite(), steps / largest, 0.0)
    numbers = torch.round(groups * inverse.unsqueeze(2)).nan_to_num(0.0).to(torch.int8)
    scale = torch.where(largest.isfinite(), torch.where(counts, largest / steps, 0.0), torch.nan)
    return numbers, scale


def rounded_rows(x: Tensor) -> Tensor:
    """`rows_to_int8` and back: the numbers that rounded rows stand for, float32 [rows, in]."""
    numbers, scale = rows_to_int8(x)
    return (numbers.float() * scale.unsqueeze(2)).flatten(1)[:, : x.shape[1]]
