"""Quantise new keys and values and write them into their blocks, in one pass.

For layers without rotation; layers with rotation use `rotary_store.py`. Mathematics and overflow rule: `reference.py:
fp8_encode`; the bytes equal the definition's. Knows planes of one byte per number (byte_codes.py) and of bf16.
"""

# Triton has no types: its kernels are checked by their tests.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import Planes, Stored
from .byte_codes import code_of
from .launch import options
from .rows import check_rows, encode_rows, numbers_of, write_rows


@triton.jit
def _store_rows(  # noqa: PLR0917
    x_ptr, payload_ptr, scales_ptr, scratch_ptr, token, slot, x_token_stride, x_head_stride,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    HEADS_PADDED: tl.constexpr, WIDTH_PADDED: tl.constexpr, CODE: tl.constexpr,
):  # fmt: skip
    """Store one token's rows of one component; returns the number that are not finite."""
    head = tl.arange(0, HEADS_PADDED)
    column = tl.arange(0, WIDTH_PADDED)
    real = (head < HEADS)[:, None] & (column < WIDTH)[None, :]
    source = x_ptr + token * x_token_stride + head[:, None] * x_head_stride + column[None, :]
    x = tl.load(source, mask=real, other=0.0).to(tl.float32)  # [heads, width]
    code, byte, rounded, refused = encode_rows(x, CODE)
    scratch = scratch_ptr + (token * HEADS + head[:, None]) * WIDTH + column[None, :]
    tl.store(scratch, rounded.to(scratch_ptr.dtype.element_ty), mask=real)
    write_rows(code, byte, payload_ptr, scales_ptr, slot, head, column, HEADS, WIDTH, BLOCK_TOKENS, CODE)
    return tl.sum((refused & (head < HEADS)).to(tl.int32), axis=0)


@triton.jit
def _store_kv_kernel(  # noqa: PLR0917
    k_ptr, v_ptr, slots_ptr, k_payload_ptr, k_scales_ptr, v_payload_ptr, v_scales_ptr,
    k_scratch_ptr, v_scratch_ptr, non_finite_ptr,
    k_token_stride, k_head_stride, v_token_stride, v_head_stride,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    HEADS_PADDED: tl.constexpr, WIDTH_PADDED: tl.constexpr, CODE: tl.constexpr,
):  # fmt: skip
    """Grid: (num_tokens,). One program stores a token's keys, then its values."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    bad = _store_rows(
        k_ptr, k_payload_ptr, k_scales_ptr, k_scratch_ptr, token, slot, k_token_stride, k_head_stride,
        HEADS, WIDTH, BLOCK_TOKENS, HEADS_PADDED, WIDTH_PADDED, CODE,
    )  # fmt: skip
    bad += _store_rows(
        v_ptr, v_payload_ptr, v_scales_ptr, v_scratch_ptr, token, slot, v_token_stride, v_head_stride,
        HEADS, WIDTH, BLOCK_TOKENS, HEADS_PADDED, WIDTH_PADDED, CODE,
    )  # fmt: skip
    tl.store(non_finite_ptr + token, tl.where(slot >= 0, bad, 0))


def store_kv(k: Tensor, v: Tensor, slots: Tensor, k_planes: Planes, v_planes: Planes) -> Stored:
    """Quantise keys and values, write them to the store, and return them as stored.

    Defined by `reference.store_kv`; for contiguous FP8 or bf16 planes. k and v have one shape and dtype, and a dense
    last axis.

    Raises:
        ValueError: the planes have another codec, or the shapes disagree. Nothing was written.
    """
    tokens, heads, width = k.shape
    check_rows(k, v, slots, k_planes, v_planes)
    stored = Stored(
        torch.empty((tokens, heads, width), dtype=k.dtype, device=k.device),
        torch.empty((tokens, heads, width), dtype=v.dtype, device=v.device),
        torch.empty(tokens, dtype=torch.int32, device=k.device),
    )
    if tokens == 0:
        return stored
    k_numbers, v_numbers = numbers_of(k_planes), numbers_of(v_planes)
    code = code_of(k_planes)
    _store_kv_kernel[(tokens,)](
        k, v, slots,
        k_numbers, k_planes.scales if code else k_numbers, v_numbers, v_planes.scales if code else v_numbers,
        stored.k, stored.v, stored.non_finite,
        k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        HEADS=heads, WIDTH=width, BLOCK_TOKENS=k_planes.block_tokens,
        HEADS_PADDED=triton.next_power_of_2(heads), WIDTH_PADDED=triton.next_power_of_2(width), CODE=code,
        **options(num_warps=4),
    )  # fmt: skip
    return stored
