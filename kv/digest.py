"""Digests of stored keys and values: one keyed 64-bit sum per (hash block, layer, component, head). Numpy, pure.

Knows no store, frame or identity: the caller keeps beside the digests which prompt a block belongs to.
A digest covers *content* and *place* (layer, component, head, token within the hash block, index of the hash block in
the sequence). A reused block is detected because the digest is kept with (block, generation) and covers other content.

Definition, everything modulo 2**64, little-endian. A row is the payload of one (token, head), seen as 32-bit words
`w[t, i]` (zero-padded to whole words), and its scale byte `s[t]` (codecs without scales have none); t counts tokens
from the start of the hash block.

    unit       = sum over present t of ( sum over i of key[t, i] * w[t, i]  +  key[t, SCALE] * s[t] )
    digest     = multiplier(place) * unit + addend(place) * (number of present tokens)

The keys are splitmix64 numbers of the 64-bit cluster key, all different; multiplier and addend are odd and come from a
mixed (layer, component, head, hash block). So a digest is additive over tokens: those of tokens 0..6 and 7..15 sum to
the block's. Digests of a range of heads, tokens or layers verify by themselves, and the sum of the digests of a frame
is a digest of the frame.

Detection. For content that does not depend on the key, two different units at one place collide with probability
at most 2**-33 over the keys: they differ in a word by less than 2**32, that is by `2**j * odd` with j <= 31, and such
a multiple of a 64-bit key hits one given sum for at most 2**j of 2**64 keys. Source: multilinear hashing, Lemire and
Kaser 2014, "Strongly universal string hashing is fast"; they keep the upper half of the sum to make it strongly
universal, we keep all 64 bits because we only compare. The low bits are weak (bit 0 depends only on bit 0 of each
word): compare whole digests, never a part. Swapped tokens, words or bytes change a unit because no two keys are equal;
an odd multiplier never hides a changed unit; an addend per token detects missing tokens whose bytes were all zero;
a block that arrives with its own digest at another place passes with a probability of about 2**-60.
It detects faults, not forgery: an adversary who sees digests can solve for the keys. mTLS protects against that.
"""

from functools import lru_cache
from math import prod

import numpy as np
from numpy.typing import ArrayLike, NDArray

U8 = NDArray[np.uint8]
U64 = NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_SCALE_WORD = 0xFFFF  # the column of the key table that belongs to the scale byte
_MULTIPLIER, _ADDEND, _TABLE = 1, 2, 3  # one stream of keys each
_HASH_BLOCK_BITS = 24
MAX_HASH_BLOCKS = 1 << _HASH_BLOCK_BITS
_CHUNK_BYTES = 1 << 20  # digested at a time, so that the words widened to 64 bits stay in the CPU cache


def places(layers: ArrayLike, component: int, heads: ArrayLike, hash_blocks: ArrayLike) -> U64:
    """Place words, broadcast over layers, heads and hash blocks, each an integer or an array of them.

    Limits: 65,536 layers and heads, 256 components, 2**24 hash blocks (268 million tokens).

    Raises:
        ValueError: a number is outside its limit.
    """
    words = [_bounded("layers", layers, 16), _bounded("component", component, 8)]
    words += [_bounded("heads", heads, 16), _bounded("hash_blocks", hash_blocks, _HASH_BLOCK_BITS)]
    layer, part, head, block = words
    place: U64 = (layer << np.uint64(48)) | (part << np.uint64(40)) | (head << np.uint64(24)) | block
    return place


def unit_digests(payload: U8, scales: U8 | None, place: U64, key: int, first_token: int = 0) -> U64:
    """Digest each unit: uint64 of the leading shape.

    payload uint8 [..., tokens, row_bytes]; scales uint8 [..., tokens] or None; place broadcasts to the leading shape.
    The present tokens are those from `first_token` of the hash block on (a partial tail, or a part to be summed).
    key: the cluster key, 0 <= key < 2**64.
    """
    *lead, tokens, row_bytes = payload.shape
    words = _words(payload)
    table = key_table(key, first_token, tokens, words.shape[-1])
    count, flat = prod(lead), table.reshape(-1)
    words = words.reshape(count, flat.size)
    units = np.empty(count, np.uint64)
    step = max(1, _CHUNK_BYTES // max(1, tokens * row_bytes))
    for start in range(0, count, step):
        part = words[start : start + step].astype(np.uint64)
        np.einsum("ij,j->i", part, flat, out=units[start : start + step])
    if scales is not None:
        column = scale_keys(key, first_token, tokens)
        units += np.einsum("ij,j->i", scales.reshape(count, tokens).astype(np.uint64), column)
    multiplier, addend = place_keys(np.broadcast_to(place, lead).reshape(count), key)
    return (units * multiplier + addend * np.uint64(tokens)).reshape(lead)


def frame_digests(payload: U8, scales: U8 | None, place: U64, key: int, hash_block_tokens: int) -> U64:
    """Digest consecutive tokens from the start of a hash block: uint64 [..., ceil(tokens / hash_block_tokens)].

    payload uint8 [..., tokens, row_bytes], scales uint8 [..., tokens] or None; the last hash block may be partial.
    place: one word per leading index and hash block, as `places(layers[:, None, None], c, heads[:, None], blocks)`.
    """
    *lead, tokens, row_bytes = payload.shape
    whole = tokens // hash_block_tokens
    cut = whole * hash_block_tokens
    place = np.broadcast_to(place, (*lead, -(-tokens // hash_block_tokens)))
    shape = (*lead, whole, hash_block_tokens)
    digests = unit_digests(
        payload[..., :cut, :].reshape(*shape, row_bytes),
        None if scales is None else scales[..., :cut].reshape(shape),
        place[..., :whole],
        key,
    )
    if cut == tokens:
        return digests
    tail_scales = None if scales is None else scales[..., cut:]
    tail = unit_digests(payload[..., cut:, :], tail_scales, place[..., whole], key)
    return np.concatenate((digests, tail[..., None]), axis=-1)


def place_keys(place: U64, key: int) -> tuple[U64, U64]:
    """Odd multiplier and odd addend of each place word, each uint64 of the shape of `place`."""
    place = np.asarray(place, np.uint64)
    one = np.uint64(1)
    multiplier = _mix(place ^ _seed(key, _MULTIPLIER)) | one
    addend = _mix(place ^ _seed(key, _ADDEND)) | one
    return multiplier.reshape(place.shape), addend.reshape(place.shape)


@lru_cache(maxsize=64)
def key_table(key: int, first_token: int, tokens: int, words: int) -> U64:
    """Keys of the payload words, uint64 [tokens, words], read-only; a token's keys do not depend on the row's length.

    Raises:
        ValueError: `words` is more than 65,535, or `key` is no 64-bit number.
    """
    if not 0 <= words <= _SCALE_WORD:
        raise ValueError(f"a row of {words} words; at most {_SCALE_WORD} are keyed")
    return _table(key, first_token, tokens, np.arange(words, dtype=np.uint64))


@lru_cache(maxsize=64)
def scale_keys(key: int, first_token: int, tokens: int) -> U64:
    """Keys of the scale bytes, uint64 [tokens], read-only."""
    return _table(key, first_token, tokens, np.array([_SCALE_WORD], dtype=np.uint64))[:, 0]


def _table(key: int, first_token: int, tokens: int, columns: U64) -> U64:
    rows = np.arange(first_token, first_token + tokens, dtype=np.uint64)[:, None]
    counter = (rows << np.uint64(16)) | columns
    table = _mix(_seed(key, _TABLE) + (counter + np.uint64(1)) * _GOLDEN)
    table.flags.writeable = False
    return table


def stream_seeds(key: int) -> tuple[int, int]:
    """The two seeds that place words are mixed with: one for multipliers, one for addends."""
    return int(_seed(key, _MULTIPLIER)[0]), int(_seed(key, _ADDEND)[0])


@lru_cache(maxsize=64)
def _seed(key: int, stream: int) -> U64:
    """Start of one stream of keys, uint64 [1]."""
    if not 0 <= key < 1 << 64:
        raise ValueError(f"the digest key is {key}; must be a 64-bit number")
    return _mix(np.array([key], np.uint64) + np.array([stream], np.uint64) * _GOLDEN)


def _mix(x: U64) -> U64:
    """The finaliser of splitmix64, a bijection. Source: Steele, Lea and Flood 2014."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _words(payload: U8) -> NDArray[np.uint32]:
    spare = -payload.shape[-1] % 4
    if spare:
        payload = np.pad(payload, [(0, 0)] * (payload.ndim - 1) + [(0, spare)])
    return np.ascontiguousarray(payload).view("<u4")


def _bounded(name: str, numbers: ArrayLike, bits: int) -> U64:
    array = np.asarray(numbers)
    if array.size and (array.min() < 0 or array.max() >= 1 << bits):
        raise ValueError(f"{name} reaches from {array.min()} to {array.max()}; must be 0 to {(1 << bits) - 1}")
    return array.astype(np.uint64)
