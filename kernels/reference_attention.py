"""Definition of attention to a paged cache in plain torch; tests compare both attention kernels with it.

The terms are those of `reference.py`. Arithmetic is float32; results have the dtype of the queries.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .reference import Planes, decode_rows

KEY_TILE = 64  # absolute positions that attention sums together; every block size divides it
QUERY_TILE = 16


class Chunk(NamedTuple):
    """Keys and values of a step's own tokens as the store returned them, rounded as in the cache."""

    k: Tensor  # [num_tokens, kv_heads, width]
    v: Tensor  # [num_tokens, kv_heads, width]


def paged_decode_attention(
    q: Tensor,
    k_planes: Planes,
    v_planes: Planes,
    block_tables: Tensor,
    context_lens: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of each sequence's newest token to the cache.

    q [num_seqs, q_heads, width] with q_heads a multiple of the planes' heads (head h reads KV head h // group);
    block_tables [num_seqs, max_blocks] integer block ids, of which the first ceil(context / block_tokens) are read;
    context_lens [num_seqs] counts the newest token, which is already stored; 0 is padding and gives zeros.
    `window`: a query at position p sees the keys p - window < j <= p only. `softcap`: scores become
    `softcap * tanh(scores / softcap)` (Gemma 2, 2024). `sinks` [q_heads] float32: a score of each head that takes part
    in its rows' softmax without a value, neither scaled nor capped (gpt-oss, 2025; Xiao et al. 2023).
    Returns [num_seqs, q_heads, width] in q's dtype. Bytes beyond a context do not affect the result.

    The result of a row depends on its own sequence only, bit for bit: keys are summed in order by tiles of 64 absolute
    positions, queries are in tiles of 16 absolute positions, and the shape of tiles does not depend on the batch.
    Prefill and decode share it. K scales multiply score columns and V scales probability columns.
    Source: paged attention, Kwon et al. 2023; splits over keys, Flash-Decoding (Dao et al. 2023).
    """
    rules = _Rules(scale, window, softcap, sinks)
    contexts = context_lens.to(torch.int64)
    rows = (contexts - 1).clamp(min=0) % QUERY_TILE
    tile = q.new_zeros((q.shape[0], QUERY_TILE, q.shape[1], q.shape[2]), dtype=torch.float32)
    tile[torch.arange(q.shape[0], device=q.device), rows] = q.float()
    longest = int(contexts.max()) if len(contexts) else 0
    keys, values = (_key_tiles(p, block_tables, contexts, longest, q.shape[-1]) for p in (k_planes, v_planes))
    out = _attend(_QueryTiles(tile, (contexts - 1).clamp(min=0) - rows, contexts), keys, values, rules)
    return out[torch.arange(q.shape[0], device=q.device), rows].to(q.dtype)


def ragged_prefill_attention(
    q: Tensor,
    k_planes: Planes,
    v_planes: Planes,
    block_tables: Tensor,
    context_lens: Tensor,
    *,
    query_starts: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    chunk: Chunk | None = None,
    precise: bool = True,
) -> Tensor:
    """Causal attention of several sequences' newest chunks, concatenated in q, to the cache.

    q [num_tokens, q_heads, width]; query_starts [num_seqs + 1] from 0 to num_tokens; the queries of sequence s are the
    last `query_starts[s + 1] - query_starts[s]` of its context_lens[s] positions, all stored already. A chunk of one
    token is a decode step. Everything else, bits included, is as in `paged_decode_attention`, for any division of a
    prompt into chunks.

    `chunk`: the same tokens' keys and values as the store returned them, equal to the cache's: a kernel may read them
    instead. `precise=False` lets a kernel round probabilities to bf16 before multiplying values.
    """
    del chunk, precise  # the definition reads the cache, in float32
    rules = _Rules(scale, window, softcap, sinks)
    out = torch.empty_like(q)
    starts = query_starts.tolist()
    for s, context in enumerate(context_lens.tolist()):
        first, last = starts[s], starts[s + 1]
        if first == last:
            continue
        contexts = context_lens[s : s + 1].to(torch.int64)
        keys, values = (
            _key_tiles(p, block_tables[s : s + 1], contexts, context, q.shape[-1]) for p in (k_planes, v_planes)
        )
        position, token = context - (last - first), first
        while token < last:
            row = position % QUERY_TILE
            count = min(QUERY_TILE - row, last - token)
            tile = q.new_zeros((1, QUERY_TILE, q.shape[1], q.shape[2]), dtype=torch.float32)
            tile[0, row : row + count] = q[token : token + count].float()
            seen = (position + count - 1) // KEY_TILE + 1
            queries = _QueryTiles(tile, contexts.new_full((1,), position - row), contexts)
            done = _attend(queries, keys.first(seen), values.first(seen), rules)
            out[token : token + count] = done[0, row : row + count].to(q.dtype)
            position, token = position + count, token + count
    return out


class _Rules(NamedTuple):
    scale: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None  # [q_heads]


class _QueryTiles(NamedTuple):
    numbers: Tensor  # [n, QUERY_TILE, q_heads, width] float32, zeros where there is no query
    first_positions: Tensor  # [n] int64, multiples of QUERY_TILE
    contexts: Tensor  # [n] int64


class _KeyTiles(NamedTuple):
    numbers: Tensor  # [n, tiles, kv_heads, KEY_TILE, width] float32 before scaling, zeros beyond the context
    scales: Tensor | None  # [n, tiles, kv_heads, KEY_TILE] float32

    def first(self, tiles: int) -> "_KeyTiles":
        return _KeyTiles(self.numbers[:, :tiles], None if self.scales is None else self.scales[:, :tiles])


def _key_tiles(planes: Planes, block_tables: Tensor, contexts: Tensor, longest: int, width: int) -> _KeyTiles:
    """The first `longest` tokens of each sequence, in tiles of absolute position."""
    num_tiles = max(1, -(-longest // KEY_TILE))
    tables = block_tables[:, : -(-longest // planes.block_tokens)].long()
    missing = num_tiles * KEY_TILE // planes.block_tokens - tables.shape[1]
    tables = torch.nn.functional.pad(tables, (0, missing))
    positions = torch.arange(num_tiles * KEY_TILE, device=tables.device).view(num_tiles, 1, KEY_TILE)
    beyond = positions >= contexts.view(-1, 1, 1, 1)  # [n, tiles, 1, KEY_TILE]
    # Table entries past the context are arbitrary: gather block 0 there; its numbers are masked.
    first_positions = torch.arange(tables.shape[1], device=tables.device) * planes.block_tokens
    tables = tables.masked_fill(first_positions >= contexts.view(-1, 1), 0)

    def tiled(plane: Tensor) -> Tensor:
        gathered = plane[tables]  # [n, blocks, kv_heads, block_tokens, ...]
        heads, rest = gathered.shape[2], gathered.shape[4:]
        parts = gathered.view(
            len(tables), num_tiles, KEY_TILE // planes.block_tokens, heads, planes.block_tokens, *rest
        ).transpose(2, 3)
        return parts.reshape(len(tables), num_tiles, heads, KEY_TILE, *rest)

    raw = Planes(tiled(planes.payload), None if planes.scales is None else tiled(planes.scales), planes.code)
    numbers, scales = decode_rows(raw, width)
    return _KeyTiles(
        numbers.masked_fill(beyond.unsqueeze(-1), 0.0), None if scales is None else scales.masked_fill(beyond, 1.0)
    )


def _attend(queries: _QueryTiles, keys: _KeyTiles, values: _KeyTiles, rules: _Rules) -> Tensor:
    """Softmax attention of query tiles to key tiles; [n, QUERY_TILE, q_heads, width] float32."""
    n, num_tiles, heads, _, width = keys.numbers.shape
    device, group = keys.numbers.device, queries.numbers.shape[2] // heads
    rows = queries.numbers.view(n, QUERY_TILE, heads, group, width).transpose(1, 2)
    rows = rows.reshape(n, 1, heads, QUERY_TILE * group, width)
    scores = torch.matmul(rows, keys.numbers.transpose(-1, -2))  # [n, tiles, heads, rows, KEY_TILE]
    if keys.scales is not None:
        scores *= keys.scales.unsqueeze(-2)
    key_positions = torch.arange(num_tiles * KEY_TILE, device=device).view(num_tiles, 1, 1, KEY_TILE)
    row_positions = torch.arange(QUERY_TILE, device=device).repeat_interleave(group).view(-1, 1)
    row_positions = queries.first_positions.view(n, 1, 1, 1, 1) + row_positions
    hidden = (key_positions > row_positions) | (key_positions >= queries.contexts.view(n, 1, 1, 1, 1))
    if rules.window is not None:
        hidden |= key_positions <= row_positions - rules.window
    scores = scores * rules.scale
    if rules.softcap is not None:
        scores = torch.tanh(scores / rules.softcap) * rules.softcap
    scores = scores.masked_fill(hidden, -torch.inf)
    # The maximum does not depend on order. Sums over tiles are taken in tile order, where absent tiles add 0.
    top = scores.amax(dim=(1, 4), keepdim=True).clamp(min=torch.finfo(torch.float32).min)  # [n, 1, heads, rows, 1]
    if rules.sinks is not None:
        sinks = rules.sinks.view(heads, 1, group).expand(heads, QUERY_TILE, group).reshape(1, 1, heads, -1, 1)
        top = torch.maximum(top, sinks)
    weights = torch.exp(scores - top)
    total = _sum_in_order(weights.sum(-1, keepdim=True))
    if rules.sinks is not None:
        total = total + torch.exp(sinks - top)[:, 0]
    if values.scales is not None:
        weights *= values.scales.unsqueeze(-2)
    out = _sum_in_order(torch.matmul(weights, values.numbers)) / total.masked_fill(total == 0, 1.0)
    return out.view(n, heads, QUERY_TILE, group, width).transpose(1, 2).reshape(n, QUERY_TILE, heads * group, width)


def _sum_in_order(parts: Tensor) -> Tensor:
    """Sum over axis 1, first to last."""
    total = parts[:, 0].clone()
    for tile in range(1, parts.shape[1]):
        total += parts[:, tile]
    return total
