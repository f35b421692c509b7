"""Weights of 8 bits: how a matrix is rounded, for every device alike. Knows no device."""

from __future__ import annotations

import torch
from torch import Tensor


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
