"""Layout of one token in the cache, per layer group and component. Knows sizes, no tensor."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import Literal

HASH_BLOCK_TOKENS = 16  # tokens per hash block: the unit of identity and digest, for every physical block size

CODEC_NAMES = {  # names of --kv-cache-dtype to ids of kv/codec.py
    "fp8": 1,
    "bfloat16": 2,
    "float32": 3,
    "fp8_e5m2": 4,
    "int8": 5,
    "int8_channel": 6,
}
CODEC_ALIASES = {"auto": "fp8", "fp8_e4m3": "fp8", "int8_per_token_head": "int8"}
"""Further names of codecs: those of vLLM and SGLang."""

KEYS_ONLY = "int8_channel"
"""Codec of keys alone; the values beside them are `int8`."""

_CODEC_BYTES = {2: 2, 3: 4}  # per number; the others have 1, and a scale byte per row
COMPONENT_NUMBERS = {"k": 0, "v": 1, "latent": 2, "rope": 3}  # part of the places of digests: never reused


@dataclass(frozen=True, slots=True)
class Component:
    """One kind of cached vector: `heads` rows of `width` numbers per token and layer.

    In the spec of one TP rank, `heads` counts the rank's own heads. `holders` neighbouring ranks hold the same heads;
    the first of them has a rank that is a multiple of `holders`. So a hand-over can send each head once.
    """

    name: str
    heads: int
    width: int
    codec: int  # kv/codec.py: Codec
    shard: Literal["split", "replicate"] = "split"  # over TP ranks
    first_head: int = 0  # of this rank, counted in the whole model
    holders: int = 1

    @property
    def row_bytes(self) -> int:
        """Payload bytes of one (token, head) row."""
        return self.width * _CODEC_BYTES.get(self.codec, 1)

    @property
    def bytes_per_token(self) -> int:
        """Payload and scale bytes of one token in one layer."""
        return self.heads * (self.row_bytes + (self.codec not in _CODEC_BYTES))


@dataclass(frozen=True, slots=True)
class WindowedLayers:
    """Layers whose queries see the last `tokens` tokens only: the largest of their windows. `windows.py` plans with it.

    At least one layer of a group is none of them: if all have windows, the first one counts as a full layer.
    """

    layers: tuple[int, ...]  # numbers in the cache, ascending
    tokens: int


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers with equal components: the model's own ("main"), or a draft model's ("draft")."""

    name: str
    num_layers: int
    components: tuple[Component, ...]
    # Says which bytes are needed, not how they lie: two caches that differ in it alone have the same layout.
    windowed: WindowedLayers | None = field(default=None, repr=False, compare=False)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token over all layers of the group."""
        return self.num_layers * sum(component.bytes_per_token for component in self.components)


@dataclass(frozen=True, slots=True)
class KvSpec:
    """Layout of a cache. Two caches with different layouts need a translation to exchange blocks."""

    groups: tuple[LayerGroup, ...]

    @property
    def main(self) -> LayerGroup:
        """The model's own layers."""
        return self.groups[0]

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token over all groups, scales included."""
        return sum(group.bytes_per_token for group in self.groups)

    @property
    def bf16_bytes_per_token(self) -> int:
        """Bytes of one token if all components were bf16; `explain` compares with it."""
        return sum(2 * g.num_layers * c.heads * c.width for g in self.groups for c in g.components)

    def of_rank(self, rank: int, size: int) -> KvSpec:
        """Layout of the cache of one of `size` TP ranks; `rank_heads` defines its heads."""
        groups = []
        for group in self.groups:
            components = tuple(_of_rank(component, rank, size) for component in group.components)
            groups.append(replace(group, components=components))
        return KvSpec(tuple(groups))

    def of_all_ranks(self, size: int) -> KvSpec:
        """Layout of what `size` TP ranks hold together: heads that several ranks hold are counted at each of them."""
        groups = []
        for group in self.of_rank(0, size).groups:
            components = tuple(replace(component, heads=component.heads * size) for component in group.components)
            groups.append(replace(group, components=components))
        return KvSpec(tuple(groups))

    def with_windowed(self, windowed: WindowedLayers | None) -> KvSpec:
        """The same layout of a model whose own layers have these windows."""
        return KvSpec((replace(self.main, windowed=windowed), *self.groups[1:]))

    def fingerprint(self) -> bytes:
        """16-byte hash of the spec."""
        return hashlib.blake2b(repr(self).encode(), digest_size=16).digest()


@dataclass(frozen=True, slots=True)
class StateSpec:
    """Layout of the recurrent state of one sequence: of constant size, float32, whatever the sequence's length.

    Per layer with a state: the last inputs of its convolution, and a matrix per head.
    """

    num_layers: int
    num_taps: int  # inputs that are kept
    conv_width: int
    num_heads: int
    key_width: int
    value_width: int

    @property
    def num_bytes(self) -> int:
        """Bytes of one state."""
        per_layer = self.num_taps * self.conv_width + self.num_heads * self.key_width * self.value_width
        return 4 * self.num_layers * per_layer


def rank_heads(num_heads: int, rank: int, size: int) -> range:
    """KV heads of one of `size` TP ranks. One of the two numbers must be a multiple of the other.

    4 heads, 2 ranks    rank 0: heads 0, 1 | rank 1: heads 2, 3
    2 heads, 4 ranks    rank 0: head 0 | rank 1: head 0 | rank 2: head 1 | rank 3: head 1
    """
    assert num_heads % size == 0 or size % num_heads == 0, f"{num_heads} KV heads over {size} ranks"
    first = rank * num_heads // size
    return range(first, first + max(1, num_heads // size))


def _of_rank(component: Component, rank: int, size: int) -> Component:
    if component.shard == "replicate":
        return replace(component, holders=size)
    heads = rank_heads(component.heads, rank, size)
    return replace(component, heads=len(heads), first_head=heads.start, holders=max(1, size // component.heads))


def pair_name(keys: str, values: str) -> str:
    """The name of a cache whose keys and values have these codecs: of both, or "keys/values"."""
    keys, values = CODEC_ALIASES.get(keys, keys), CODEC_ALIASES.get(values, values)
    if values == KEYS_ONLY:
        values = "int8"
    if keys == values or (keys, values) == (KEYS_ONLY, "int8"):
        return keys
    return f"{keys}/{values}"


def codec_ids(codec: str) -> tuple[int, int]:
    """Codecs of keys and of values of a cache with this name (`pair_name`)."""
    keys, _, values = codec.partition("/")
    return CODEC_NAMES[keys], CODEC_NAMES[values or ("int8" if keys == KEYS_ONLY else keys)]


def is_rounded(codec: int) -> bool:
    """True if rows of this codec have fewer bits than bfloat16. They are never rounded once more, to another such."""
    return codec not in _CODEC_BYTES


def attention_spec(num_layers: int, kv_heads: int, head_dim: int, codec: int, value_codec: int | None = None) -> KvSpec:
    """The spec of plain (grouped-query) attention: components "k" and "v". `value_codec`: None is that of the keys."""
    k = Component("k", kv_heads, head_dim, codec)
    v = Component("v", kv_heads, head_dim, codec if value_codec is None else value_codec)
    return KvSpec((LayerGroup("main", num_layers, (k, v)),))


def mla_spec(num_layers: int, latent_width: int, rope_width: int, codec: int) -> KvSpec:
    """The spec of multi-head latent attention: one "latent" and one "rope" row per token, whole on every TP rank."""
    latent = Component("latent", 1, latent_width, codec, "replicate")
    rope = Component("rope", 1, rope_width, codec, "replicate")
    return KvSpec((LayerGroup("main", num_layers, (latent, rope)),))
