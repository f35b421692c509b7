"""Tensors of a rounded matrix in the layout of compressed-tensors. Knows no method.

Source: compressed-tensors 0.20, pack_quantized/helpers.py (numbers plus 2^(bits - 1), lowest bits first in int32 words,
zero points packed along the rows), naive_quantized and float_quantized (a byte per number),
nvfp4 and mxfp4 (two numbers per byte, the first in the low bits).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .float4 import EXPONENT_BIAS, codes_of
from .rounding import Rounded
from .scheme import Scheme

_WORD_BITS = 32


def tensors_of(matrix: Rounded, scheme: Scheme, dtype: torch.dtype) -> dict[str, Tensor]:
    """Stored tensors by their names after the module's. `dtype`: of the scales."""
    scale = matrix.grid.scale.to(dtype)
    scale = scale.reshape(1) if scheme.strategy == "tensor" else scale
    if scheme.is_float4:
        return _float4_tensors(matrix)
    if scheme.format != "pack-quantized":
        kind = torch.float8_e4m3fn if scheme.is_float else torch.int8
        return {"weight": matrix.numbers.to(kind), "weight_scale": scale}
    found = {
        "weight_packed": packed(matrix.numbers - scheme.least, scheme.bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor(matrix.numbers.shape, dtype=torch.int64),
    }
    if matrix.grid.zeros is not None:
        found["weight_zero_point"] = packed((matrix.grid.zeros - scheme.least).t(), scheme.bits).t().contiguous()
    return found


def _float4_tensors(matrix: Rounded) -> dict[str, Tensor]:
    codes, whole = codes_of(matrix.numbers), matrix.grid.whole
    found = {"weight_packed": codes[:, ::2] | (codes[:, 1::2] << 4)}
    if whole is None:
        return found | {"weight_scale": (torch.frexp(matrix.grid.scale).exponent - 1 + EXPONENT_BIAS).to(torch.uint8)}
    scale = (matrix.grid.scale * whole).to(torch.float8_e4m3fn)
    return found | {"weight_scale": scale, "weight_global_scale": whole.reshape(1)}


def packed(numbers: Tensor, bits: int) -> Tensor:
    """Pack unsigned numbers [rows, n] of any dtype into int32 words [rows, n * bits / 32, rounded up]."""
    rows = len(numbers)
    shifts = torch.arange(bits, dtype=torch.uint8)
    stream = ((numbers.to(torch.uint8).unsqueeze(-1) >> shifts) & 1).flatten(1)  # [rows, n * bits], lowest bits first
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[1] % _WORD_BITS)).reshape(rows, -1, 8)
    bytes_ = (stream << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
    return bytes_.contiguous().view(torch.int32)  # little-endian, as the files are
