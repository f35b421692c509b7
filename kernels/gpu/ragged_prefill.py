"""Causal attention of several sequences' chunks, concatenated, to their scratch and their paged prefix.

For each row: `softmax(scale * q . k) . v` over all positions up to its own, or the last `window` of them; scores are
capped if the model has a softcap. A program has `rows` rows: tokens of one sequence times the query heads that share a
KV head. Keys of the prefix are read from FP8 or bf16 blocks, keys of the chunk from the store kernel's scratch, which
holds the same numbers in bf16. Source: FlashAttention-2 (Dao 2023); the definition is `reference_attention.py`.

A row's bits depend on its own sequence only. Keys are summed in tiles of 64 absolute positions, in splits of 256 with a
running maximum each, and splits are combined in order, for any place of the row in a program. A tile that a row does
not see does not change its bits. Scales are powers of two, so a key from a block and a key from scratch give the same
bits. Therefore chunking, a cached prefix, batch, table and block size do not change a row, and a chunk of one token is
a decode step. `paged_decode.py` sums in the same order, but with 16 rows: its bits are equal if the tensor core's
instructions for 16 and for 64 rows round alike, which `bench/gpu` reports for the machine it runs on.
"""

# Triton has no types: its kernels are checked by their tests.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gpu import launch
from ..reference import Planes
from ..reference_attention import Chunk
from .attend import (
    SPLIT_TOKENS,
    TILE_TOKENS,
    add_sinks,
    add_values,
    check_attention,
    check_sinks,
    load_scaled,
    numbers_of,
    score_factors,
    weigh_keys,
)
from .byte_codes import code_of


@triton.jit
def _sequence_of(program, starts_ptr, num_seqs, TOKENS: tl.constexpr):
    """The sequence of a program. Sequence s begins at program `starts[s] // TOKENS + s`, so each has enough."""
    low = 0
    high = num_seqs
    while low < high:
        middle = (low + high) // 2
        if tl.load(starts_ptr + middle).to(tl.int32) // TOKENS + middle <= program:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def _load_scratch(chunk_ptr, row, column, seen, WIDTH: tl.constexpr):
    """Load rows of the chunk's keys or values from scratch, bf16 [tokens, width]; zeros where not `seen`."""
    real = seen[:, None] & (column < WIDTH)[None, :]
    numbers = chunk_ptr + row[:, None].to(tl.int64) * WIDTH + column[None, :]
    return tl.load(numbers, mask=real, other=0.0).to(tl.bfloat16)


@triton.jit
def _load_tile(  # noqa: PLR0917
    payload_ptr, scales_ptr, chunk_ptr, row, chunk_row, column, in_prefix, in_chunk,
    WIDTH: tl.constexpr, CODE: tl.constexpr, CASTS: tl.constexpr, BLOCKS: tl.constexpr, SCRATCH: tl.constexpr,
):  # fmt: skip
    """Load keys or values of a tile, bf16 [tokens, width], from blocks (BLOCKS), scratch (SCRATCH) or both."""
    if SCRATCH:
        numbers = _load_scratch(chunk_ptr, chunk_row, column, in_chunk, WIDTH)
        if BLOCKS:
            stored = load_scaled(payload_ptr, scales_ptr, row, column, in_prefix, WIDTH, CODE, CASTS)
            numbers = tl.where(in_chunk[:, None], numbers, stored)
        return numbers
    else:  # noqa: RET505 - the compiler wants both returns at one depth
        return load_scaled(payload_ptr, scales_ptr, row, column, in_prefix, WIDTH, CODE, CASTS)


@triton.jit
def _take_keys(  # noqa: PLR0917
    q, query_position, tile, prefix, context, chunk_start, table_ptr, head, column,
    k_payload_ptr, k_scales_ptr, v_payload_ptr, v_scales_ptr, k_chunk_ptr, v_chunk_ptr,
    top, total, out, score_scale, cap, window,
    KV_HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_TOKENS: tl.constexpr, TILE: tl.constexpr,
    CODE: tl.constexpr, CASTS: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, PRECISE: tl.constexpr,
    INTERPRETED: tl.constexpr, BLOCKS: tl.constexpr, SCRATCH: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Load a tile and add it to the running softmax. BLOCKS, SCRATCH: its sources; not MASKED: all rows see all."""
    position = tile + tl.arange(0, TILE)
    in_prefix, in_chunk = position < prefix, (position >= prefix) & (position < context)
    row = position
    if BLOCKS:
        block = tl.load(table_ptr + position // BLOCK_TOKENS, mask=in_prefix, other=0)
        row = (block * KV_HEADS + head) * BLOCK_TOKENS + position % BLOCK_TOKENS
    chunk_row = (chunk_start + position - prefix) * KV_HEADS + head
    k = _load_tile(
        k_payload_ptr, k_scales_ptr, k_chunk_ptr, row, chunk_row, column, in_prefix, in_chunk,
        WIDTH, CODE, CASTS, BLOCKS, SCRATCH,
    )  # fmt: skip
    # Values are loaded before the scores: a tile from both sources would not fit the registers beside the weights.
    v = _load_tile(
        v_payload_ptr, v_scales_ptr, v_chunk_ptr, row, chunk_row, column, in_prefix, in_chunk,
        WIDTH, CODE, CASTS, BLOCKS, SCRATCH,
    )  # fmt: skip
    seen = position[None, :] <= query_position[:, None]
    if WINDOWED:
        seen = seen & (position[None, :] > query_position[:, None] - window)
    one = tl.full((TILE,), 1.0, tl.float32)
    weights, top, total, out = weigh_keys(
        q, k, one, seen, top, total, out, score_scale, cap, MASKED, CAPPED, INTERPRETED
    )
    return top, total, add_values(weights, v, one, out, PRECISE, INTERPRETED)


@triton.jit
def _nothing(ROWS: tl.constexpr, WIDTH_PADDED: tl.constexpr):
    """Running maximum, sum and values before the first key."""
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    return top, tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS, WIDTH_PADDED), tl.float32)


@triton.jit
def _combine(top_all, total_all, out_all, top, total, out):  # noqa: PLR0917
    """Combine the splits so far with the next one."""
    higher = tl.maximum(top_all, top)
    base = tl.where(higher == float("-inf"), 0.0, higher)
    shrink, share = tl.exp2(top_all - base), tl.exp2(top - base)
    return higher, total_all * shrink + total * share, out_all * shrink[:, None] + out * share[:, None]


@triton.jit(do_not_specialize=["num_seqs", "window", "table_stride"])
def _attend_chunks_kernel(  # noqa: PLR0917
    q_ptr, k_chunk_ptr, v_chunk_ptr, k_payload_ptr, k_scales_ptr, v_payload_ptr, v_scales_ptr,
    tables_ptr, contexts_ptr, starts_ptr, sinks_ptr, out_ptr, score_scale, cap, window, table_stride, num_seqs,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    ROWS: tl.constexpr, WIDTH_PADDED: tl.constexpr, SPLIT: tl.constexpr, TILE: tl.constexpr,
    CODE: tl.constexpr, CASTS: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, PRECISE: tl.constexpr,
    SCRATCH: tl.constexpr, SINKS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Grid: (num_tokens // TOKENS + num_seqs, kv_heads), TOKENS = ROWS // GROUP. Some programs have no token."""
    TOKENS: tl.constexpr = ROWS // GROUP
    # Last rows first: they see the most keys, and the longest programs must not start last.
    program, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    sequence = _sequence_of(program, starts_ptr, num_seqs, TOKENS)
    start = tl.load(starts_ptr + sequence).to(tl.int32)
    count = tl.load(starts_ptr + sequence + 1).to(tl.int32) - start
    first = (program - start // TOKENS - sequence) * TOKENS  # token of the chunk
    if first >= count:
        return
    context = tl.load(contexts_ptr + sequence).to(tl.int32)
    before = context - count  # positions before the chunk
    prefix = before if SCRATCH else context  # positions that are read from blocks
    member = tl.arange(0, ROWS)
    token = first + member // GROUP
    column = tl.arange(0, WIDTH_PADDED)
    owned = (token < count) & (member < TOKENS * GROUP)
    real = owned[:, None] & (column < WIDTH)[None, :]
    query_row = ((start + token) * KV_HEADS + head) * GROUP + member % GROUP
    q_numbers = q_ptr + query_row[:, None].to(tl.int64) * WIDTH + column[None, :]
    q = tl.load(q_numbers, mask=real, other=0.0)  # [rows, width]
    query_position = before + tl.minimum(token, count - 1)
    end = tl.minimum(before + first + TOKENS, context)  # the last row sees the positions before this
    begin = 0
    if WINDOWED:
        begin = tl.maximum(before + first + 1 - window, 0) // TILE * TILE
    table_ptr = tables_ptr + tl.cast(sequence, tl.int64) * table_stride

    # [begin, whole) is in blocks; then, with SCRATCH, at most one tile is in both, and the rest is in scratch.
    whole = end
    if SCRATCH:
        whole = tl.maximum(begin, prefix // TILE * TILE)
    top_all, total_all, out_all = _nothing(ROWS, WIDTH_PADDED)
    top, total, out = _nothing(ROWS, WIDTH_PADDED)
    for tile in range(begin, whole, TILE):
        if (tile % SPLIT == 0) & (tile > begin):
            top_all, total_all, out_all = _combine(top_all, total_all, out_all, top, total, out)
            top, total, out = _nothing(ROWS, WIDTH_PADDED)
        top, total, out = _take_keys(
            q, query_position, tile, prefix, context, start, table_ptr, head, column,
            k_payload_ptr, k_scales_ptr, v_payload_ptr, v_scales_ptr, k_chunk_ptr, v_chunk_ptr,
            top, total, out, score_scale, cap, window, KV_HEADS, WIDTH, BLOCK_TOKENS, TILE,
            CODE, CASTS, WINDOWED, CAPPED, PRECISE, INTERPRETED, True, False, WINDOWED or not SCRATCH,
        )  # fmt: skip
    if SCRATCH:
        across = whole + TILE if whole < prefix else whole
        for tile in tl.range(whole, across, TILE, num_stages=1):  # once or not at all; a branch would spill
            if (tile % SPLIT == 0) & (tile > begin):
                top_all, total_all, out_all = _combine(top_all, total_all, out_all, top, total, out)
                top, total, out = _nothing(ROWS, WIDTH_PADDED)
            top, total, out = _take_keys(
                q, query_position, tile, prefix, context, start, table_ptr, head, column,
                k_payload_ptr, k_scales_ptr, v_payload_ptr, v_scales_ptr, k_chunk_ptr, v_chunk_ptr,
                top, total, out, score_scale, cap, window, KV_HEADS, WIDTH, BLOCK_TOKENS, TILE,
                CODE, CASTS, WINDOWED, CAPPED, PRECISE, INTERPRETED, True, True, True,
            )  # fmt: skip
        for tile in range(across, end, TILE):
            if (tile % SPLIT == 0) & (tile > begin):
                top_all, total_all, out_all = _combine(top_all, total_all, out_all, top, total, out)
                top, total, out = _nothing(ROWS, WIDTH_PADDED)
            top, total, out = _take_keys(
                q, query_position, tile, prefix, context, start, table_ptr, head, column,
                k_payload_ptr, k_scales_ptr, v_payload_ptr, v_scales_ptr, k_chunk_ptr, v_chunk_ptr,
                top, total, out, score_scale, cap, window, KV_HEADS, WIDTH, BLOCK_TOKENS, TILE,
                CODE, CASTS, WINDOWED, CAPPED, PRECISE, INTERPRETED, False, True, True,
            )  # fmt: skip
    top_all, total_all, out_all = _combine(top_all, total_all, out_all, top, total, out)
    if SINKS:
        query_head = head * GROUP + member % GROUP
        total_all, out_all = add_sinks(sinks_ptr, query_head, member < TOKENS * GROUP, top_all, total_all, out_all)
    out_all = out_all / tl.where(total_all == 0.0, 1.0, total_all)[:, None]
    # Compute rows and masks again, from a volatile load, so that they do not occupy registers during the loops.
    start = tl.load(starts_ptr + sequence, volatile=True).to(tl.int32)
    first = (program - start // TOKENS - sequence) * TOKENS
    token = first + member // GROUP
    real = ((token < count) & (member < TOKENS * GROUP))[:, None] & (column < WIDTH)[None, :]
    query_row = ((start + token) * KV_HEADS + head) * GROUP + member % GROUP
    target = out_ptr + query_row[:, None].to(tl.int64) * WIDTH + column[None, :]
    tl.store(target, out_all.to(out_ptr.dtype.element_ty), mask=real)


def ragged_prefill_attention(
    q: Tensor, k_planes: Planes, v_planes: Planes, block_tables: Tensor, context_lens: Tensor, *,
    query_starts: Tensor, scale: float, window: int | None = None, softcap: float | None = None,
    sinks: Tensor | None = None, chunk: Chunk | None = None, precise: bool = True,
) -> Tensor:  # fmt: skip
    """`reference_attention.ragged_prefill_attention`; with `chunk`, keys and values of the chunk are read from there.

    q contiguous bf16 or float32; block_tables, context_lens and query_starts int32, their last axis dense; chunk
    contiguous, bf16 or float32. `precise` costs 1.5 times the products and reduces the error of probabilities from
    2**-9 to 2**-17; decode always does so, and equal bits require it. No synchronisation with the host.

    Raises:
        ValueError: the planes are not contiguous FP8 or bf16, or shapes and dtypes disagree.
    """
    num_tokens, q_heads, width = q.shape
    num_seqs = len(context_lens)
    check_attention(q, k_planes, v_planes, block_tables, context_lens)
    kv_heads, block_tokens = k_planes.payload.shape[1:3]
    check_sinks(sinks, q_heads)
    _check(query_starts, num_seqs, chunk, (num_tokens, kv_heads, width))
    group, code = q_heads // kv_heads, code_of(k_planes)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if num_tokens == 0:
        return out
    width_padded = max(16, triton.next_power_of_2(width))
    arch = launch.architecture(q.device)
    config = launch.prefill(arch, width_padded, group)
    k, v = numbers_of(k_planes), numbers_of(v_planes)
    _attend_chunks_kernel[(num_tokens // (config.rows // group) + num_seqs, kv_heads)](
        q, k if chunk is None else chunk.k, v if chunk is None else chunk.v,
        k, k_planes.scales if code else k, v, v_planes.scales if code else v,
        block_tables, context_lens, query_starts, context_lens if sinks is None else sinks, out,
        *score_factors(scale, softcap), window or 0, block_tables.stride(0), num_seqs,
        KV_HEADS=kv_heads, GROUP=group, WIDTH=width, BLOCK_TOKENS=block_tokens,
        ROWS=config.rows, WIDTH_PADDED=width_padded, SPLIT=SPLIT_TOKENS, TILE=TILE_TOKENS,
        CODE=code, CASTS=launch.casts_fp8(arch), WINDOWED=window is not None, CAPPED=softcap is not None,
        PRECISE=precise, SCRATCH=chunk is not None, SINKS=sinks is not None, INTERPRETED=launch.interpreted(),
        **launch.options(config.num_warps, config.num_stages),
    )  # fmt: skip
    return out


def _check(query_starts: Tensor, num_seqs: int, chunk: Chunk | None, shape: tuple[int, int, int]) -> None:
    if query_starts.dtype != torch.int32 or query_starts.shape != (num_seqs + 1,) or not query_starts.is_contiguous():
        raise ValueError(
            f"query_starts is {query_starts.dtype} {tuple(query_starts.shape)}; must be dense int32 ({num_seqs + 1},)"
        )
    for name, rows in () if chunk is None else (("k", chunk.k), ("v", chunk.v)):
        if rows.shape != shape or not rows.is_contiguous() or rows.dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(f"the chunk's {name} is {rows.dtype} {tuple(rows.shape)}; must be contiguous {shape}")
