"""Attention of one new token per sequence to FP8 blocks, split over keys.

For each query head: `softmax(scale * q . k) . v` over the context. Stage 1 takes 256 absolute positions of one
sequence and KV head, 64 at a time, with a running maximum; stage 2 combines the splits in order. K scales multiply
score columns, V scales probability columns, in float32. Where a split begins depends on no batch and no context, so a
row's bits depend on its own sequence only. Source: Flash-Decoding (Dao et al. 2023), section 2; the definition is
`reference.py`. Knows FP8 planes only.
"""

# Triton has no types: its kernels are checked by their tests.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .e4m3 import decode_e4m3_by_256, scale_times_256
from .reference import Planes

SPLIT_TOKENS = 256
TILE_TOKENS = 64


@triton.jit
def _load_rows(payload_ptr, scales_ptr, row, column, seen, WIDTH: tl.constexpr):  # noqa: PLR0917
    """Rows of FP8 as float32 numbers over 256 [tokens, width], and their scales times 256 [tokens]."""
    real = seen[:, None] & (column < WIDTH)[None, :]
    code = tl.load(payload_ptr + row[:, None] * WIDTH + column[None, :], mask=real, other=0)
    byte = tl.load(scales_ptr + row, mask=seen, other=0)
    return decode_e4m3_by_256(code.to(tl.int32)), scale_times_256(byte.to(tl.int32))


@triton.jit
def _operand(x, INTERPRETED: tl.constexpr):
    """What `tl.dot` takes: the interpreter would multiply the bit patterns of bf16, so there it gets exact float32."""
    if INTERPRETED:
        return x.to(tl.float32)
    else:  # noqa: RET505 - the compiler wants both returns at one depth
        return x


@triton.jit
def _attend_split_kernel(  # noqa: PLR0917
    q_ptr, k_payload_ptr, k_scales_ptr, v_payload_ptr, v_scales_ptr, tables_ptr, contexts_ptr,
    out_ptr, top_ptr, total_ptr, score_scale, table_stride, num_splits,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    GROUP_PADDED: tl.constexpr, WIDTH_PADDED: tl.constexpr, SPLIT: tl.constexpr, TILE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Grid: (num_seqs, kv_heads, num_splits). A split past its context writes nothing; stage 2 does not read it."""
    sequence, head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    context = tl.load(contexts_ptr + sequence).to(tl.int32)
    start = split * SPLIT
    if start >= context:
        return
    column = tl.arange(0, WIDTH_PADDED)
    member = tl.arange(0, GROUP_PADDED)
    real = (member < GROUP)[:, None] & (column < WIDTH)[None, :]
    query_head = (sequence * KV_HEADS + head) * GROUP + member
    q = tl.load(q_ptr + query_head[:, None] * WIDTH + column[None, :], mask=real, other=0.0)  # [group, width]

    top = tl.full((GROUP_PADDED,), float("-inf"), tl.float32)
    total = tl.zeros((GROUP_PADDED,), tl.float32)
    out = tl.zeros((GROUP_PADDED, WIDTH_PADDED), tl.float32)
    for tile in range(start, tl.minimum(start + SPLIT, context), TILE):
        position = tile + tl.arange(0, TILE)
        seen = position < context
        block = tl.load(tables_ptr + sequence * table_stride + position // BLOCK_TOKENS, mask=seen, other=0)
        row = (block.to(tl.int64) * KV_HEADS + head) * BLOCK_TOKENS + position % BLOCK_TOKENS

        k, k_scale = _load_rows(k_payload_ptr, k_scales_ptr, row, column, seen, WIDTH)
        k = tl.trans(_operand(k.to(q.dtype), INTERPRETED))
        scores = tl.dot(_operand(q, INTERPRETED), k, input_precision="ieee")
        scores = tl.where(seen[None, :], scores * k_scale[None, :] * score_scale, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(weights, axis=1)

        v, v_scale = _load_rows(v_payload_ptr, v_scales_ptr, row, column, seen, WIDTH)
        weights = weights * v_scale[None, :]
        # A bf16 weight alone would cost 2**-9. Its remainder, also bf16, brings that to 2**-17; v is exact.
        coarse = weights.to(tl.bfloat16)
        fine = (weights - coarse.to(tl.float32)).to(tl.bfloat16)
        v = _operand(v.to(tl.bfloat16), INTERPRETED)
        out = tl.dot(_operand(fine, INTERPRETED), v, out * shrink[:, None], input_precision="ieee")
        out = tl.dot(_operand(coarse, INTERPRETED), v, out, input_precision="ieee")
        top = higher

    part = query_head * num_splits + split
    tl.store(out_ptr + part[:, None] * WIDTH + column[None, :], out, mask=real)
    tl.store(top_ptr + part, top, mask=member < GROUP)
    tl.store(total_ptr + part, total, mask=member < GROUP)


@triton.jit
def _combine_splits_kernel(  # noqa: PLR0917
    parts_ptr, top_ptr, total_ptr, contexts_ptr, out_ptr, num_splits,
    Q_HEADS: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PADDED: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Grid: (num_seqs, q_heads). First split to last; an empty context gives zeros."""
    sequence = tl.program_id(0).to(tl.int64)
    row = sequence * Q_HEADS + tl.program_id(1)
    context = tl.load(contexts_ptr + sequence).to(tl.int32)
    column = tl.arange(0, WIDTH_PADDED)
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    out = tl.zeros((WIDTH_PADDED,), tl.float32)
    for split in range(0, (context + SPLIT - 1) // SPLIT):
        part = row * num_splits + split
        part_top = tl.load(top_ptr + part)
        higher = tl.maximum(top, part_top)
        shrink, share = tl.exp2(top - higher), tl.exp2(part_top - higher)
        total = total * shrink + tl.load(total_ptr + part) * share
        numbers = tl.load(parts_ptr + part * WIDTH + column, mask=column < WIDTH, other=0.0)
        out = out * shrink + numbers * share
        top = higher
    out = out / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + row * WIDTH + column, out.to(out_ptr.dtype.element_ty), mask=column < WIDTH)


def paged_decode_attention(
    q: Tensor, k_planes: Planes, v_planes: Planes, block_tables: Tensor, context_lens: Tensor, *, scale: float
) -> Tensor:
    """Attention of each sequence's newest token to what the FP8 cache holds.

    As `reference.paged_decode_attention`; q contiguous bf16 or float32, block_tables and context_lens int32, their last
    axis dense; contexts never exceed `block_tables.shape[1] * block_tokens`. No synchronisation with the host.

    Raises:
        ValueError: the planes are not contiguous FP8, or shapes and dtypes disagree.
    """
    num_seqs, q_heads, width = q.shape
    _check(q, k_planes, v_planes, block_tables, context_lens)
    kv_heads, block_tokens = k_planes.payload.shape[1:3]
    group = q_heads // kv_heads
    out = torch.empty_like(q)
    if num_seqs == 0:
        return out
    num_splits = max(1, triton.cdiv(block_tables.shape[1] * block_tokens, SPLIT_TOKENS))
    parts = torch.empty((num_seqs, q_heads, num_splits, width), dtype=torch.float32, device=q.device)
    top = torch.empty((num_seqs, q_heads, num_splits), dtype=torch.float32, device=q.device)
    total = torch.empty_like(top)
    width_padded = triton.next_power_of_2(width)
    _attend_split_kernel[(num_seqs, kv_heads, num_splits)](
        q, k_planes.payload, k_planes.scales, v_planes.payload, v_planes.scales, block_tables, context_lens,
        parts, top, total, scale * math.log2(math.e), block_tables.stride(0), num_splits,
        KV_HEADS=kv_heads, GROUP=group, WIDTH=width, BLOCK_TOKENS=block_tokens,
        GROUP_PADDED=max(16, triton.next_power_of_2(group)), WIDTH_PADDED=width_padded,
        SPLIT=SPLIT_TOKENS, TILE=TILE_TOKENS, INTERPRETED=triton.knobs.runtime.interpret,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    _combine_splits_kernel[(num_seqs, q_heads)](
        parts, top, total, context_lens, out, num_splits,
        Q_HEADS=q_heads, WIDTH=width, WIDTH_PADDED=width_padded, SPLIT=SPLIT_TOKENS,
        num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def _check(q: Tensor, k_planes: Planes, v_planes: Planes, block_tables: Tensor, context_lens: Tensor) -> None:
    num_seqs, q_heads, width = q.shape
    if not q.is_contiguous() or q.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"q is {q.dtype}, strides {q.stride()}; must be contiguous bf16 or float32")
    for planes in (k_planes, v_planes):
        if planes.scales is None or planes.payload.shape[-1] != width:
            raise ValueError(f"this kernel reads FP8 rows of {width}; the planes hold {planes.payload.shape[-1]} bytes")
        if not (planes.payload.is_contiguous() and planes.scales.is_contiguous()):
            raise ValueError("the planes must be contiguous")
    if k_planes.payload.shape[1:] != v_planes.payload.shape[1:] or q_heads % k_planes.payload.shape[1]:
        raise ValueError(
            f"{q_heads} query heads, K planes {tuple(k_planes.payload.shape)}, V planes {tuple(v_planes.payload.shape)}"
        )
    for name, tensor, shape in (
        ("block_tables", block_tables, (num_seqs, block_tables.shape[-1])),
        ("context_lens", context_lens, (num_seqs,)),
    ):
        if tensor.dtype != torch.int32 or tensor.shape != shape or tensor.stride(-1) != 1:
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}; must be dense int32 {shape}")
