"""Quantise new keys and values to FP8 and write them into their blocks, in one pass over them.

Mathematics and overflow rule: `reference.py: fp8_encode`; the bytes are equal to its. Knows FP8 planes only.
"""

# Triton has no types: its kernels are checked by their tests.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from .e4m3 import decode_e4m3_by_256, encode_e4m3, scale_byte_of, scale_times_256
from .reference import Planes, Stored


@triton.jit
def _store_rows(  # noqa: PLR0917
    x_ptr, payload_ptr, scales_ptr, scratch_ptr, token, slot, x_token_stride, x_head_stride,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    HEADS_PADDED: tl.constexpr, WIDTH_PADDED: tl.constexpr,
):  # fmt: skip
    """Store one token's rows of one component; returns how many of them are not finite."""
    head = tl.arange(0, HEADS_PADDED)
    column = tl.arange(0, WIDTH_PADDED)
    real_head = head < HEADS
    real = real_head[:, None] & (column < WIDTH)[None, :]
    source = x_ptr + token * x_token_stride + head[:, None] * x_head_stride + column[None, :]
    x = tl.load(source, mask=real, other=0.0).to(tl.float32)  # [heads, width]

    magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    amax_bits = tl.max(magnitude, axis=1)
    refused = amax_bits >= 0x7F800000
    x = tl.where(refused[:, None], 0.0, x)
    byte = tl.where(refused, 0, scale_byte_of(amax_bits))
    code = encode_e4m3(x, tl.broadcast_to(byte[:, None], x.shape))

    rounded = decode_e4m3_by_256(code) * scale_times_256(byte)[:, None]
    scratch = scratch_ptr + (token * HEADS + head[:, None]) * WIDTH + column[None, :]
    tl.store(scratch, rounded.to(scratch_ptr.dtype.element_ty), mask=real)

    slots = slot + tl.zeros_like(head)
    row = ((slots // BLOCK_TOKENS) * HEADS + head) * BLOCK_TOKENS + slots % BLOCK_TOKENS
    written = slots >= 0
    target = payload_ptr + row[:, None] * WIDTH + column[None, :]
    tl.store(target, code.to(tl.uint8), mask=real & written[:, None])
    tl.store(scales_ptr + row, byte.to(tl.uint8), mask=real_head & written)
    return tl.sum((refused & real_head).to(tl.int32), axis=0)


@triton.jit
def _store_kv_kernel(  # noqa: PLR0917
    k_ptr, v_ptr, slots_ptr, k_payload_ptr, k_scales_ptr, v_payload_ptr, v_scales_ptr,
    k_scratch_ptr, v_scratch_ptr, non_finite_ptr,
    k_token_stride, k_head_stride, v_token_stride, v_head_stride,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    HEADS_PADDED: tl.constexpr, WIDTH_PADDED: tl.constexpr,
):  # fmt: skip
    """Grid: (num_tokens,). One program stores a token's keys, then its values."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    bad = _store_rows(
        k_ptr, k_payload_ptr, k_scales_ptr, k_scratch_ptr, token, slot, k_token_stride, k_head_stride,
        HEADS, WIDTH, BLOCK_TOKENS, HEADS_PADDED, WIDTH_PADDED,
    )  # fmt: skip
    bad += _store_rows(
        v_ptr, v_payload_ptr, v_scales_ptr, v_scratch_ptr, token, slot, v_token_stride, v_head_stride,
        HEADS, WIDTH, BLOCK_TOKENS, HEADS_PADDED, WIDTH_PADDED,
    )  # fmt: skip
    tl.store(non_finite_ptr + token, tl.where(slot >= 0, bad, 0))


def store_kv(k: Tensor, v: Tensor, slots: Tensor, k_planes: Planes, v_planes: Planes) -> Stored:
    """Quantise keys and values, write them into the FP8 store, return them as the store holds them.

    As `reference.store_kv`, for contiguous planes with scales; k and v of one shape and dtype, their last axis dense.

    Raises:
        ValueError: the planes are not contiguous FP8, or the shapes disagree. Nothing was written.
    """
    tokens, heads, width = k.shape
    _check(k, v, slots, k_planes, v_planes)
    stored = Stored(
        torch.empty((tokens, heads, width), dtype=k.dtype, device=k.device),
        torch.empty((tokens, heads, width), dtype=v.dtype, device=v.device),
        torch.empty(tokens, dtype=torch.int32, device=k.device),
    )
    if tokens == 0:
        return stored
    _store_kv_kernel[(tokens,)](
        k, v, slots, k_planes.payload, k_planes.scales, v_planes.payload, v_planes.scales,
        stored.k, stored.v, stored.non_finite,
        k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        HEADS=heads, WIDTH=width, BLOCK_TOKENS=k_planes.block_tokens,
        HEADS_PADDED=triton.next_power_of_2(heads), WIDTH_PADDED=triton.next_power_of_2(width),
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return stored


def _check(k: Tensor, v: Tensor, slots: Tensor, k_planes: Planes, v_planes: Planes) -> None:
    tokens, heads, width = k.shape
    if v.shape != k.shape or v.dtype != k.dtype or k.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"k is {k.dtype} {tuple(k.shape)}, v {v.dtype} {tuple(v.shape)}; must agree, bf16 or float32")
    if k.stride(-1) != 1 or v.stride(-1) != 1:
        raise ValueError(f"the last axis must be dense; strides are {k.stride()} and {v.stride()}")
    if slots.shape != (tokens,) or slots.dtype != torch.int64 or not slots.is_contiguous():
        raise ValueError(f"slots is {slots.dtype} {tuple(slots.shape)}; must be contiguous int64 ({tokens},)")
    for planes in (k_planes, v_planes):
        num_blocks, plane_heads, block_tokens, row_bytes = planes.payload.shape
        if planes.scales is None or row_bytes != width:
            raise ValueError(f"this kernel stores FP8 rows of {width}; the planes hold {row_bytes} bytes per row")
        if plane_heads != heads or planes.scales.shape != (num_blocks, heads, block_tokens):
            raise ValueError(f"planes {tuple(planes.payload.shape)} do not fit rows of {heads} heads")
        if not (planes.payload.is_contiguous() and planes.scales.is_contiguous()):
            raise ValueError("the planes must be contiguous")
    if k_planes.block_tokens != v_planes.block_tokens:
        raise ValueError(f"block_tokens differ: {k_planes.block_tokens} for k, {v_planes.block_tokens} for v")
