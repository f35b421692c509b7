"""One component's planes on a device, moved by the gather and scatter kernels, and the digests that steps leave there.

`DeviceDigests` adds up, on the device, each row's contribution to its hash block's digest, as the fused store kernel
computes it from the registers that the row was written from. So a seal reads a few sums instead of the bytes, and
nothing can change between writing and sealing. Sums are of 64-bit integers: no order of programs changes them.
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
from ..codec import U8, Codec
from ..digest import U64
from ..spec import COMPONENT_NUMBERS, HASH_BLOCK_TOKENS, Component

I64 = NDArray[np.int64]


class DevicePlanes:
    """As `planes_cpu.CpuPlanes`; digests are kept on the host, beside the generations that they belong to."""

    def __init__(
        self, component: Component, num_layers: int, num_blocks: int, block_tokens: int, device: torch.device
    ) -> None:
        self.component = component
        self.codec = Codec(component.codec)
        self.device = device
        shape = (num_layers, num_blocks, component.heads, block_tokens)
        self.payload = torch.zeros((*shape, component.row_bytes), dtype=torch.uint8, device=device)
        is_scaled = self.codec is Codec.FP8_E4M3
        self.scales = torch.zeros(shape, dtype=torch.uint8, device=device) if is_scaled else None
        units = (num_layers, component.heads, num_blocks, block_tokens // HASH_BLOCK_TOKENS)
        self.digests: U64 = np.zeros(units, np.uint64)

    def planes(self, layer: int) -> Planes:
        """One layer's own memory."""
        return Planes(self.payload[layer], None if self.scales is None else self.scales[layer])

    def gather(self, block_table: Sequence[BlockId], tokens: range) -> tuple[U8, U8 | None]:
        """Copies in pinned host memory, once all that was asked of the device before is done."""
        store = Planes(self.payload, self.scales)
        rows = gather_tokens(store, self._table(block_table, tokens), tokens, range(self.component.heads))
        payload = self._to_host(rows.payload)
        return payload, None if rows.scales is None else self._to_host(rows.scales)

    def scatter(
        self, block_table: Sequence[BlockId], tokens: range, layers: range, heads: range, rows: tuple[U8, U8 | None]
    ) -> None:
        """Write `rows`, as `gather` gives them, of some layers and heads."""
        payload, scales = rows
        part = slice(layers.start, layers.stop)
        assert (scales is None) == (self.scales is None), "fp8 rows come with scales"
        store = Planes(self.payload[part], None if self.scales is None else self.scales[part])
        source = Planes(self._to_device(payload), None if scales is None else self._to_device(scales))
        scatter_tokens(store, self._table(block_table, tokens), tokens, heads, source)

    def _table(self, block_table: Sequence[BlockId], tokens: range) -> Tensor:
        """Blocks as far as the range needs them; entries before it may mean nothing, and are not read."""
        block_tokens = self.payload.shape[3]
        blocks = np.asarray(block_table[: -(-tokens.stop // block_tokens)], np.int64)
        return torch.from_numpy(blocks).to(self.device)

    def _to_host(self, rows: Tensor) -> U8:
        if self.device.type == "cpu":
            return rows.numpy()
        pinned = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
        pinned.copy_(rows)  # waits: the step's stream is ours
        view: U8 = pinned.numpy()
        return view

    def _to_device(self, rows: U8) -> Tensor:
        held = torch.empty(rows.shape, dtype=torch.uint8, pin_memory=self.device.type != "cpu")
        held.numpy()[...] = rows
        return held.to(self.device, non_blocking=True)  # its pinned memory is not given out again before it is read


class DeviceDigests:
    """The digests that steps leave on the device, for a store of plain keys and values."""

    def __init__(self, k: DevicePlanes, v: DevicePlanes, key: int) -> None:
        layers, num_blocks, heads, block_tokens, row_bytes = k.payload.shape
        self._num_units = num_blocks * block_tokens // HASH_BLOCK_TOKENS
        self._per_block = block_tokens // HASH_BLOCK_TOKENS
        self._device = k.device
        self._sums = torch.zeros((layers, 2, self._num_units + 1, heads), dtype=torch.int64, device=k.device)
        self._seen = torch.zeros(self._num_units + 1, dtype=torch.int32, device=k.device)
        keys = digest_keys(key, row_bytes, k.device)
        numbers = (COMPONENT_NUMBERS[k.component.name], COMPONENT_NUMBERS[v.component.name])
        self._seals = [Seal(keys, layer, 0, *numbers) for layer in range(layers)]

    def begin(self, slots: Tensor) -> StepBirths:
        """Make ready for a step's rows at slots [rows] int64 on the device, all of whose tokens will be written."""
        offsets, is_real = slots % HASH_BLOCK_TOKENS, slots >= 0
        units = torch.where(is_real, torch.div(slots, HASH_BLOCK_TOKENS, rounding_mode="floor"), self._num_units)
        first = torch.where(offsets == 0, units, self._num_units)
        self._sums.index_fill_(2, first, 0)
        self._seen.index_fill_(0, first, 0)
        bits = torch.bitwise_left_shift(torch.ones_like(offsets), offsets).int()
        self._seen.index_add_(0, units, bits)
        return StepBirths(self._sums, units, self._seals)

    def digests(self, blocks: I64, units: I64, counts: I64) -> list[U64] | None:
        """Of k and of v, uint64 [layers, heads, n]: the first `counts` tokens of n hash blocks of blocks.

        None where the sums are of other tokens than these.
        """
        places = torch.from_numpy(blocks * self._per_block + units).to(self._device)
        seen = self._seen.index_select(0, places).cpu().numpy()
        if not np.array_equal(seen, (1 << counts) - 1):
            return None
        sums = self._sums.index_select(2, places).cpu().numpy().view(np.uint64)  # [layers, 2, n, heads]
        return [sums[:, i].swapaxes(1, 2) for i in range(2)]

    def set(self, blocks: I64, units: I64, counts: I64, digests: Sequence[U64]) -> None:
        """Take digests that were made another way, so that a later step adds to them."""
        places = torch.from_numpy(blocks * self._per_block + units).to(self._device)
        sums = np.stack([np.ascontiguousarray(part.swapaxes(1, 2)) for part in digests], axis=1)
        self._sums.index_copy_(2, places, torch.from_numpy(sums.view(np.int64)).to(self._device))
        seen = torch.from_numpy(((1 << counts) - 1).astype(np.int32)).to(self._device)
        self._seen.index_copy_(0, places, seen)


class StepBirths:
    """Where one step's contributions go."""

    def __init__(self, sums: Tensor, units: Tensor, seals: Sequence[Seal]) -> None:
        self._sums = sums
        self._units = units
        self._seals = seals

    def seal(self, layer: int) -> Seal:
        """What the kernel digests a layer's rows with."""
        return self._seals[layer]

    def add(self, layer: int, digests: Tensor) -> None:
        """Take a layer's digests [2, rows, heads] int64 of rows as `kernels.rotary_store` gives them."""
        self._sums[layer].index_add_(1, self._units, digests)
