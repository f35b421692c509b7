"""Tensor parallelism as values: the part of a model that one rank of a group computes. Knows no tensor, no process.

A layer is split as in Megatron-LM: the first matrices of attention and of the feed-forward layer by rows (outputs),
the last ones by columns (inputs). So a rank computes its own heads and its own part of the feed-forward width, and the
results of the last matrices are partial sums over the ranks.

    query heads          split evenly
    KV heads             split; with more ranks than heads each head is on several ranks (kv/spec.py: `rank_heads`)
    feed-forward width   split, also inside every expert; a rank's part is padded with zeros
    vocabulary           the head is split and padded, the embedding is whole on every rank
    all else             whole on every rank: norms, routers of experts, latents and their down-projections

The embedding is whole because a rank reads single rows of it. On a CPU it is a view of the mapped file where that has
the compute dtype, so ranks share its memory. On a GPU, or in another dtype, every rank has a copy. A tied head becomes
a matrix of its own: the rank's rows of the embedding.
Source: Megatron-LM (Shoeybi et al. 2019), section 3.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from ..core.errors import ConfigError
from ..kv.spec import KvSpec, rank_heads
from .spec import DenseFfn, ExpertsFfn, LatentAttention, LayerSpec, ModelSpec, PlainAttention

WIDTH_MULTIPLE = 8  # numbers: 16 bytes of bfloat16, so that rows of padded matrices begin at multiples of 16 bytes


class Piece(NamedTuple):
    """Indices [start, stop) of an axis of a tensor, followed by zeros up to `size` numbers."""

    start: int
    stop: int
    size: int


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank of a tensor-parallel group of `size` ranks."""

    rank: int
    size: int

    def even(self, total: int) -> Piece:
        """The rank's piece of an axis that all ranks share evenly."""
        size = total // self.size
        assert size * self.size == total, f"{total} over {self.size} ranks"
        return Piece(self.rank * size, (self.rank + 1) * size, size)

    def padded(self, total: int) -> Piece:
        """The rank's piece of an axis of any length. All ranks' pieces have one size, a multiple of WIDTH_MULTIPLE."""
        size = -(-total // self.size)
        size += -size % WIDTH_MULTIPLE
        start = self.rank * size
        return Piece(min(start, total), min(start + size, total), size)


@dataclass(frozen=True, slots=True)
class RankSpec:
    """A model and the part of it that one rank computes, made by `shard_spec`."""

    whole: ModelSpec
    shard: Shard
    local: ModelSpec  # the rank's part: widths and heads of its own matrices; the vocabulary is the whole model's

    def kv_spec(self, codec: str) -> KvSpec:
        """Layout of one token in the rank's KV cache. `codec`: as for `ModelSpec.kv_spec`."""
        return self.whole.kv_spec(codec).of_rank(self.shard.rank, self.shard.size)


def shard_spec(spec: ModelSpec, shard: Shard) -> RankSpec:
    """The part of a model that a rank computes. In a group of one rank it is the model itself.

    Raises:
        ConfigError: the heads cannot be split over so many ranks; names the numbers and the sizes that work.
    """
    if shard.size == 1:
        return RankSpec(spec, shard, spec)
    if spec.delta is not None:
        raise ConfigError(
            f"{spec.architecture} has recurrent layers, which are not split over {shard.size} tensor-parallel ranks in "
            "this release; use tensor_parallel_size 1"
        )
    sizes = group_sizes(spec)
    if shard.size not in sizes:
        raise ConfigError(
            f"{spec.architecture} with {_heads_text(spec)} cannot be split over {shard.size} tensor-parallel ranks; "
            f"sizes that work: {', '.join(map(str, sizes))}"
        )
    local = replace(
        spec,
        attention=_attention(spec.attention, shard),
        layers=tuple(_layer(layer, shard) for layer in spec.layers),
        tied_embeddings=False,
        head_rows=shard.padded(spec.vocab_size).size,
    )
    return RankSpec(spec, shard, local)


def group_sizes(spec: ModelSpec) -> tuple[int, ...]:
    """Sizes of tensor-parallel groups over which the heads of a model can be split, ascending."""
    attention = spec.attention
    if spec.delta is not None:
        return (1,)
    kv_heads = attention.num_kv_heads if isinstance(attention, PlainAttention) else 1
    divisors = (size for size in range(1, attention.num_heads + 1) if attention.num_heads % size == 0)
    return tuple(size for size in divisors if kv_heads % size == 0 or size % kv_heads == 0)


def _heads_text(spec: ModelSpec) -> str:
    attention = spec.attention
    if isinstance(attention, LatentAttention):
        return f"{attention.num_heads} heads"
    return f"{attention.num_heads} query and {attention.num_kv_heads} KV heads"


def _attention(attention: PlainAttention | LatentAttention, shard: Shard) -> PlainAttention | LatentAttention:
    num_heads = attention.num_heads // shard.size
    if isinstance(attention, LatentAttention):
        return replace(attention, num_heads=num_heads)
    kv_heads = rank_heads(attention.num_kv_heads, shard.rank, shard.size)
    return replace(attention, num_heads=num_heads, num_kv_heads=len(kv_heads))


def _layer(layer: LayerSpec, shard: Shard) -> LayerSpec:
    ffn: DenseFfn | ExpertsFfn = replace(layer.ffn, width=shard.padded(layer.ffn.width).size)
    if isinstance(ffn, ExpertsFfn) and ffn.shared_width is not None:
        ffn = replace(ffn, shared_width=shard.padded(ffn.shared_width).size)
    return replace(layer, ffn=ffn)
