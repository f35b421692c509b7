"""The gated activation of a feed-forward layer: SiLU or tanh-GELU of the gate, times up; or the clamped form.

Both are `x / (1 + exp(-u))`: u = x for SiLU, u = 2 * sqrt(2 / pi) * (x + 0.044715 * x**3) for GELU, since
`(1 + tanh(y)) / 2 = 1 / (1 + exp(-2 * y))`. The clamped form has u = 1.702 * x, and up + 1 instead of up, after both
were clamped. Source: Shazeer 2020; gpt-oss (2025); the definition is `reference.py: act_mul`.
"""

# Triton has no types: its kernels are checked by their tests.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import CLAMPED_LIMIT, CLAMPED_SLOPE, Activation
from .e4m3 import round_to
from .launch import options

_COLUMNS = 1024


@triton.jit
def _act_mul_kernel(  # noqa: PLR0917
    gate_up_ptr, out_ptr, stride, FFN: tl.constexpr, GELU: tl.constexpr, LIMIT: tl.constexpr, SLOPE: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Grid: (rows, ceil(FFN / COLUMNS)). LIMIT: of the clamped form, whose u is SLOPE * gate; else 0."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    real = column < FFN
    gate = tl.load(gate_up_ptr + row * stride + column, mask=real, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * stride + FFN + column, mask=real, other=0.0).to(tl.float32)
    u = gate
    if GELU:
        u = 1.5957691216057308 * (gate + 0.044715 * (gate * gate * gate))
    if LIMIT > 0:  # comparisons that leave NaN as it is
        gate = tl.where(gate > LIMIT, LIMIT, gate)
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up)) + 1.0
        u = SLOPE * gate
    out = round_to(gate / (1.0 + tl.exp(-u)) * up, out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * FFN + column, out.to(out_ptr.dtype.element_ty), mask=real)


def act_mul(gate_up: Tensor, activation: Activation) -> Tensor:
    """`reference.act_mul`, to a unit in the last place; gate_up [rows, 2 * ffn], the last axis dense.

    Raises:
        ValueError: gate_up has another shape or stride, or the activation is unknown.
    """
    if gate_up.ndim != 2 or gate_up.stride(1) != 1 or gate_up.shape[1] % 2:
        raise ValueError(
            f"gate_up is {tuple(gate_up.shape)}, strides {gate_up.stride()}; must be dense [rows, 2 * ffn]"
        )
    if activation not in ("silu", "gelu_tanh", "clamped_swiglu"):
        raise ValueError(f"the activation is {activation!r}; must be 'silu', 'gelu_tanh' or 'clamped_swiglu'")
    rows, ffn = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((rows, ffn), dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        _act_mul_kernel[(rows, triton.cdiv(ffn, _COLUMNS))](
            gate_up, out, gate_up.stride(0),
            FFN=ffn, GELU=activation == "gelu_tanh", LIMIT=CLAMPED_LIMIT if activation == "clamped_swiglu" else 0.0,
            SLOPE=CLAMPED_SLOPE, COLUMNS=_COLUMNS, **options(num_warps=4),
        )  # fmt: skip
    return out
