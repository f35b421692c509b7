"""Root mean square norm of rows, alone or after adding to the residual stream.

`x / sqrt(mean(x**2) + eps) * weight` in float32, rounded once. One program sums a row, in an order that depends on the
width alone. Source: Zhang and Sennrich 2019; the definition is `reference.py`.
"""

# Triton has no types: its kernels are checked by their tests.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import Normed
from .e4m3 import round_to
from .launch import options

_NUMBERS = 2048  # numbers per program, for narrow rows


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm_kernel(  # noqa: PLR0917
    x_ptr, delta_ptr, weight_ptr, sum_ptr, out_ptr, num_rows, x_row_stride, x_head_stride, delta_stride, eps,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, WIDTH_PADDED: tl.constexpr,
    UNIT_OFFSET: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Grid: (ceil(num_rows * HEADS / ROWS),). A row is one head of one of x's rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH_PADDED)
    real = (row < num_rows * HEADS)[:, None] & (column < WIDTH)[None, :]
    source = (row // HEADS) * x_row_stride + (row % HEADS) * x_head_stride
    x = tl.load(x_ptr + source[:, None] + column[None, :], mask=real, other=0.0).to(tl.float32)  # [rows, width]
    target = row[:, None] * WIDTH + column[None, :]
    if ADD:
        delta = tl.load(delta_ptr + row[:, None] * delta_stride + column[None, :], mask=real, other=0.0)
        x = round_to(x + delta.to(tl.float32), sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + target, x.to(sum_ptr.dtype.element_ty), mask=real)
    weight = tl.load(weight_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    if UNIT_OFFSET:
        weight = weight + 1.0
    mean = tl.sum(x * x, axis=1) / WIDTH
    out = x * tl.rsqrt(mean + eps)[:, None] * weight[None, :]
    tl.store(out_ptr + target, round_to(out, out_ptr.dtype.element_ty).to(out_ptr.dtype.element_ty), mask=real)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, unit_offset: bool = False) -> Tensor:
    """`reference.rms_norm` of x [rows, width] or [rows, heads, width], the last axis dense; the result is contiguous.

    Raises:
        ValueError: x has another rank, or the weight does not fit.
    """
    _check(x, weight)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, None, weight, None, out, eps, unit_offset)
    return out


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float, *, unit_offset: bool = False) -> Normed:
    """`reference.add_rms_norm` for x and delta [rows, width] of one dtype, their last axis dense.

    Raises:
        ValueError: the shapes or dtypes disagree.
    """
    _check(x, weight)
    if x.ndim != 2 or delta.shape != x.shape or delta.dtype != x.dtype or delta.stride(-1) != 1:
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}, delta {delta.dtype} {tuple(delta.shape)}; must agree")
    normed = Normed(*(torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2)))
    _launch(x, delta, weight, normed.residual, normed.normed, eps, unit_offset)
    return normed


def _launch(  # noqa: PLR0917 - the kernel's own arguments
    x: Tensor, delta: Tensor | None, weight: Tensor, total: Tensor | None, out: Tensor, eps: float, unit_offset: bool
) -> None:
    if x.numel() == 0:
        return
    width, heads = x.shape[-1], 1 if x.ndim == 2 else x.shape[1]
    padded = triton.next_power_of_2(width)
    rows = max(1, _NUMBERS // padded) if x.ndim == 3 else 1
    _rms_norm_kernel[(triton.cdiv(x.shape[0] * heads, rows),)](
        x, x if delta is None else delta, weight, out if total is None else total, out,
        x.shape[0], x.stride(0), 0 if x.ndim == 2 else x.stride(1), 0 if delta is None else delta.stride(0), eps,
        HEADS=heads, WIDTH=width, ROWS=rows, WIDTH_PADDED=padded, UNIT_OFFSET=unit_offset, ADD=delta is not None,
        **options(num_warps=8 if padded > 4096 else 4),
    )  # fmt: skip


def _check(x: Tensor, weight: Tensor) -> None:
    if x.ndim not in (2, 3) or x.stride(-1) != 1 or x.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(
            f"x is {x.dtype} {tuple(x.shape)}, strides {x.stride()}; must be bf16 or float32 rows or heads"
        )
    if weight.shape != x.shape[-1:] or not weight.is_contiguous():
        raise ValueError(f"weight is {tuple(weight.shape)}; must be ({x.shape[-1]},)")
