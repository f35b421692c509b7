"""Definitions of the operations on stored blocks other than attention: row digests, gather and scatter. Plain torch.

The terms are those of `reference.py`. `kv/digest.py` defines the digest and gives its reasons; both must give the same
numbers. Its 64-bit arithmetic is int64 here: two's complement wraps modulo 2**64 as well.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .reference import Planes, rotary, store_kv

HASH_BLOCK_TOKENS = 16  # tokens that one digest covers
_GOLDEN = 0x9E3779B97F4A7C15
_SCALE_WORD = 0xFFFF  # the column of the key table that belongs to the scale byte
_MULTIPLIER, _ADDEND, _TABLE = 1, 2, 3  # streams of keys


class DigestKeys(NamedTuple):
    """Digest keys of one cluster key, for rows of one length."""

    words: Tensor  # [HASH_BLOCK_TOKENS, 32-bit words per row] int64
    scales: Tensor  # [HASH_BLOCK_TOKENS] int64
    seeds: Tensor  # [2] int64: seeds of the places' multipliers and of their addends


class Seal(NamedTuple):
    """Keys of a digest, and the place of the digested rows in the model."""

    keys: DigestKeys
    layer: int
    first_head: int = 0  # of this rank, counted in the whole model
    k_component: int = 0
    v_component: int = 1


class Rotation(NamedTuple):
    """Positions of tokens, and the rotary tables."""

    positions: Tensor  # [num_tokens] int64, from the sequence's start
    cos: Tensor  # [max_len, w] float32 by position, 2 * w <= width
    sin: Tensor  # [max_len, w] float32


class RotaryStored(NamedTuple):
    """Result of `rotary_store_kv`."""

    q: Tensor  # [num_tokens, q_heads, width] rotated
    k: Tensor  # [num_tokens, kv_heads, width] rotated, as the cache now holds it
    v: Tensor  # [num_tokens, kv_heads, width] as the cache now holds it
    non_finite: Tensor  # [num_tokens] int32, as in `Stored`
    digests: Tensor  # [2, num_tokens, kv_heads] int64: terms of k's and v's rows in their hash block's digest


def digest_keys(key: int, row_bytes: int, device: torch.device | str = "cpu") -> DigestKeys:
    """Digest keys for rows of `row_bytes`; key: the cluster's, 0 <= key < 2**64."""
    words = -(-row_bytes // 4)
    columns = torch.tensor([*range(words), _SCALE_WORD])
    counter = (torch.arange(HASH_BLOCK_TOKENS)[:, None] << 16) | columns
    table = _mix(_seed(key, _TABLE) + (counter + 1) * _signed(_GOLDEN))
    seeds = torch.stack((_seed(key, _MULTIPLIER), _seed(key, _ADDEND)))
    return DigestKeys(
        table[:, :words].contiguous().to(device), table[:, words].contiguous().to(device), seeds.to(device)
    )


def row_digests(rows: Planes, positions: Tensor, seal: Seal, component: int) -> Tensor:
    """The term of each row in the digest of its hash block; int64 [num_tokens, heads] that hold uint64s.

    rows: payload uint8 [num_tokens, heads, row_bytes], scales [num_tokens, heads] or None; positions [num_tokens] int64
    count from the sequence's start. The sum of a hash block's present tokens, modulo 2**64, equals
    `kv/digest.py: unit_digests`.
    """
    payload = torch.nn.functional.pad(rows.payload, (0, -rows.payload.shape[-1] % 4))
    words = payload.contiguous().view(torch.int32).long() & 0xFFFFFFFF  # [tokens, heads, words]
    token = positions % HASH_BLOCK_TOKENS
    units = (words * seal.keys.words[token].unsqueeze(1)).sum(-1)
    if rows.scales is not None:
        units = units + rows.scales.long() * seal.keys.scales[token].unsqueeze(1)
    heads = torch.arange(units.shape[1], device=units.device) + seal.first_head
    where = (seal.layer << 48) | (component << 40) | (heads << 24) | (positions // HASH_BLOCK_TOKENS).unsqueeze(1)
    return units * (_mix(where ^ seal.keys.seeds[0]) | 1) + (_mix(where ^ seal.keys.seeds[1]) | 1)


def rotary_store_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    rotation: Rotation,
    *,
    k_planes: Planes,
    v_planes: Planes,
    seal: Seal,
) -> RotaryStored:
    """`rotary` on q and k, `store_kv` of the rotated k and of v, and the digests of the written rows.

    q [num_tokens, q_heads, width], k and v [num_tokens, kv_heads, width]; slots as in `store_kv`: a padding row
    (negative slot) has digest 0. Keys are rounded to their dtype between rotating and storing.
    """
    positions = rotation.positions
    q, k = rotary(q, k, rotation.cos[positions], rotation.sin[positions])
    stored = store_kv(k, v, slots, k_planes, v_planes)
    kept, digests = slots >= 0, torch.zeros((2, *k.shape[:2]), dtype=torch.int64, device=k.device)
    components = ((k_planes, seal.k_component), (v_planes, seal.v_component))
    for out, (planes, component) in zip(digests, components, strict=True):
        blocks, offsets = slots[kept] // planes.block_tokens, slots[kept] % planes.block_tokens
        scales = None if planes.scales is None else planes.scales[blocks, :, offsets]
        written = Planes(planes.payload[blocks, :, offsets], scales)
        out[kept] = row_digests(written, positions[kept], seal, component)
    return RotaryStored(q, stored.k, stored.v, stored.non_finite, digests)


def gather_tokens(store: Planes, block_table: Tensor, tokens: range, heads: range) -> Planes:
    """A contiguous copy of a range of one sequence's tokens and of a range of heads, of all layers.

    store: payload uint8 [layers, num_blocks, heads, block_tokens, row_bytes], scales [layers, num_blocks, heads,
    block_tokens] or None; block_table [n] int64: the blocks that hold the sequence from token 0 on. Returns payload
    [layers, len(heads), len(tokens), row_bytes] and scales without the last axis: the layout of frames and host slots.
    """
    blocks, offsets, head = _where(store, block_table, tokens, heads)
    payload = store.payload[:, blocks, head, offsets]
    return Planes(payload, None if store.scales is None else store.scales[:, blocks, head, offsets], store.code)


def scatter_tokens(store: Planes, block_table: Tensor, tokens: range, heads: range, source: Planes) -> None:
    """Write `source`, a result of `gather_tokens`, into a sequence's blocks. No other row is touched.

    Raises:
        ValueError: `source` has another codec, or its shape does not fit the ranges. Nothing was written.
    """
    layers, row_bytes = store.payload.shape[0], store.payload.shape[-1]
    expected = (layers, len(heads), len(tokens), row_bytes)
    if (store.scales is None) != (source.scales is None) or source.payload.shape != expected:
        raise ValueError(
            f"the source is {tuple(source.payload.shape)}, scales {source.scales is not None}; "
            f"the ranges ask for {expected}, scales {store.scales is not None}"
        )
    blocks, offsets, head = _where(store, block_table, tokens, heads)
    store.payload[:, blocks, head, offsets] = source.payload
    if store.scales is not None and source.scales is not None:
        store.scales[:, blocks, head, offsets] = source.scales


def _where(store: Planes, block_table: Tensor, tokens: range, heads: range) -> tuple[Tensor, Tensor, Tensor]:
    """Indices that broadcast to [heads, tokens]: blocks, offsets within them, and heads."""
    position = torch.arange(tokens.start, tokens.stop, device=block_table.device)
    block_tokens = store.payload.shape[3]
    head = torch.arange(heads.start, heads.stop, device=block_table.device).unsqueeze(1)
    return block_table[position // block_tokens], position % block_tokens, head


def _signed(number: int) -> int:
    """The int64 that holds a uint64."""
    return number - (1 << 64) if number >= 1 << 63 else number


def _seed(key: int, stream: int) -> Tensor:
    return _mix(torch.tensor(_signed((key + stream * _GOLDEN) % (1 << 64))))


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64, a bijection. Source: Steele, Lea and Flood 2014."""
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x as an unsigned number, shifted right."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
