"""Planes of one component on a device, moved by the gather and scatter kernels, and digests that steps compute there.

`DeviceDigests` adds up, on the device, each row's contribution to its hash block's digest. The fused store kernel
computes it from the registers that the row was written from. So a seal reads a few sums instead of the bytes, and
no byte can change between writing and sealing. Sums of 64-bit integers do not depend on the order of programs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...kernels.gpu.move_tokens import gather_tokens, scatter_tokens
from ...kernels.reference import Planes
from ...kernels.reference_kv import Seal, digest_keys
from ..block import BlockId
from ..codec import NUMBER_CODES, U8, Codec, scale_bytes
from ..digest import U64
from ..section import PlaneBuffer
from ..spec import COMPONENT_NUMBERS, HASH_BLOCK_TOKENS, Component
from .planes_cpu import clear_hash_blocks

I64 = NDArray[np.int64]


class DevicePlanes:
    """Device version of `planes_cpu.CpuPlanes`. Digests are kept on the host, beside their blocks' generations."""

    def __init__(
        self, component: Component, num_layers: int, num_blocks: int, block_tokens: int, device: torch.device
    ) -> None:
        self.component = component
        self.codec = Codec(component.codec)
        self.device = device
        shape = (num_layers, num_blocks, component.heads, block_tokens)
        self.payload = torch.zeros((*shape, component.row_bytes), dtype=torch.uint8, device=device)
        is_scaled = scale_bytes(self.codec) == 1
        self.scales = torch.zeros(shape, dtype=torch.uint8, device=device) if is_scaled else None
        units = (num_layers, component.heads, num_blocks, block_tokens // HASH_BLOCK_TOKENS)
        self.digests: U64 = np.zeros(units, np.uint64)

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
        """Copies in the shapes of `CpuPlanes.gather`, in `into` or in pinned memory; waits for the device's work."""
        part = slice(None) if layers is None else slice(layers.start, layers.stop)
        store = Planes(self.payload[part], None if self.scales is None else self.scales[part])
        rows = gather_tokens(store, self._table(block_table, tokens), tokens, range(self.component.heads))
        payload = self._to_host(rows.payload, into)
        return payload, None if rows.scales is None else self._to_host(rows.scales, into)

    def scatter(
        self, block_table: Sequence[BlockId], tokens: range, layers: range, heads: range, rows: tuple[U8, U8 | None]
    ) -> None:
        """Write `rows` of the given layers and heads, in the layout that `gather` returns."""
        payload, scales = rows
        part = slice(layers.start, layers.stop)
        assert (scales is None) == (self.scales is None), "rows of one byte per number come with scales"
        store = Planes(self.payload[part], None if self.scales is None else self.scales[part])
        source = Planes(self._to_device(payload), None if scales is None else self._to_device(scales))
        scatter_tokens(store, self._table(block_table, tokens), tokens, heads, source)

    def clear(self, layers: Sequence[int], blocks: I64, units: I64) -> None:
        """Write zeros to hash blocks of some layers, as `CpuPlanes.clear`."""
        clear_hash_blocks(self.payload, self.scales, layers, blocks, units)

    def _table(self, block_table: Sequence[BlockId], tokens: range) -> Tensor:
        """Blocks up to the end of the range, on the device; entries before its start are not read, may be invalid."""
        block_tokens = self.payload.shape[3]
        blocks = np.asarray(block_table[: -(-tokens.stop // block_tokens)], np.int64)
        return torch.from_numpy(blocks).to(self.device)

    def _to_host(self, rows: Tensor, into: PlaneBuffer | None) -> U8:
        if into is not None:
            target = into.take(tuple(rows.shape))
            torch.from_numpy(target).copy_(rows)
            return target
        if self.device.type == "cpu":
            return rows.numpy()
        pinned = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
        pinned.copy_(rows)  # waits for the step: the copy runs on the same stream
        view: U8 = pinned.numpy()
        return view

    def _to_device(self, rows: U8) -> Tensor:
        held = torch.empty(rows.shape, dtype=torch.uint8, pin_memory=self.device.type != "cpu")
        held.numpy()[...] = rows
        return held.to(self.device, non_blocking=True)  # torch does not reuse the pinned memory before the copy ends


class DeviceDigests:
    """Digests that steps compute on the device, for a store of plain keys and values."""

    def __init__(self, k: DevicePlanes, v: DevicePlanes, key: int) -> None:
        layers, num_blocks, heads, block_tokens, row_bytes = k.payload.shape
        self._num_units = num_blocks * block_tokens // HASH_BLOCK_TOKENS
        self._per_block = block_tokens // HASH_BLOCK_TOKENS
        self._device = k.device
        self._sums = torch.zeros((layers, 2, self._num_units + 1, heads), dtype=torch.int64, device=k.device)
        self._seen = torch.zeros(self._num_units + 1, dtype=torch.int32, device=k.device)
        keys = digest_keys(key, row_bytes, k.device)
        numbers = (COMPONENT_NUMBERS[k.component.name], COMPONENT_NUMBERS[v.component.name])
        self._seals = [Seal(keys, layer, k.component.first_head, *numbers) for layer in range(layers)]

    def begin(self, slots: Tensor) -> StepBirths:
        """Prepare a step that writes rows at slots [rows] int64 on the device; negative slots are padding."""
        offsets, is_real = slots % HASH_BLOCK_TOKENS, slots >= 0
        units = torch.where(is_real, torch.div(slots, HASH_BLOCK_TOKENS, rounding_mode="floor"), self._num_units)
        first = torch.where(offsets == 0, units, self._num_units)
        self._sums.index_fill_(2, first, 0)
        self._seen.index_fill_(0, first, 0)
        bits = torch.bitwise_left_shift(torch.ones_like(offsets), offsets).int()
        self._seen.index_add_(0, units, bits)
        return StepBirths(self._sums, units, self._seals)

    def digests(self, blocks: I64, units: I64, counts: I64) -> list[U64] | None:
        """Digests of k and of v, uint64 [layers, heads, n] each.

        They cover the first `counts` tokens of n hash blocks; hash block i is number `units[i]` of block `blocks[i]`.
        None if the sums cover other tokens.
        """
        places = torch.from_numpy(blocks * self._per_block + units).to(self._device)
        seen = self._seen.index_select(0, places).cpu().numpy()
        if not np.array_equal(seen, (1 << counts) - 1):
            return None
        sums = self._sums.index_select(2, places).cpu().numpy().view(np.uint64)  # [layers, 2, n, heads]
        return [sums[:, i].swapaxes(1, 2) for i in range(2)]

    def set(self, blocks: I64, units: I64, counts: I64, digests: Sequence[U64]) -> None:
        """Set the sums to digests that were computed from the bytes, so that a later step adds to them."""
        places = torch.from_numpy(blocks * self._per_block + units).to(self._device)
        sums = np.stack([np.ascontiguousarray(part.swapaxes(1, 2)) for part in digests], axis=1)
        self._sums.index_copy_(2, places, torch.from_numpy(sums.view(np.int64)).to(self._device))
        seen = torch.from_numpy(((1 << counts) - 1).astype(np.int32)).to(self._device)
        self._seen.index_copy_(0, places, seen)


class StepBirths:
    """Destination of the digests of one step."""

    def __init__(self, sums: Tensor, units: Tensor, seals: Sequence[Seal]) -> None:
        self._sums = sums
        self._units = units
        self._seals = seals

    def seal(self, layer: int) -> Seal:
        """Keys and component numbers with which the kernel digests a layer's rows."""
        return self._seals[layer]

    def add(self, layer: int, digests: Tensor) -> None:
        """Add a layer's digests of rows, int64 [2, rows, heads], as `kernels.rotary_store` returns them."""
        self._sums[layer].index_add_(1, self._units, digests)
