"""Planes of one component in host memory; reads and writes token ranges of blocks. Does not know what a seal means."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray

from ...kernels.cpu import library as native
from ...kernels.cpu.memory import take_memory
from ...kernels.reference import Planes
from ..block import BlockId
from ..codec import NUMBER_CODES, U8, Codec, scale_bytes
from ..digest import U64, key_table, scale_keys, stream_seeds
from ..section import PlaneBuffer
from ..spec import HASH_BLOCK_TOKENS, Component

I64 = NDArray[np.int64]
_TOUCHED_TOKENS = 32768  # per worker, in the blocks that a pool hands out first; their pages are mapped at the start
_TOUCHED_BYTES = 256 << 20  # bound of the same, for one component's payload


class HashBlocks:
    """Hash blocks of a store: number i begins at token offsets[i] of block blocks[i]; tokens[i] of it are present."""

    def __init__(self, blocks: I64, offsets: I64, tokens: I64) -> None:
        self.tokens = tokens
        self._arrays = [np.ascontiguousarray(part) for part in (blocks, offsets, tokens)]

    @property
    def arguments(self) -> tuple[int, ...]:
        """Their number and the addresses of the three arrays, valid as long as this object."""
        return len(self.tokens), *(part.ctypes.data for part in self._arrays)


class CpuPlanes:
    """Payload, scales and digests of a component, in the layout that `kv/store/store.py` draws."""

    def __init__(self, component: Component, num_layers: int, num_blocks: int, block_tokens: int) -> None:
        self.component = component
        self.codec = Codec(component.codec)
        self.block_tokens = block_tokens
        shape = (num_layers, num_blocks, component.heads, block_tokens)
        payload = take_memory(prod(shape) * component.row_bytes)
        self.payload = payload.view(*shape, component.row_bytes)
        self.scales = torch.zeros(shape, dtype=torch.uint8) if scale_bytes(self.codec) else None
        self.payload_view: U8 = self.payload.numpy()
        self.scales_view: U8 | None = None if self.scales is None else self.scales.numpy()
        self._touch(num_layers * component.heads * block_tokens * component.row_bytes)
        # None: seals take copies. Whoever wants the kernels for the model has built them before.
        self.library = native.load_built() if component.row_bytes % 4 == 0 else None
        units = (num_layers, component.heads, num_blocks, block_tokens // HASH_BLOCK_TOKENS)
        self.digests: U64 = np.zeros(units, np.uint64)
        self._planes_by_key: dict[int, native.SealedPlanes] = {}

    def _touch(self, block_bytes: int) -> None:
        """Write zeros to the first blocks, so that the system maps their pages before the first prompts arrive.

        Mapping them later took 2 % of the time of the first prompts. Mapping takes more than a second per GiB of the
        start, which a small model would spend on more tokens than its first prompts have.
        """
        first = slice(min(_TOUCHED_BYTES // block_bytes, _TOUCHED_TOKENS // self.block_tokens))
        self.payload[:, first] = 0
        if self.scales is not None:
            self.scales[:, first] = 0

    def planes(self, layer: int) -> Planes:
        """Planes of one layer: views of the store's memory."""
        return Planes(
            self.payload[layer], None if self.scales is None else self.scales[layer], NUMBER_CODES[self.codec]
        )

    def gather(
        self,
        block_table: Sequence[BlockId],
        tokens: range,
        into: PlaneBuffer | None = None,
        layers: range | None = None,
    ) -> tuple[U8, U8 | None]:
        """Copies: payload [layers, heads, tokens, row_bytes] and scales [layers, heads, tokens], in `into` if given.

        `layers` None: all.
        """
        spans = list(self._spans(block_table, tokens))
        part = slice(None) if layers is None else slice(layers.start, layers.stop)

        def take(plane: U8) -> U8:
            plane = plane[part]
            shape = (plane.shape[0], plane.shape[2], len(tokens), *plane.shape[4:])
            copy = np.empty(shape, np.uint8) if into is None else into.take(shape)
            for block, within, place in spans:
                copy[:, :, place] = plane[:, block, :, within]
            return copy

        return take(self.payload_view), None if self.scales_view is None else take(self.scales_view)

    def _spans(self, block_table: Sequence[BlockId], tokens: range) -> Iterator[tuple[BlockId, slice, slice]]:
        """Each block of a range, with the place of its part of the range in the block and in the range."""
        size, start = self.block_tokens, tokens.start
        while start < tokens.stop:
            first = start % size
            end = min(start - first + size, tokens.stop)
            yield (
                block_table[start // size],
                slice(first, first + end - start),
                slice(start - tokens.start, end - tokens.start),
            )
            start = end

    def digests_in_place(self, parts: HashBlocks, place: U64, key: int) -> U64 | None:
        """Digests uint64 [layers, heads, n] of hash blocks, computed without a copy; None: no native library."""
        if self.library is None:
            return None
        digests, place = np.empty(place.shape, np.uint64), np.ascontiguousarray(place)
        self.library.digest(self._keyed(key), *parts.arguments, place.ctypes.data, digests.ctypes.data)
        return digests

    def take_in_place(
        self, parts: HashBlocks, place: U64, key: int, into: PlaneBuffer | None = None
    ) -> tuple[U8, U8 | None, U64] | None:
        """The copies of `gather` and their digests [layers, heads, n], in one pass; None: no native library."""
        if self.library is None:
            return None
        rows = (self.payload.shape[0], self.component.heads, int(parts.tokens.sum()))
        empty = (lambda shape: np.empty(shape, np.uint8)) if into is None else into.take
        payload = empty((*rows, self.component.row_bytes))
        scales = None if self.scales is None else empty(rows)
        digests, place = np.empty(place.shape, np.uint64), np.ascontiguousarray(place)
        to = payload.ctypes.data, None if scales is None else scales.ctypes.data, digests.ctypes.data
        self.library.take(self._keyed(key), *parts.arguments, place.ctypes.data, *to)
        return payload, scales, digests

    def put_in_place(self, parts: HashBlocks, rows: tuple[U8, U8 | None]) -> bool:
        """Write rows of all layers and heads, in the layout of `gather`. False: nothing is written, use `scatter`."""
        payload, scales = rows
        is_plain = payload.flags.c_contiguous and (scales is None or scales.flags.c_contiguous)
        if self.library is None or not is_plain:
            return False
        source = payload.ctypes.data, None if scales is None else scales.ctypes.data
        self.library.put(self._keyed(0), *parts.arguments, *source)
        return True

    def _keyed(self, key: int) -> native.SealedPlanes:
        """`sealed_planes` of this key, built once."""
        if key not in self._planes_by_key:
            self._planes_by_key[key] = self.sealed_planes(key)
        return self._planes_by_key[key]

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
        part, row = slice(layers.start, layers.stop), slice(heads.start, heads.stop)
        for block, within, place in self._spans(block_table, tokens):
            self.payload_view[part, block, row, within] = payload[:, :, place]
            if self.scales_view is not None:
                assert scales is not None, "rows of one byte per number come with scales"
                self.scales_view[part, block, row, within] = scales[:, :, place]

    def clear(self, layers: Sequence[int], blocks: I64, units: I64) -> None:
        """Write zeros to hash blocks of some layers: number i is hash block units[i] of block blocks[i]."""
        clear_hash_blocks(self.payload, self.scales, layers, blocks, units)


def clear_hash_blocks(
    payload: torch.Tensor, scales: torch.Tensor | None, layers: Sequence[int], blocks: I64, units: I64
) -> None:
    """Write zeros to hash blocks of some layers of planes in the layout that `store.py` draws, on any device."""
    numbers = torch.tensor(layers)[:, None], torch.from_numpy(blocks)[None], torch.from_numpy(units)[None]
    layer, block, unit = (number.to(payload.device) for number in numbers)
    num_layers, num_blocks, heads, block_tokens, row_bytes = payload.shape
    shape = num_layers, num_blocks, heads, block_tokens // HASH_BLOCK_TOKENS, HASH_BLOCK_TOKENS
    payload.view(*shape, row_bytes)[layer, block, :, unit] = 0
    if scales is not None:
        scales.view(shape)[layer, block, :, unit] = 0
