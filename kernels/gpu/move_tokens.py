"""Copy a token range of a sequence between its blocks and one contiguous buffer, for hand-over, swap and migration.

One launch copies payload and scales of all layers and a range of heads. It copies bytes, so it serves every codec.
Definition: `reference_kv.py: gather_tokens, scatter_tokens`. Knows no digest.
"""

# Triton has no types: its kernels are checked by their tests.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import Planes
from .launch import options

_TOKENS = 16  # per program


@triton.jit(do_not_specialize=["num_blocks", "first_token", "num_tokens", "first_head", "num_heads"])
def _move_tokens_kernel(  # noqa: PLR0917
    payload_ptr, scales_ptr, buffer_ptr, buffer_scales_ptr, table_ptr,
    num_blocks, first_token, num_tokens, first_head, num_heads,
    HEADS: tl.constexpr, BLOCK_TOKENS: tl.constexpr, WORDS: tl.constexpr, WORDS_PADDED: tl.constexpr,
    TOKENS: tl.constexpr, SCALED: tl.constexpr, INTO_STORE: tl.constexpr,
):  # fmt: skip
    """Grid: (ceil(num_tokens / TOKENS), num_heads, layers)."""
    head, layer = tl.program_id(1), tl.program_id(2).to(tl.int64)
    index = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    wanted = index < num_tokens
    position = first_token + index
    block = tl.load(table_ptr + position // BLOCK_TOKENS, mask=wanted, other=0)
    row = ((layer * num_blocks + block) * HEADS + first_head + head) * BLOCK_TOKENS + position % BLOCK_TOKENS
    buffer_row = (layer * num_heads + head) * num_tokens + index
    word = tl.arange(0, WORDS_PADDED)
    real = wanted[:, None] & (word < WORDS)[None, :]
    stored = payload_ptr + row[:, None] * WORDS + word[None, :]
    buffered = buffer_ptr + buffer_row[:, None] * WORDS + word[None, :]
    if INTO_STORE:
        tl.store(stored, tl.load(buffered, mask=real), mask=real)
        if SCALED:
            tl.store(scales_ptr + row, tl.load(buffer_scales_ptr + buffer_row, mask=wanted), mask=wanted)
    else:
        tl.store(buffered, tl.load(stored, mask=real), mask=real)
        if SCALED:
            tl.store(buffer_scales_ptr + buffer_row, tl.load(scales_ptr + row, mask=wanted), mask=wanted)


def gather_tokens(store: Planes, block_table: Tensor, tokens: range, heads: range) -> Planes:
    """`reference_kv.gather_tokens` for a contiguous store.

    Raises:
        ValueError: the ranges or the table do not fit the store.
    """
    layers, row_bytes = store.payload.shape[0], store.payload.shape[-1]
    _check(store, block_table, tokens, heads)
    shape = (layers, len(heads), len(tokens))
    buffer = Planes(
        torch.empty((*shape, row_bytes), dtype=torch.uint8, device=store.payload.device),
        None if store.scales is None else torch.empty(shape, dtype=torch.uint8, device=store.payload.device),
    )
    _move(store, block_table, tokens, heads, buffer, into_store=False)
    return buffer


def scatter_tokens(store: Planes, block_table: Tensor, tokens: range, heads: range, source: Planes) -> None:
    """`reference_kv.scatter_tokens` for a contiguous store and source.

    Raises:
        ValueError: the ranges, the table or the source do not fit the store. Nothing was written.
    """
    _check(store, block_table, tokens, heads)
    expected = (store.payload.shape[0], len(heads), len(tokens), store.payload.shape[-1])
    fits = source.payload.shape == expected and source.payload.is_contiguous()
    if store.scales is not None:
        fits &= source.scales is not None and source.scales.shape == expected[:3] and source.scales.is_contiguous()
    if not fits or (store.scales is None) != (source.scales is None):
        raise ValueError(
            f"the source is {tuple(source.payload.shape)}, scales {source.scales is not None}; "
            f"the ranges ask for contiguous {expected}, scales {store.scales is not None}"
        )
    _move(store, block_table, tokens, heads, source, into_store=True)


def _move(store: Planes, block_table: Tensor, tokens: range, heads: range, buffer: Planes, *, into_store: bool) -> None:
    layers, num_blocks, store_heads, block_tokens, row_bytes = store.payload.shape
    if not layers * len(heads) * len(tokens):
        return
    number = torch.int32 if row_bytes % 4 == 0 else torch.uint8
    payload, rows = store.payload.view(number), buffer.payload.view(number)
    words = payload.shape[-1]
    _move_tokens_kernel[(triton.cdiv(len(tokens), _TOKENS), len(heads), layers)](
        payload, payload if store.scales is None else store.scales,
        rows, rows if buffer.scales is None else buffer.scales, block_table,
        num_blocks, tokens.start, len(tokens), heads.start, len(heads),
        HEADS=store_heads, BLOCK_TOKENS=block_tokens, WORDS=words, WORDS_PADDED=triton.next_power_of_2(words),
        TOKENS=_TOKENS, SCALED=store.scales is not None, INTO_STORE=into_store, **options(num_warps=4),
    )  # fmt: skip


def _check(store: Planes, block_table: Tensor, tokens: range, heads: range) -> None:
    block_tokens, store_heads = store.payload.shape[3], store.payload.shape[2]
    if not store.payload.is_contiguous() or not (store.scales is None or store.scales.is_contiguous()):
        raise ValueError("the store must be contiguous")
    if block_table.dtype != torch.int64 or block_table.ndim != 1 or not block_table.is_contiguous():
        raise ValueError(f"block_table is {block_table.dtype} {tuple(block_table.shape)}; must be contiguous int64 [n]")
    if tokens.step != 1 or tokens.start < 0 or tokens.stop > len(block_table) * block_tokens:
        raise ValueError(f"{tokens} does not lie in {len(block_table)} blocks of {block_tokens} tokens")
    if heads.step != 1 or heads.start < 0 or heads.stop > store_heads:
        raise ValueError(f"{heads} does not lie in {store_heads} heads")
