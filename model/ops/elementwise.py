"""Elementwise functions whose bits do not depend on the place of a number in its tensor. Knows no shape.

torch computes the last few numbers of each thread's range with different code. For silu, tanh and sigmoid the results
can differ in the last bit; for exp and for IEEE 754 arithmetic they are equal. So these functions are built from exp.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from ...kernels.reference import CLAMPED_LIMIT, CLAMPED_SLOPE
from .seam import Activation

_GELU_SCALE = 2.0 * math.sqrt(2.0 / math.pi)
_GELU_CUBIC = 0.044715


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)), float32."""
    return 1.0 / (1.0 + torch.exp(-x))


def activated(x: Tensor, activation: Literal["silu", "gelu_tanh"]) -> Tensor:
    """silu(x), or gelu(x) in its tanh form, which is x * sigmoid(2 * sqrt(2 / pi) * (x + 0.044715 * x**3)); float32.

    Source: Hendrycks and Gimpel 2016.
    """
    inner = x if activation == "silu" else _GELU_SCALE * (x + _GELU_CUBIC * (x * x * x))
    return x / (1.0 + torch.exp(-inner))


def gated(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """`kernels.reference.act_mul` of float32 gate and up, which `activated` and this function compute from exp."""
    if activation == "clamped_swiglu":
        gate, up = gate.clamp(max=CLAMPED_LIMIT), up.clamp(-CLAMPED_LIMIT, CLAMPED_LIMIT)
        return (up + 1.0) * (gate / (1.0 + torch.exp(-CLAMPED_SLOPE * gate)))
    return activated(gate, activation) * up


def softcapped(x: Tensor, cap: float) -> Tensor:
    """cap * tanh(x / cap), float32. Source: Gemma 2 (2024)."""
    decay = torch.exp(x.abs() * (-2.0 / cap))
    return torch.copysign(cap * ((1.0 - decay) / (1.0 + decay)), x)
