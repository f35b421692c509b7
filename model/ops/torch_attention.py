"""Paged causal attention in torch. The bits of a token's result depend on its own prefix only. Knows planes, no model.

Every query row reads its keys in tiles of `KV_TILE` positions that begin at fixed absolute positions. Scores of all
tiles come first, then the row's maximum (exact in any order), then weights and sums tile by tile in order of position:

    m = max_j s_j      l = sum_tiles sum_in_tile exp(s_j - m)      o = sum_tiles (exp(s - m) @ v) / l

With a sink s of the head, m = max(m, s), and exp(s - m) is added to l, last.
A tile that a row cannot see adds exact zeros. So a decode step (one row), a chunk and a whole prompt give the same
bits, and tiles before a window need not be computed. All products use `products.py`; everything else is elementwise in
float32. Values at positions without a token are set to zero before use, because the cache may hold anything there.
Source: softmax by tiles as in FlashAttention (Dao et al. 2022), with the maximum taken first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ...kernels.reference import Planes, decode_rows
from .elementwise import softcapped
from .products import TILE_ROWS, Product, padded
from .seam import AttentionKind, Span

KV_TILE = 256
_SLAB_ROWS = 512  # most rows of a prompt whose scores are in memory at once

_NEGATIVE = float("-inf")
_SIGN_AND_MAGNITUDE = 0x87F00000 - (1 << 32)


class HeadShape(NamedTuple):
    """Sizes for which an `Attention` is made."""

    kv_heads: int
    group: int  # query heads per KV head
    key_widths: tuple[int, ...]  # width of each part of queries and keys
    value_width: int


@dataclass(frozen=True, slots=True)
class Narrow:
    """Layout of a step's short spans, mostly decodes, as pairs (span, KV tile), for batched products.

    Spans are sorted by descending number of tiles, pairs by tile (0 is each span's own first tile). So the pairs of
    tile j belong to the first `per_tile[j]` spans: ranges instead of indices.
    """

    rows: Tensor  # [num_spans, queries] int64: batch rows; shorter spans repeat their last row
    per_tile: tuple[int, ...]
    pair_span: Tensor  # [num_pairs] int64
    head_rows: Tensor  # [num_pairs, kv_heads, blocks_per_tile] int64, from `_head_rows`
    hidden: Tensor  # [num_pairs, 1, queries * group, KV_TILE] bool: positions the row must not see
    tails: tuple[tuple[int, int], ...]  # (pair, number of tokens) of each span's last tile


@dataclass(frozen=True, slots=True)
class AttentionLayout:
    """Layout of a step's spans: wide ones (chunks of prompts), each computed alone, and narrow ones."""

    wide: tuple[Span, ...]
    narrow: Narrow | None
    block_tokens: int


class _How(NamedTuple):
    """Rules of one call."""

    kind: AttentionKind
    block_tokens: int
    sinks: Tensor | None  # [kv_heads, group]


class _SlabRules(NamedTuple):
    """Rules of one slab of rows."""

    hidden: Tensor  # [last tiles, rows, KV_TILE] bool
    softcap: float | None
    sink: Tensor | None  # [rows]


class Attention:
    """Attention for one shape of heads. Call `lay_out` once per step and window, then the object once per layer."""

    def __init__(self, shape: HeadShape, product: Callable[[int, int, bool], Product]) -> None:
        """`product(inner, columns, transposed)` makes a float32 `Product`."""
        self.shape = shape
        self.queries_per_tile = TILE_ROWS // shape.group  # 0: a group exceeds a tile, and every span is wide
        self.scores = tuple(product(width, KV_TILE, True) for width in shape.key_widths)
        self.mix = product(KV_TILE, shape.value_width, False)

    def lay_out(self, spans: Sequence[Span], block_tokens: int, window: int | None) -> AttentionLayout:
        """Sort a step's spans into wide and narrow ones."""
        wide = tuple(span for span in spans if span.num_rows > self.queries_per_tile)
        narrow = [span for span in spans if span.num_rows <= self.queries_per_tile]
        laid_out = self._lay_out_narrow(narrow, block_tokens, window) if narrow else None
        return AttentionLayout(wide, laid_out, block_tokens)

    def _lay_out_narrow(self, spans: list[Span], block_tokens: int, window: int | None) -> Narrow:
        spans = sorted(spans, key=lambda span: -len(_seen_tiles(span.start, span.num_rows, window)))
        ranges = [_seen_tiles(span.start, span.num_rows, window) for span in spans]
        tiles = [len(seen) for seen in ranges]
        per_tile = tuple(sum(n > j for n in tiles) for j in range(tiles[0]))
        pair_span = torch.cat([torch.arange(n) for n in per_tile])
        pair_tile = torch.tensor([ranges[i].start + j for j, n in enumerate(per_tile) for i in range(n)])
        blocks = [
            _blocks(spans[i], range(ranges[i].start + j, ranges[i].start + j + 1), block_tokens)
            for j, n in enumerate(per_tile)
            for i in range(n)
        ]
        query = torch.arange(max(span.num_rows for span in spans))
        last = torch.tensor([span.num_rows - 1 for span in spans]).unsqueeze(1)
        offset = torch.minimum(query, last)  # [num_spans, queries]
        rows = torch.tensor([span.row for span in spans]).unsqueeze(1) + offset
        positions = torch.tensor([span.start for span in spans]).unsqueeze(1) + offset
        row_position = positions.repeat_interleave(self.shape.group, dim=1)[pair_span][:, None, :, None]
        column = (pair_tile.unsqueeze(1) * KV_TILE + torch.arange(KV_TILE))[:, None, None, :]
        hidden = _hidden(column, row_position, window)
        first_pair = [sum(per_tile[:j]) for j in range(len(per_tile))]
        tails = tuple(
            (first_pair[n - 1] + i, spans[i].end - (ranges[i].stop - 1) * KV_TILE) for i, n in enumerate(tiles)
        )
        head_rows = _head_rows(torch.tensor(blocks), self.shape.kv_heads)
        return Narrow(rows, per_tile, pair_span, head_rows, hidden, tails)

    def __call__(
        self,
        queries: Sequence[Tensor],
        keys: Sequence[Planes],
        values: Planes,
        layout: AttentionLayout,
        kind: AttentionKind,
        *,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attention of queries [rows, heads, width] per part. The step's keys and values are already stored.

        `sinks` [heads] float32: of each head, as in `seam.Ops.attend`.
        """
        scaled = [part.float() * kind.scale for part in queries]
        rows, heads = scaled[0].shape[:2]
        out = scaled[0].new_zeros(rows, heads, self.shape.value_width)
        sunk = None if sinks is None else sinks.view(self.shape.kv_heads, self.shape.group)
        for span in layout.wide:
            self._attend_wide(scaled, (*keys, values), span, _How(kind, layout.block_tokens, sunk), out)
        if layout.narrow is not None:
            self._attend_narrow(scaled, (*keys, values), layout.narrow, _How(kind, layout.block_tokens, sunk), out)
        return out.to(queries[0].dtype)

    def _numbers(self, planes: Sequence[Planes], head_rows: Tensor) -> tuple[list[Tensor], Tensor]:
        """Read blocks: keys of each part, and values, [n, kv_heads, tokens, width] float32."""
        keys = [_tiles(part, head_rows, w) for part, w in zip(planes, self.shape.key_widths, strict=False)]
        if any(part.payload is planes[-1].payload for part in planes[:-1]):  # a latent is both key and value
            shared = next(i for i, part in enumerate(planes) if part.payload is planes[-1].payload)
            return keys, keys[shared]
        return keys, _tiles(planes[-1], head_rows, self.shape.value_width)

    def _attend_wide(self, q: list[Tensor], planes: Sequence[Planes], span: Span, how: _How, out: Tensor) -> None:
        kind, block_tokens, group = how.kind, how.block_tokens, self.shape.group
        seen = _seen_tiles(span.start, span.num_rows, kind.window)
        blocks = torch.tensor([_blocks(span, seen, block_tokens)])
        key_parts, value_parts = self._numbers(planes, _head_rows(blocks, self.shape.kv_heads))
        offset = seen.start * KV_TILE  # position of the first key in `key_parts`
        value_parts[:, :, span.end - offset :] = 0.0
        per_slab = max(1, _SLAB_ROWS // group)
        for first in range(0, span.num_rows, per_slab):
            count = min(per_slab, span.num_rows - first)
            rows = slice(span.row + first, span.row + first + count)
            start = span.start + first
            tiles = _seen_tiles(start, count, kind.window)
            masked = tiles.start if kind.window is not None else start // KV_TILE  # no row masks earlier tiles
            positions = torch.arange(start, start + count).repeat_interleave(group)
            spare = padded(len(positions)) - len(positions)
            positions = torch.cat((positions, positions[-1:].expand(spare)))
            column = torch.arange(masked * KV_TILE, tiles.stop * KV_TILE).view(-1, 1, KV_TILE)
            hidden = _hidden(column, positions.view(1, -1, 1), kind.window)
            at = slice(tiles.start * KV_TILE - offset, tiles.stop * KV_TILE - offset)
            for head in range(self.shape.kv_heads):
                heads = slice(head * group, (head + 1) * group)
                taken = [_with_spare(part[rows, heads].flatten(0, 1), spare) for part in q]
                keys = [part[0, head, at] for part in key_parts]
                sink = None if how.sinks is None else F.pad(how.sinks[head].repeat(count), (0, spare))
                mixed = self._slab(taken, keys, value_parts[0, head, at], _SlabRules(hidden, kind.softcap, sink))
                out[rows, heads] = mixed[: count * group].view(count, group, -1)

    def _slab(self, queries: list[Tensor], keys: list[Tensor], values: Tensor, rules: _SlabRules) -> Tensor:
        """Attention of a slab of rows [rows, width] to one KV head."""
        hidden, softcap, sink = rules
        tiles = [slice(start, start + KV_TILE) for start in range(0, len(values), KV_TILE)]
        scores = queries[0].new_empty(len(tiles), len(queries[0]), KV_TILE)
        for j, tile in enumerate(tiles):
            self.scores[0].rows(queries[0], keys[0][tile].t(), scores[j])
            for product, part, key in zip(self.scores[1:], queries[1:], keys[1:], strict=True):
                scores[j] += product.rows(part, key[tile].t())
        if softcap is not None:
            scores = softcapped(scores, softcap)
        scores[len(tiles) - len(hidden) :].masked_fill_(hidden, _NEGATIVE)
        largest = scores.amax(-1).amax(0)
        if sink is not None:
            largest = torch.maximum(largest, sink)
        weights = torch.exp(scores.sub_(largest.view(1, -1, 1)), out=scores)
        sums = weights.sum(-1)
        total, mixed = sums[0], self.mix.rows(weights[0], values[tiles[0]])
        for j in range(1, len(tiles)):
            total = total + sums[j]
            mixed = mixed + self.mix.rows(weights[j], values[tiles[j]])
        if sink is not None:
            total = total + torch.exp(sink - largest)
        return (mixed + 0.0) / total.unsqueeze(-1)  # + 0.0: the sign of zero must not depend on hidden tiles

    def _attend_narrow(self, q: list[Tensor], planes: Sequence[Planes], narrow: Narrow, how: _How, out: Tensor) -> None:
        kind = how.kind
        num_spans, queries = narrow.rows.shape
        kv_heads, group, _, width = self.shape
        used, pairs = queries * group, len(narrow.pair_span)
        keys, values = self._numbers(planes, narrow.head_rows)  # [pairs, kv_heads, KV_TILE, width]
        for pair, tokens in narrow.tails:
            values[pair, :, tokens:] = 0.0
        whole = self._narrow_scores(q[0], keys[0], self.scores[0], narrow)
        for part, key, product in zip(q[1:], keys[1:], self.scores[1:], strict=True):
            whole += self._narrow_scores(part, key, product, narrow)
        scores = whole[:, :, :used]  # the rest of a tile is padding
        if kind.softcap is not None:
            scores = softcapped(scores, kind.softcap)
        scores = scores.masked_fill(narrow.hidden, _NEGATIVE)
        ranges = _ranges(narrow.per_tile)
        largest = _fold(torch.maximum, scores.amax(-1), ranges)  # [spans, kv_heads, queries * group]
        sink = None if how.sinks is None else how.sinks.repeat(1, queries)
        if sink is not None:
            largest = torch.maximum(largest, sink)
        weights = torch.exp(scores.sub_(largest.index_select(0, narrow.pair_span).unsqueeze(-1)), out=scores)
        whole[:, :, :used] = weights
        parts = self.mix.batch(whole.flatten(0, 1), values.flatten(0, 1)).view(pairs, kv_heads, TILE_ROWS, width)
        total = _fold(torch.add, weights.sum(-1), ranges)
        if sink is not None:
            total = total + torch.exp(sink - largest)
        mixed = _fold(torch.add, parts[:, :, :used], ranges)
        result = ((mixed + 0.0) / total.unsqueeze(-1)).view(num_spans, kv_heads, queries, group, width)
        # Padding repeats a span's last row, and its result has the same bits, so writing it twice has no effect.
        out[narrow.rows.flatten()] = result.transpose(1, 2).reshape(num_spans * queries, kv_heads * group, width)

    def _narrow_scores(self, q: Tensor, keys: Tensor, product: Product, narrow: Narrow) -> Tensor:
        """Scores [pairs, kv_heads, TILE_ROWS, KV_TILE] of one part: q [rows, heads, width] and the pairs' keys."""
        num_spans, queries = narrow.rows.shape
        kv_heads, group, width = self.shape.kv_heads, self.shape.group, q.shape[-1]
        taken = q.index_select(0, narrow.rows.flatten()).view(num_spans, queries, kv_heads, group, width)
        tiles = q.new_zeros(num_spans, kv_heads, TILE_ROWS, width)
        tiles[:, :, : queries * group] = taken.transpose(1, 2).reshape(num_spans, kv_heads, queries * group, width)
        of_pairs = tiles.index_select(0, narrow.pair_span).flatten(0, 1)
        whole = product.batch(of_pairs, keys.flatten(0, 1).transpose(1, 2))
        return whole.view(len(narrow.pair_span), kv_heads, TILE_ROWS, KV_TILE)


def _seen_tiles(start: int, count: int, window: int | None) -> range:
    """KV tiles visible to the queries at positions [start, start + count)."""
    first = 0 if window is None else max(0, start - window + 1) // KV_TILE
    return range(first, (start + count - 1) // KV_TILE + 1)


def _hidden(column: Tensor, position: Tensor, window: int | None) -> Tensor:
    """Mask: True where the query at `position` must not see the key at `column`."""
    later = column > position
    return later if window is None else later | (column <= position - window)


def _blocks(span: Span, tiles: range, block_tokens: int) -> list[int]:
    """Blocks of whole tiles. After the sequence's last block its first block fills the rest; it is masked."""
    used = span.blocks[: -(-span.end // block_tokens)]
    per_tile = KV_TILE // block_tokens
    wanted = used[tiles.start * per_tile : tiles.stop * per_tile]
    return [*wanted, *[span.blocks[0]] * (len(tiles) * per_tile - len(wanted))]


def _with_spare(rows: Tensor, spare: int) -> Tensor:
    return torch.cat((rows, rows.new_zeros(spare, rows.shape[1])))


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
    """Indices [n, heads, m] int64 of the rows of blocks [n, m] in planes viewed as [num_blocks * heads, ...]."""
    return blocks.unsqueeze(1) * heads + torch.arange(heads).view(1, -1, 1)


def _tiles(planes: Planes, head_rows: Tensor, width: int) -> Tensor:
    """Copy the rows at `head_rows` [n, heads, m] as float32 [n, heads, m * block_tokens, width]."""
    shape, picked = (*head_rows.shape[:2], -1), head_rows.flatten()
    row_bytes = planes.payload.shape[-1]
    payload = planes.payload.flatten(0, 1).index_select(0, picked).view(*shape, row_bytes)
    if planes.scales is None:
        return decode_rows(Planes(payload, None), width)[0]
    scales = planes.scales.flatten(0, 1).index_select(0, picked).view(shape)
    if planes.byte_code == "e4m3":
        return _decode_fp8(payload, scales)
    numbers, factors = decode_rows(Planes(payload, scales, planes.code), width)
    assert factors is not None
    return numbers.mul_(factors.unsqueeze(-1))


def _decode_fp8(payload: Tensor, scales: Tensor) -> Tensor:
    """Decode fp8 rows with their scales, 40 times faster in eager torch than `kernels.reference.decode_rows`.

    An e4m3 code shifted left by 20 bits is a float32 whose exponent is 120 too low. The NaN codes, which the store
    never writes, become 480.
    """
    bits = payload.view(torch.int8).to(torch.int32).bitwise_left_shift_(20).bitwise_and_(_SIGN_AND_MAGNITUDE)
    scale = (scales.to(torch.int32) << 23).view(torch.float32)
    return bits.view(torch.float32).mul_(2.0**120).mul_(scale.unsqueeze(-1))
