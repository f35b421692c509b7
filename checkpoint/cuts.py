"""Which part of every tensor of a checkpoint a tensor-parallel rank reads. Knows names and shapes, no numbers.

A `Cut` is a list of pieces of one axis. A fused projection (`qkv_proj`, `gate_up_proj`) has one piece per projection.
A bias that is added to partial sums is read by rank 0 only: for the other ranks it is a piece of zeros.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..kv.spec import rank_heads
from .layout import EMBEDDING, HEAD, Matrix, layer_layout
from .shards import Piece, RankSpec, Shard
from .spec import PlainAttention

ROWS, COLUMNS = 0, 1  # axes of a matrix [out, in]; a bias [out] has rows only


@dataclass(frozen=True, slots=True)
class Cut:
    """A rank's part of a tensor of the checkpoint: pieces of one axis, joined."""

    stored: str  # name in the checkpoint; a tied head is a cut of the embedding
    axis: int
    pieces: tuple[Piece, ...]

    def shape(self, whole: Sequence[int]) -> tuple[int, ...]:
        """Shape of the part, padding included, of a tensor of shape `whole`."""
        size = sum(piece.size for piece in self.pieces)
        return (*whole[: self.axis], size, *whole[self.axis + 1 :])


class _Section(NamedTuple):
    """Rows of one projection in a matrix that may be fused: their number in the whole model, and the rank's piece."""

    rows: int
    piece: Piece


def rank_cuts(rank: RankSpec, present: Container[str]) -> dict[str, Cut]:
    """Cuts of the tensors of which a rank reads a part only, by the names that the rank's spec gives them.

    A tensor without a cut is whole on every rank. `present`: names in the checkpoint, as for `layer_layout`.
    """
    whole, shard = rank.whole, rank.shard
    if shard.size == 1:
        return {}
    table = EMBEDDING if whole.tied_embeddings else HEAD
    cuts = {HEAD: Cut(table, ROWS, (shard.padded(whole.vocab_size),))}
    for index in range(whole.num_layers):
        layout = layer_layout(whole, index, present)
        for name, matrix in layout.matrices.items():
            cuts.update(_cuts_of(name.split()[-1], matrix, rank))
        if "sinks" in layout.vectors:  # one of each query head
            sinks, heads = layout.vectors["sinks"]
            cuts[sinks] = Cut(sinks, ROWS, (shard.even(heads),))
    return cuts


def _cuts_of(kind: str, matrix: Matrix, rank: RankSpec) -> Iterator[tuple[str, Cut]]:
    """Cuts of one matrix of a layer and of its bias. `kind`: the decoder's name of it, without the expert's."""
    shard = rank.shard
    if kind == "output":
        yield from _by_columns(matrix, shard.even(matrix.columns), shard)
    elif kind == "down":
        yield from _by_columns(matrix, shard.padded(matrix.columns), shard)
    elif kind == "gate_up":
        width = matrix.rows // 2
        yield from _by_rows(matrix, [_Section(width, shard.padded(width))] * 2)
    elif kind == "qkv":
        yield from _by_rows(matrix, _qkv_sections(rank))
    elif kind in ("q", "kv_up"):  # latent attention: rows of whole heads
        yield from _by_rows(matrix, [_Section(matrix.rows, shard.even(matrix.rows))])


def _qkv_sections(rank: RankSpec) -> list[_Section]:
    attention, shard = rank.whole.attention, rank.shard
    assert isinstance(attention, PlainAttention)
    width, num_kv_heads = attention.head_dim, attention.num_kv_heads
    heads = rank_heads(num_kv_heads, shard.rank, shard.size)
    queries = _Section(attention.num_heads * width, shard.even(attention.num_heads * width))
    keys = _Section(num_kv_heads * width, Piece(heads.start * width, heads.stop * width, len(heads) * width))
    return [queries, keys, keys]


def _by_rows(matrix: Matrix, sections: Sequence[_Section]) -> Iterator[tuple[str, Cut]]:
    """Cuts of a matrix by rows: one piece of each section, from a tensor per section or from a fused tensor."""
    is_fused = len(matrix.parts) < len(sections)
    pieces = [tuple(_placed(sections))] if is_fused else [(section.piece,) for section in sections]
    for (name, _), of_part in zip(matrix.parts, pieces, strict=True):
        yield name + ".weight", Cut(name + ".weight", ROWS, of_part)
        if matrix.bias:
            yield name + ".bias", Cut(name + ".bias", ROWS, of_part)


def _placed(sections: Sequence[_Section]) -> Iterator[Piece]:
    """Pieces of sections that follow each other in one tensor."""
    first = 0
    for rows, (start, stop, size) in sections:
        yield Piece(first + start, first + stop, size)
        first += rows


def _by_columns(matrix: Matrix, piece: Piece, shard: Shard) -> Iterator[tuple[str, Cut]]:
    """Cut of a matrix by columns; only rank 0 adds the bias to the sum over the ranks."""
    ((name, rows),) = matrix.parts
    yield name + ".weight", Cut(name + ".weight", COLUMNS, (piece,))
    if matrix.bias and shard.rank > 0:
        yield name + ".bias", Cut(name + ".bias", ROWS, (Piece(0, 0, rows),))
