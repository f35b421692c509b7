"""Paged causal attention on CPU whose bits depend on nothing but a token's own prefix.

Every query row sees its keys in tiles of `KV_TILE` positions that begin at fixed absolute positions. Scores of all
tiles come first, then the row's maximum (exact in any order), then weights and sums tile by tile in order of position:

    m = max_j s_j      l = sum_tiles sum_in_tile exp(s_j - m)      o = sum_tiles (exp(s - m) @ v) / l

A tile that a row cannot see adds exact zeros, so a decode step (one row), a chunk and a whole prompt give the same
bits. All products go through `products.py`; everything else is element by element in float32. Values of positions that
hold no token are zeroed before use, whatever the cache holds there.
Source: softmax by tiles as in FlashAttention (Dao et al. 2022), with the maximum taken first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.reference import Planes, decode_rows
from .products import TILE_ROWS, Product, padded

KV_TILE = 256
_SLAB_ROWS = 512  # rows of one prompt whose scores are held at once

_NEGATIVE = float("-inf")
_SIGN_AND_MAGNITUDE = 0x87F00000 - (1 << 32)


@dataclass(frozen=True, slots=True)
class Span:
    """Rows of one sequence in a step: `count` queries from batch row `row`, the first at position `start`."""

    row: int
    start: int
    count: int
    blocks: Tensor  # [ceil(tiles * KV_TILE / block_tokens)] int64: physical blocks; entries past the end are any block

    @property
    def end(self) -> int:
        """Tokens in the cache once the step has stored its own."""
        return self.start + self.count

    @property
    def num_tiles(self) -> int:
        """KV tiles that the last query sees."""
        return -(-self.end // KV_TILE)


@dataclass(frozen=True, slots=True)
class Narrow:
    """Short spans (decodes above all) of a step laid out as pairs (span, KV tile), for products in batches.

    Spans stand by falling number of tiles and pairs tile-major, so that the pairs of tile j are those of the first
    `per_tile[j]` spans: ranges instead of indices.
    """

    rows: Tensor  # [num_spans, queries] int64: batch rows of the longest span's queries, last ones repeated as padding
    per_tile: tuple[int, ...]
    pair_span: Tensor  # [num_pairs] int64
    head_rows: Tensor  # [num_pairs, kv_heads, blocks_per_tile] int64, see `_head_rows`
    hidden: Tensor  # [num_pairs, 1, queries * group, KV_TILE] bool: positions the row must not see
    tails: tuple[tuple[int, int], ...]  # (pair, tokens in it) of each span's last tile


@dataclass(frozen=True, slots=True)
class AttentionLayout:
    """A step's spans, each either long (a prompt's chunk, computed by itself) or one of the narrow."""

    wide: tuple[Span, ...]
    narrow: Narrow | None


class Attention:
    """Attention for one model shape; `lay_out` once per step, then a call per layer."""

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        self.num_kv_heads = num_kv_heads
        self.group = num_heads // num_kv_heads
        self.head_dim = head_dim
        self.queries_per_tile = TILE_ROWS // self.group  # 0: groups too large for a tile, every span is wide
        self.scores = Product(head_dim, KV_TILE, torch.float32, transposed=True)
        self.mix = Product(KV_TILE, head_dim, torch.float32, transposed=False)

    def lay_out(self, spans: list[Span], block_tokens: int) -> AttentionLayout:
        """Sort a step's spans into wide and narrow ones."""
        wide = tuple(span for span in spans if span.count > self.queries_per_tile)
        narrow = sorted((s for s in spans if s.count <= self.queries_per_tile), key=lambda s: -s.num_tiles)
        return AttentionLayout(wide, self._lay_out_narrow(narrow, block_tokens) if narrow else None)

    def _lay_out_narrow(self, spans: list[Span], block_tokens: int) -> Narrow:
        tiles = [span.num_tiles for span in spans]
        per_tile = tuple(sum(n > j for n in tiles) for j in range(tiles[0]))
        pair_span = torch.cat([torch.arange(n) for n in per_tile])
        pair_tile = torch.repeat_interleave(torch.arange(len(per_tile)), torch.tensor(per_tile))
        blocks_per_tile = KV_TILE // block_tokens
        blocks = torch.stack(
            [
                spans[s].blocks[j * blocks_per_tile : (j + 1) * blocks_per_tile]
                for j, n in enumerate(per_tile)
                for s in range(n)
            ]
        )
        query = torch.arange(max(span.count for span in spans))
        last = torch.tensor([span.count - 1 for span in spans]).unsqueeze(1)
        offset = torch.minimum(query, last)  # [num_spans, queries]
        rows = torch.tensor([span.row for span in spans]).unsqueeze(1) + offset
        positions = torch.tensor([span.start for span in spans]).unsqueeze(1) + offset
        row_position = positions.repeat_interleave(self.group, dim=1)
        column = pair_tile.unsqueeze(1) * KV_TILE + torch.arange(KV_TILE)
        hidden = column[:, None, None, :] > row_position[pair_span][:, None, :, None]
        first_pair = [sum(per_tile[:j]) for j in range(len(per_tile))]
        tails = tuple((first_pair[n - 1] + i, spans[i].end - (n - 1) * KV_TILE) for i, n in enumerate(tiles))
        return Narrow(rows, per_tile, pair_span, _head_rows(blocks, self.num_kv_heads), hidden, tails)

    def __call__(self, q: Tensor, k_planes: Planes, v_planes: Planes, layout: AttentionLayout) -> Tensor:
        """Attend with q [rows, heads, head_dim], whose keys and values are already stored; [rows, heads, head_dim]."""
        scaled = q.float() * self.head_dim**-0.5
        out = torch.zeros_like(scaled)
        for span in layout.wide:
            self._attend_wide(scaled, k_planes, v_planes, span, out)
        if layout.narrow is not None:
            self._attend_narrow(scaled, k_planes, v_planes, layout.narrow, out)
        return out.to(q.dtype)

    def _attend_wide(self, q: Tensor, k_planes: Planes, v_planes: Planes, span: Span, out: Tensor) -> None:
        head_rows = _head_rows(span.blocks.unsqueeze(0), self.num_kv_heads)
        keys = _tiles(k_planes, head_rows, self.head_dim)[0]  # [kv_heads, tokens, head_dim]
        values = _tiles(v_planes, head_rows, self.head_dim)[0]
        values[:, span.end :] = 0.0
        per_slab = _SLAB_ROWS // self.group
        for first in range(0, span.count, per_slab):
            count = min(per_slab, span.count - first)
            rows = slice(span.row + first, span.row + first + count)
            start = span.start + first
            hidden_from = start // KV_TILE  # tiles before it are seen whole by every row
            num_tiles = (start + count - 1) // KV_TILE + 1
            positions = torch.arange(start, start + count).repeat_interleave(self.group)
            spare = padded(len(positions)) - len(positions)
            positions = torch.cat((positions, positions[-1:].expand(spare)))
            column = torch.arange(hidden_from * KV_TILE, num_tiles * KV_TILE).view(-1, 1, KV_TILE)
            hidden = column > positions.view(1, -1, 1)
            for head in range(self.num_kv_heads):
                heads = slice(head * self.group, (head + 1) * self.group)
                queries = q[rows, heads].reshape(-1, self.head_dim)
                queries = torch.cat((queries, queries.new_zeros(spare, self.head_dim)))
                mixed = self._slab(queries, keys[head], values[head], hidden, num_tiles)
                out[rows, heads] = mixed[: count * self.group].view(count, self.group, self.head_dim)

    def _slab(self, queries: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, num_tiles: int) -> Tensor:
        """Attention of some rows [rows, head_dim] of one KV head; `hidden` [last tiles, rows, KV_TILE]."""
        tiles = [slice(j * KV_TILE, (j + 1) * KV_TILE) for j in range(num_tiles)]
        scores = queries.new_empty(num_tiles, len(queries), KV_TILE)
        for j, tile in enumerate(tiles):
            self.scores.rows(queries, keys[tile].t(), scores[j])
        scores[num_tiles - len(hidden) :].masked_fill_(hidden, _NEGATIVE)
        largest = scores.amax(-1).amax(0)
        weights = torch.exp(scores.sub_(largest.view(1, -1, 1)), out=scores)
        sums = weights.sum(-1)
        total, mixed = sums[0], self.mix.rows(weights[0], values[tiles[0]])
        for j in range(1, num_tiles):
            total = total + sums[j]
            mixed = mixed + self.mix.rows(weights[j], values[tiles[j]])
        return (mixed + 0.0) / total.unsqueeze(-1)  # + 0.0: a negative zero must not tell whether a blank tile came

    def _attend_narrow(self, q: Tensor, k_planes: Planes, v_planes: Planes, narrow: Narrow, out: Tensor) -> None:
        num_spans, queries = narrow.rows.shape
        used, kv_heads, width = queries * self.group, self.num_kv_heads, self.head_dim
        pairs = len(narrow.pair_span)
        taken = q.index_select(0, narrow.rows.flatten()).view(num_spans, queries, kv_heads, self.group, width)
        tiles = q.new_zeros(num_spans, kv_heads, TILE_ROWS, width)
        tiles[:, :, :used] = taken.transpose(1, 2).reshape(num_spans, kv_heads, used, width)
        keys = _tiles(k_planes, narrow.head_rows, width)  # [pairs, kv_heads, KV_TILE, head_dim]
        values = _tiles(v_planes, narrow.head_rows, width)
        for pair, tokens in narrow.tails:
            values[pair, :, tokens:] = 0.0
        queries_of_pairs = tiles.index_select(0, narrow.pair_span).flatten(0, 1)
        whole = self.scores.batch(queries_of_pairs, keys.flatten(0, 1).transpose(1, 2))
        whole = whole.view(pairs, kv_heads, TILE_ROWS, KV_TILE)
        scores = whole[:, :, :used].masked_fill(narrow.hidden, _NEGATIVE)  # the rest of a tile is padding
        ranges = _ranges(narrow.per_tile)
        largest = _fold(torch.maximum, scores.amax(-1), ranges)
        weights = torch.exp(scores.sub_(largest.index_select(0, narrow.pair_span).unsqueeze(-1)), out=scores)
        whole[:, :, :used] = weights
        parts = self.mix.batch(whole.flatten(0, 1), values.flatten(0, 1)).view(pairs, kv_heads, TILE_ROWS, width)
        total = _fold(torch.add, weights.sum(-1), ranges)
        mixed = _fold(torch.add, parts[:, :, :used], ranges)
        result = ((mixed + 0.0) / total.unsqueeze(-1)).view(num_spans, kv_heads, queries, self.group, width)
        # Padding repeats a span's last row, whose result is the same number: writing it twice changes nothing.
        out[narrow.rows.flatten()] = result.transpose(1, 2).reshape(num_spans * queries, kv_heads * self.group, width)


def _ranges(per_tile: tuple[int, ...]) -> list[slice]:
    starts = [sum(per_tile[:j]) for j in range(len(per_tile))]
    return [slice(start, start + n) for start, n in zip(starts, per_tile, strict=True)]


def _fold(combine: Callable[..., Tensor], parts: Tensor, ranges: list[slice]) -> Tensor:
    """Combine the tiles of each span in order of position: parts [num_pairs, ...] to [num_spans, ...]."""
    result = parts[ranges[0]].clone(memory_format=torch.contiguous_format)
    for part in ranges[1:]:
        seen = result[: part.stop - part.start]
        combine(seen, parts[part], out=seen)
    return result


def _head_rows(blocks: Tensor, heads: int) -> Tensor:
    """Where the rows of blocks [n, m] lie in planes seen as [num_blocks * heads, ...]: [n, heads, m] int64."""
    return blocks.unsqueeze(1) * heads + torch.arange(heads).view(1, -1, 1)


def _tiles(planes: Planes, head_rows: Tensor, width: int) -> Tensor:
    """Rows of blocks as float32 [n, heads, m * block_tokens, width], a copy; see `_head_rows`."""
    shape, picked = (*head_rows.shape[:2], -1), head_rows.flatten()
    row_bytes = planes.payload.shape[-1]
    payload = planes.payload.flatten(0, 1).index_select(0, picked).view(*shape, row_bytes)
    if planes.scales is None:
        return decode_rows(Planes(payload, None), width)[0]
    return _decode_fp8(payload, planes.scales.flatten(0, 1).index_select(0, picked).view(shape))


def _decode_fp8(payload: Tensor, scales: Tensor) -> Tensor:
    """What `kernels.reference.decode_rows` gives, times the scale, forty times faster in eager torch.

    An e4m3 code moved 20 bits up is a float32 whose exponent is 120 too low. (The NaN codes, which the store never
    writes, become 480.)
    """
    bits = payload.view(torch.int8).to(torch.int32).bitwise_left_shift_(20).bitwise_and_(_SIGN_AND_MAGNITUDE)
    scale = (scales.to(torch.int32) << 23).view(torch.float32)
    return bits.view(torch.float32).mul_(2.0**120).mul_(scale.unsqueeze(-1))
