"""Attention of one new token per sequence to FP8 or bf16 blocks, split over keys.

For each query head: `softmax(scale * q . k) . v` over the context or its last `window` positions; scores are capped if
the model has a softcap. Stage 1 computes splits of 256 absolute positions of one sequence and KV head, 64 at a time,
with a running maximum; stage 2 combines the splits in order. K scales multiply score columns, V scales probability
columns, in float32. The beginning of a split does not depend on batch or context, so a row's bits depend on its own
sequence only. Source: Flash-Decoding (Dao et al. 2023), section 2; the definition is `reference_attention.py`.
"""

# Triton has no types: its kernels are checked by their tests.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gpu import launch
from ..reference import Planes
from .attend import (
    SPLIT_TOKENS,
    TILE_TOKENS,
    add_sinks,
    add_values,
    check_attention,
    check_sinks,
    load_stored,
    numbers_of,
    score_factors,
    weigh_keys,
)
from .byte_codes import code_of


@triton.jit(do_not_specialize=["table_stride", "num_splits", "window"])
def _attend_split_kernel(  # noqa: PLR0917
    q_ptr, k_payload_ptr, k_scales_ptr, v_payload_ptr, v_scales_ptr, tables_ptr, contexts_ptr,
    out_ptr, top_ptr, total_ptr, score_scale, cap, window, table_stride, num_splits,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    ROWS: tl.constexpr, WIDTH_PADDED: tl.constexpr, SPLIT: tl.constexpr, TILE: tl.constexpr,
    CODE: tl.constexpr, CASTS: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Grid: (num_seqs, kv_heads, num_splits). Splits outside the context or window write nothing."""
    sequence, head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    context = tl.load(contexts_ptr + sequence).to(tl.int32)
    first = 0
    if WINDOWED:
        first = tl.maximum(context - window, 0)
    start = split * SPLIT
    if (start >= context) | (start + SPLIT <= first):
        return
    column = tl.arange(0, WIDTH_PADDED)
    member = tl.arange(0, ROWS)
    real = (member < GROUP)[:, None] & (column < WIDTH)[None, :]
    query_head = (sequence * KV_HEADS + head) * GROUP + member
    q = tl.load(q_ptr + query_head[:, None] * WIDTH + column[None, :], mask=real, other=0.0)  # [group, width]

    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    out = tl.zeros((ROWS, WIDTH_PADDED), tl.float32)
    for tile in range(tl.maximum(start, first // TILE * TILE), tl.minimum(start + SPLIT, context), TILE):
        position = tile + tl.arange(0, TILE)
        stored = position < context
        block = tl.load(tables_ptr + sequence * table_stride + position // BLOCK_TOKENS, mask=stored, other=0)
        row = (block.to(tl.int64) * KV_HEADS + head) * BLOCK_TOKENS + position % BLOCK_TOKENS
        k, k_scale = load_stored(k_payload_ptr, k_scales_ptr, row, column, stored, WIDTH, CODE, CASTS)
        seen = (stored & (position >= first))[None, :]
        weights, top, total, out = weigh_keys(
            q, k, k_scale, seen, top, total, out, score_scale, cap, True, CAPPED, INTERPRETED
        )
        v, v_scale = load_stored(v_payload_ptr, v_scales_ptr, row, column, stored, WIDTH, CODE, CASTS)
        out = add_values(weights, v, v_scale, out, True, INTERPRETED)

    part = query_head * num_splits + split
    tl.store(out_ptr + part[:, None] * WIDTH + column[None, :], out, mask=real)
    tl.store(top_ptr + part, top, mask=member < GROUP)
    tl.store(total_ptr + part, total, mask=member < GROUP)


@triton.jit(do_not_specialize=["window", "num_splits"])
def _combine_splits_kernel(  # noqa: PLR0917
    parts_ptr, top_ptr, total_ptr, contexts_ptr, sinks_ptr, out_ptr, window, num_splits,
    Q_HEADS: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PADDED: tl.constexpr, SPLIT: tl.constexpr,
    WINDOWED: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Grid: (num_seqs, q_heads). Splits are combined first to last; an empty context gives zeros."""
    sequence = tl.program_id(0).to(tl.int64)
    row = sequence * Q_HEADS + tl.program_id(1)
    context = tl.load(contexts_ptr + sequence).to(tl.int32)
    first = 0
    if WINDOWED:
        first = tl.maximum(context - window, 0) // SPLIT
    column = tl.arange(0, WIDTH_PADDED)
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    out = tl.zeros((WIDTH_PADDED,), tl.float32)
    for split in tl.range(first, (context + SPLIT - 1) // SPLIT, loop_unroll_factor=4):  # so that loads overlap
        part = row * num_splits + split
        part_top = tl.load(top_ptr + part)
        higher = tl.maximum(top, part_top)
        shrink, share = tl.exp2(top - higher), tl.exp2(part_top - higher)
        total = total * shrink + tl.load(total_ptr + part) * share
        numbers = tl.load(parts_ptr + part * WIDTH + column, mask=column < WIDTH, other=0.0)
        out = out * shrink + numbers * share
        top = higher
    if SINKS:
        one = tl.zeros((1,), tl.float32)
        head = tl.program_id(1) + tl.zeros((1,), tl.int32)
        total_row, out_row = add_sinks(sinks_ptr, head, head >= 0, top + one, total + one, out[None, :])
        total, out = tl.sum(total_row), tl.sum(out_row, axis=0)
    out = out / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + row * WIDTH + column, out.to(out_ptr.dtype.element_ty), mask=column < WIDTH)


def paged_decode_attention(
    q: Tensor, k_planes: Planes, v_planes: Planes, block_tables: Tensor, context_lens: Tensor, *,
    scale: float, window: int | None = None, softcap: float | None = None, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention of each sequence's newest token to the FP8 or bf16 cache.

    Defined by `reference_attention.paged_decode_attention`; q contiguous bf16 or float32, block_tables and
    context_lens int32, their last axis dense; contexts never exceed
    `block_tables.shape[1] * block_tokens`. No synchronisation with the host. A row's bits depend on its own sequence
    only, not on other rows or the length of the tables.

    Raises:
        ValueError: the planes are not contiguous FP8 or bf16, or shapes and dtypes disagree.
    """
    num_seqs, q_heads, width = q.shape
    check_attention(q, k_planes, v_planes, block_tables, context_lens)
    check_sinks(sinks, q_heads)
    kv_heads, block_tokens = k_planes.payload.shape[1:3]
    group, code = q_heads // kv_heads, code_of(k_planes)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if num_seqs == 0:
        return out
    num_splits = max(1, triton.cdiv(block_tables.shape[1] * block_tokens, SPLIT_TOKENS))
    parts = torch.empty((num_seqs, q_heads, num_splits, width), dtype=torch.float32, device=q.device)
    top = torch.empty((num_seqs, q_heads, num_splits), dtype=torch.float32, device=q.device)
    total = torch.empty((num_seqs, q_heads, num_splits), dtype=torch.float32, device=q.device)
    width_padded = max(16, triton.next_power_of_2(width))
    arch = launch.architecture(q.device)
    config = launch.decode(arch, width_padded, group)
    k, v = numbers_of(k_planes), numbers_of(v_planes)
    _attend_split_kernel[(num_seqs, kv_heads, num_splits)](
        q, k, k_planes.scales if code else k, v, v_planes.scales if code else v, block_tables, context_lens,
        parts, top, total, *score_factors(scale, softcap), window or 0, block_tables.stride(0), num_splits,
        KV_HEADS=kv_heads, GROUP=group, WIDTH=width, BLOCK_TOKENS=block_tokens,
        ROWS=config.rows, WIDTH_PADDED=width_padded, SPLIT=SPLIT_TOKENS, TILE=TILE_TOKENS,
        CODE=code, CASTS=launch.casts_fp8(arch), WINDOWED=window is not None, CAPPED=softcap is not None,
        INTERPRETED=launch.interpreted(),
        **launch.options(config.num_warps, config.num_stages),
    )  # fmt: skip
    _combine_splits_kernel[(num_seqs, q_heads)](
        parts, top, total, context_lens, total if sinks is None else sinks, out, window or 0, num_splits,
        Q_HEADS=q_heads, WIDTH=width, WIDTH_PADDED=width_padded, SPLIT=SPLIT_TOKENS, WINDOWED=window is not None,
        SINKS=sinks is not None,
        **launch.options(num_warps=1),
    )  # fmt: skip
    return out
