"""Rotate queries and keys, quantise and store keys and values, and digest the stored rows: one pass over q, k and v.

Definition: `reference_kv.py: rotary_store_kv`; bytes, numbers and digests equal the definition's. The digest is
computed from the registers that the payload is written from, so that no change between writing and sealing goes
unnoticed. The caller adds the rows' digests, 64-bit integers, to those of hash blocks.
Knows planes of one byte per number (byte_codes.py) and of bf16.
"""

# Triton has no types: its kernels are checked by their tests.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import Planes
from ..reference_kv import RotaryStored, Rotation, Seal
from .byte_codes import code_of
from .e4m3 import round_to
from .launch import options
from .rows import check_rows, digest_rows, encode_rows, numbers_of, write_rows

_NUMBERS = 2048  # numbers of queries per program


@triton.jit
def _rotated(rows_ptr, cos_ptr, sin_ptr, position, column, real, HALF: tl.constexpr):  # noqa: PLR0917
    """Load rows [rows, width] at the addresses `rows_ptr` [rows, 1], rotate and round to their dtype; float32."""
    x = tl.load(rows_ptr + column[None, :], mask=real, other=0.0).to(tl.float32)
    low, turns = column < HALF, column < 2 * HALF
    partner_column = tl.where(low, column + HALF, column - HALF)
    partner = tl.load(rows_ptr + partner_column[None, :], mask=real & turns[None, :], other=0.0).to(tl.float32)
    angle = position * HALF + tl.where(low, column, column - HALF)
    cos, sin = tl.load(cos_ptr + angle, mask=turns, other=1.0), tl.load(sin_ptr + angle, mask=turns, other=0.0)
    turned = x * cos[None, :] + tl.where(low[None, :], -partner, partner) * sin[None, :]
    return tl.where(turns[None, :], round_to(turned, rows_ptr.dtype.element_ty), x)


@triton.jit
def _turn_queries(  # noqa: PLR0917
    q_ptr, q_out_ptr, cos_ptr, sin_ptr, token, part, position, q_token_stride, q_head_stride,
    Q_HEADS: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr, Q_ROWS: tl.constexpr, WIDTH_PADDED: tl.constexpr,
):  # fmt: skip
    """Rotate query heads [part * Q_ROWS, (part + 1) * Q_ROWS) of one token."""
    head, column = part * Q_ROWS + tl.arange(0, Q_ROWS), tl.arange(0, WIDTH_PADDED)
    real = (head < Q_HEADS)[:, None] & (column < WIDTH)[None, :]
    rows = q_ptr + token * q_token_stride + head[:, None] * q_head_stride
    q = _rotated(rows, cos_ptr, sin_ptr, position, column, real, HALF)
    target = q_out_ptr + (token * Q_HEADS + head[:, None]) * WIDTH + column[None, :]
    tl.store(target, q.to(q_out_ptr.dtype.element_ty), mask=real)


@triton.jit
def _finish_rows(  # noqa: PLR0917
    x, payload_ptr, scales_ptr, scratch_ptr, digests_ptr, word_keys_ptr, scale_keys_ptr, seeds_ptr,
    token, slot, position, layer, component, first_head,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_TOKENS: tl.constexpr, WORDS: tl.constexpr,
    HEADS_PADDED: tl.constexpr, WIDTH_PADDED: tl.constexpr, CODE: tl.constexpr,
):  # fmt: skip
    """Store and digest one token's rows of one component; returns the number that are not finite."""
    head = tl.arange(0, HEADS_PADDED)
    column = tl.arange(0, WIDTH_PADDED)
    real = (head < HEADS)[:, None] & (column < WIDTH)[None, :]
    code, byte, rounded, refused = encode_rows(x, CODE)
    scratch = scratch_ptr + (token * HEADS + head[:, None]) * WIDTH + column[None, :]
    tl.store(scratch, rounded.to(scratch_ptr.dtype.element_ty), mask=real)
    write_rows(code, byte, payload_ptr, scales_ptr, slot, head, column, HEADS, WIDTH, BLOCK_TOKENS, CODE)
    digests = digest_rows(
        code, byte, position, layer, component, head + first_head, word_keys_ptr, scale_keys_ptr, seeds_ptr,
        WORDS, HEADS_PADDED, WIDTH_PADDED, CODE,
    )  # fmt: skip
    digests = tl.where(slot >= 0, digests, 0).to(tl.int64, bitcast=True)
    tl.store(digests_ptr + token * HEADS + head, digests, mask=head < HEADS)
    return tl.sum((refused & (head < HEADS)).to(tl.int32), axis=0)


@triton.jit(do_not_specialize=["num_tokens", "layer", "first_head", "k_component", "v_component"])
def _rotary_store_kv_kernel(  # noqa: PLR0917
    q_ptr, k_ptr, v_ptr, slots_ptr, positions_ptr, cos_ptr, sin_ptr,
    k_payload_ptr, k_scales_ptr, v_payload_ptr, v_scales_ptr,
    q_out_ptr, k_scratch_ptr, v_scratch_ptr, non_finite_ptr, digests_ptr,
    word_keys_ptr, scale_keys_ptr, seeds_ptr, num_tokens,
    q_token_stride, q_head_stride, k_token_stride, k_head_stride, v_token_stride, v_head_stride,
    layer, first_head, k_component, v_component,
    Q_HEADS: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, WORDS: tl.constexpr,
    Q_ROWS: tl.constexpr, HEADS_PADDED: tl.constexpr, WIDTH_PADDED: tl.constexpr, CODE: tl.constexpr,
):  # fmt: skip
    """Grid: (num_tokens, 1 + ceil(Q_HEADS / Q_ROWS)). Part 0 has keys and values of a token, other parts queries."""
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    position = tl.load(positions_ptr + token)
    if part > 0:
        _turn_queries(
            q_ptr, q_out_ptr, cos_ptr, sin_ptr, token, part - 1, position, q_token_stride, q_head_stride,
            Q_HEADS, WIDTH, HALF, Q_ROWS, WIDTH_PADDED,
        )  # fmt: skip
    else:
        slot = tl.load(slots_ptr + token)
        head, column = tl.arange(0, HEADS_PADDED), tl.arange(0, WIDTH_PADDED)
        real = (head < HEADS)[:, None] & (column < WIDTH)[None, :]
        rows = k_ptr + token * k_token_stride + head[:, None] * k_head_stride
        k = _rotated(rows, cos_ptr, sin_ptr, position, column, real, HALF)
        bad = _finish_rows(
            k, k_payload_ptr, k_scales_ptr, k_scratch_ptr, digests_ptr, word_keys_ptr, scale_keys_ptr, seeds_ptr,
            token, slot, position, layer, k_component, first_head,
            HEADS, WIDTH, BLOCK_TOKENS, WORDS, HEADS_PADDED, WIDTH_PADDED, CODE,
        )  # fmt: skip
        rows = v_ptr + token * v_token_stride + head[:, None] * v_head_stride
        v = tl.load(rows + column[None, :], mask=real, other=0.0).to(tl.float32)
        v_digests_ptr = digests_ptr + num_tokens.to(tl.int64) * HEADS
        bad += _finish_rows(
            v, v_payload_ptr, v_scales_ptr, v_scratch_ptr, v_digests_ptr, word_keys_ptr, scale_keys_ptr, seeds_ptr,
            token, slot, position, layer, v_component, first_head,
            HEADS, WIDTH, BLOCK_TOKENS, WORDS, HEADS_PADDED, WIDTH_PADDED, CODE,
        )  # fmt: skip
        tl.store(non_finite_ptr + token, tl.where(slot >= 0, bad, 0))


def rotary_store_kv(
    q: Tensor, k: Tensor, v: Tensor, slots: Tensor, rotation: Rotation, *,
    k_planes: Planes, v_planes: Planes, seal: Seal,
) -> RotaryStored:  # fmt: skip
    """`reference_kv.rotary_store_kv` for FP8 or bf16 planes; q, k and v may be parts of a fused projection.

    Raises:
        ValueError: shapes, dtypes or codecs disagree. Nothing was written.
    """
    tokens, heads, width = k.shape
    check_rows(k, v, slots, k_planes, v_planes)
    _check(q, k, rotation, k_planes, seal)
    device = k.device
    out = RotaryStored(
        torch.empty(q.shape, dtype=q.dtype, device=device),
        torch.empty(k.shape, dtype=k.dtype, device=device),
        torch.empty(v.shape, dtype=v.dtype, device=device),
        torch.empty(tokens, dtype=torch.int32, device=device),
        torch.empty((2, tokens, heads), dtype=torch.int64, device=device),
    )
    if tokens == 0:
        return out
    code, padded = code_of(k_planes), max(4, triton.next_power_of_2(width))
    q_rows = max(1, min(triton.next_power_of_2(q.shape[1]), _NUMBERS // padded))
    k_numbers, v_numbers = numbers_of(k_planes), numbers_of(v_planes)
    _rotary_store_kv_kernel[(tokens, 1 + triton.cdiv(q.shape[1], q_rows))](
        q, k, v, slots, rotation.positions, rotation.cos, rotation.sin,
        k_numbers, k_planes.scales if code else k_numbers, v_numbers, v_planes.scales if code else v_numbers,
        out.q, out.k, out.v, out.non_finite, out.digests,
        seal.keys.words, seal.keys.scales, seal.keys.seeds, tokens,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        seal.layer, seal.first_head, seal.k_component, seal.v_component,
        Q_HEADS=q.shape[1], HEADS=heads, WIDTH=width, HALF=rotation.cos.shape[1],
        BLOCK_TOKENS=k_planes.block_tokens, WORDS=seal.keys.words.shape[1],
        Q_ROWS=q_rows, HEADS_PADDED=triton.next_power_of_2(heads), WIDTH_PADDED=padded, CODE=code,
        **options(num_warps=4),
    )  # fmt: skip
    return out


def _check(q: Tensor, k: Tensor, rotation: Rotation, planes: Planes, seal: Seal) -> None:
    if q.dtype != k.dtype or q.shape[::2] != k.shape[::2] or q.stride(-1) != 1:
        raise ValueError(
            f"q is {q.dtype} {tuple(q.shape)}; must fit k, {k.dtype} {tuple(k.shape)}, its last axis dense"
        )
    if rotation.positions.shape != k.shape[:1] or rotation.positions.dtype != torch.int64:
        raise ValueError(
            f"positions is {rotation.positions.dtype} {tuple(rotation.positions.shape)}; must be int64 ({len(k)},)"
        )
    for name, tensor, dtype in (
        ("positions", rotation.positions, torch.int64), ("cos", rotation.cos, torch.float32),
        ("sin", rotation.sin, torch.float32), ("word keys", seal.keys.words, torch.int64),
        ("scale keys", seal.keys.scales, torch.int64), ("seeds", seal.keys.seeds, torch.int64),
    ):  # fmt: skip
        if tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(f"{name} is {tensor.dtype}, strides {tensor.stride()}; must be contiguous {dtype}")
    if rotation.cos.shape != rotation.sin.shape or 2 * rotation.cos.shape[1] > k.shape[2]:
        raise ValueError(
            f"cos is {tuple(rotation.cos.shape)}, sin {tuple(rotation.sin.shape)}; rows are {k.shape[2]} wide"
        )
    if 4 * seal.keys.words.shape[1] not in range(planes.payload.shape[-1], planes.payload.shape[-1] + 4):
        raise ValueError(f"keys for {seal.keys.words.shape[1]} words; a row has {planes.payload.shape[-1]} bytes")
