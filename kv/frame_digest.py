"""Digests of a frame's planes by the CPU kernels where the process has loaded them, else in numpy: the same bits."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..kernels.cpu import library as native
from .digest import U8, U64, frame_digests, key_table, scale_keys, stream_seeds
from .spec import HASH_BLOCK_TOKENS

_WORD_BYTES = 4


def section_digests(payload: U8, scales: U8 | None, place: U64, key: int) -> U64:
    """Digest consecutive tokens from the start of a hash block: uint64 [layers, heads, ceil(tokens / 16)].

    payload uint8 [layers, heads, tokens, row_bytes], scales uint8 [layers, heads, tokens] or None; place broadcasts to
    the result. Frees the interpreter while it works.
    """
    library = _loaded()
    is_plain = payload.flags.c_contiguous and (scales is None or scales.flags.c_contiguous)
    if library is None or not is_plain or payload.shape[-1] % _WORD_BYTES:
        return frame_digests(payload, scales, place, key, HASH_BLOCK_TOKENS)
    layers, heads, tokens, row_bytes = payload.shape
    words = row_bytes // _WORD_BYTES
    same = _same_for_all(key, tokens, words)
    places = np.ascontiguousarray(np.broadcast_to(place, (layers, heads, same.units)))
    digests = np.empty(places.shape, np.uint64)
    planes = native.SealedPlanes(
        payload.ctypes.data, None if scales is None else scales.ctypes.data, *same.keys,
        None, None, *same.seeds, 1, layers, heads, tokens, words,
    )  # fmt: skip
    library.digest(planes, same.units, *same.hash_blocks, places.ctypes.data, digests.ctypes.data)
    return digests


class _Same(NamedTuple):
    """Arguments of the kernel that depend on a section's shape only. Addresses are valid as long as `arrays`."""

    units: int  # hash blocks
    keys: tuple[int, int]
    seeds: tuple[int, int]
    hash_blocks: tuple[int, ...]
    arrays: tuple[U8 | U64 | NDArray[np.int64], ...]


@lru_cache(maxsize=64)
def _same_for_all(key: int, tokens: int, words: int) -> _Same:
    offsets = np.arange(0, tokens, HASH_BLOCK_TOKENS, dtype=np.int64)
    counts = np.minimum(tokens - offsets, HASH_BLOCK_TOKENS)
    blocks = np.zeros(len(offsets), np.int64)  # the whole section is one block of the kernel's
    table = key_table(key, 0, HASH_BLOCK_TOKENS, words)
    column = np.ascontiguousarray(scale_keys(key, 0, HASH_BLOCK_TOKENS))
    addresses = tuple(part.ctypes.data for part in (blocks, offsets, counts))
    keys = table.ctypes.data, column.ctypes.data
    return _Same(len(offsets), keys, stream_seeds(key), addresses, (blocks, offsets, counts, table, column))


def _loaded() -> native.Library | None:
    """The kernels if this process has loaded them: loading may build them, and a hand-over must not wait for that."""
    return native.load() if native.load.cache_info().currsize else None
