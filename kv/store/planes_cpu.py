"""Planes of one component in host memory; reads and writes token ranges of blocks. Does not know what a seal means."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray

from ...kernels.cpu import library as native
from ...kernels.cpu.build import NativeUnavailable
from ...kernels.cpu.memory import take_memory
from ...kernels.reference import Planes
from ..block import BlockId
from ..codec import U8, Codec
from ..digest import U64, key_table, scale_keys, stream_seeds
from ..spec import HASH_BLOCK_TOKENS, Component

I64 = NDArray[np.int64]
_TOUCHED_BYTES = 256 << 20  # of one component's payload per worker, in the blocks that a pool hands out first


def _library() -> native.Library | None:
    try:
        return native.load()
    except NativeUnavailable:
        return None


class CpuPlanes:
    """Payload, scales and digests of a component, in the layout that `kv/store/store.py` draws."""

    def __init__(self, component: Component, num_layers: int, num_blocks: int, block_tokens: int) -> None:
        self.component = component
        self.codec = Codec(component.codec)
        self.block_tokens = block_tokens
        shape = (num_layers, num_blocks, component.heads, block_tokens)
        payload = take_memory(prod(shape) * component.row_bytes)
        self.payload = payload.view(*shape, component.row_bytes)
        self.scales = torch.zeros(shape, dtype=torch.uint8) if self.codec is Codec.FP8_E4M3 else None
        self.payload_view: U8 = self.payload.numpy()
        self.scales_view: U8 | None = None if self.scales is None else self.scales.numpy()
        self._touch(num_layers * component.heads * block_tokens * component.row_bytes)
        self.library = _library() if component.row_bytes % 4 == 0 else None  # None: seals take copies
        units = (num_layers, component.heads, num_blocks, block_tokens // HASH_BLOCK_TOKENS)
        self.digests: U64 = np.zeros(units, np.uint64)

    def _touch(self, block_bytes: int) -> None:
        """Write zeros to the first blocks, so that the system maps their pages before the first prompts arrive.

        Mapping them later took 2 % of the time of the first prompts.
        """
        first = slice(_TOUCHED_BYTES // block_bytes)
        self.payload[:, first] = 0
        if self.scales is not None:
            self.scales[:, first] = 0

    def planes(self, layer: int) -> Planes:
        """Planes of one layer: views of the store's memory."""
        return Planes(self.payload[layer], None if self.scales is None else self.scales[layer])

    def gather(self, block_table: Sequence[BlockId], tokens: range) -> tuple[U8, U8 | None]:
        """Copies: payload [layers, heads, tokens, row_bytes] and scales [layers, heads, tokens]."""
        first, last = tokens.start // self.block_tokens, -(-tokens.stop // self.block_tokens)
        blocks = np.asarray(block_table[first:last], np.int64)
        within = slice(tokens.start - first * self.block_tokens, tokens.stop - first * self.block_tokens)

        def take(plane: U8) -> U8:
            picked = plane[:, blocks].swapaxes(1, 2)  # [layers, heads, blocks, block_tokens, ...]
            flat = picked.reshape(*picked.shape[:2], -1, *picked.shape[4:])
            return np.ascontiguousarray(flat[:, :, within])

        return take(self.payload_view), None if self.scales_view is None else take(self.scales_view)

    def digests_in_place(self, blocks: I64, offsets: I64, tokens: I64, place: U64, key: int) -> U64 | None:
        """Digests uint64 [layers, heads, n] of hash blocks, computed without a copy; None: no native library.

        Hash block i begins at token offsets[i] of block blocks[i], and tokens[i] of its tokens are present.
        """
        if self.library is None:
            return None
        planes = self.sealed_planes(key)
        parts = [np.ascontiguousarray(part) for part in (blocks, offsets, tokens, place)]
        digests = np.empty(place.shape, np.uint64)
        self.library.digest(planes, len(blocks), *(part.ctypes.data for part in parts), digests.ctypes.data)
        return digests

    def sealed_planes(self, key: int, first_places: U64 | None = None) -> native.SealedPlanes:
        """Addresses of these planes and of a key's tables, as the kernels read them.

        first_places uint64 [layers, heads, 1]: places of hash block 0, needed by `seal` only.
        """
        words = self.component.row_bytes // 4
        keys = key_table(key, 0, HASH_BLOCK_TOKENS, words)
        column = np.ascontiguousarray(scale_keys(key, 0, HASH_BLOCK_TOKENS))
        planes = native.SealedPlanes(
            self.payload.data_ptr(), None if self.scales is None else self.scales.data_ptr(),
            keys.ctypes.data, column.ctypes.data, None if first_places is None else first_places.ctypes.data,
            self.digests.ctypes.data, *stream_seeds(key),
            self.payload.shape[1], self.payload.shape[0], self.component.heads, self.block_tokens, words,
        )  # fmt: skip
        planes.points_to = keys, column, first_places
        return planes

    def scatter(
        self, block_table: Sequence[BlockId], tokens: range, layers: range, heads: range, rows: tuple[U8, U8 | None]
    ) -> None:
        """Write `rows` of the given layers and heads, in the layout that `gather` returns."""
        payload, scales = rows
        positions = np.arange(tokens.start, tokens.stop)
        blocks = np.asarray(block_table, np.int64)[positions // self.block_tokens]
        offsets = positions % self.block_tokens
        part, row = slice(layers.start, layers.stop), slice(heads.start, heads.stop)
        # Numpy puts the tokens first in the result when index arrays stand on both sides of a slice.
        self.payload_view[part, blocks, row, offsets] = payload.transpose(2, 0, 1, 3)
        if self.scales_view is not None:
            assert scales is not None, "fp8 rows come with scales"
            self.scales_view[part, blocks, row, offsets] = scales.transpose(2, 0, 1)
