"""Store of the bytes of all blocks on one rank: written and sealed by the step, read for peers, filled from peers.

Knows planes, blocks and seals. Knows no prompts, nor which blocks are free (`kv/cache/pool.py`).

    payload  uint8 [layers, num_blocks, heads, block_tokens, row_bytes]   one per component
    scales   uint8 [layers, num_blocks, heads, block_tokens]              fp8 only
    digests  uint64 [layers, heads, num_blocks, hash blocks per block]    one per component, with the generation of the
                                                                          block and the tokens that they cover

A hash block may be here without its windowed layers (`kv/windows.py`). Then zeros stand in them, which have no digest
and are never read for a peer.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...core.errors import KvCorrupted
from ...kernels.reference import Planes
from ..block import BlockId
from ..codec import U8, Codec, transcode
from ..digest import MAX_HASH_BLOCKS, U64, frame_digests, places, unit_digests
from ..section import HeldTokens, PlaneBuffer, SectionData
from ..spec import COMPONENT_NUMBERS, HASH_BLOCK_TOKENS, Component, KvSpec
from ..windows import lacks_windows, layer_runs
from .planes_cpu import CpuPlanes, HashBlocks
from .sealer import Marks, Sealer

if TYPE_CHECKING:  # needs triton, which may be absent on machines without a GPU
    from .planes_device import DeviceDigests, DevicePlanes, StepBirths
    from .states import StateStore

    ComponentStore = CpuPlanes | DevicePlanes

_NOT_SEALED = -1


class KvStore:
    """The store of one rank. Used by the engine's thread only."""

    def __init__(
        self,
        spec: KvSpec,
        num_blocks: int,
        block_tokens: int,
        device: torch.device | str = "cpu",
        digest_key: int = 0,
        *,
        by_kernels: bool | None = None,
        states: StateStore | None = None,
    ) -> None:
        """`digest_key`: the cluster's 64-bit key, the same on every worker. `states`: of a model that has some.

        `by_kernels`: Triton kernels move bytes and compute digests. None: on every device except a CPU (on a CPU they
        need Triton's interpreter).
        """
        self.device = torch.device(device)
        self.spec = spec
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self.states = states
        self._key = digest_key
        uses_kernels = self.device.type != "cpu" if by_kernels is None else by_kernels
        self._births: DeviceDigests | None = None
        self._components: list[ComponentStore] = []
        if uses_kernels:
            self._use_kernels()
        else:
            self._components += [CpuPlanes(c, *self._shape) for c in spec.main.components]
        self._layers = np.arange(spec.main.num_layers)
        self._first_places = {c.name: self._place_words_of(c, np.zeros(1, np.int64)) for c in spec.main.components}
        self._planes = [tuple(c.planes(layer) for c in self._components) for layer in range(spec.main.num_layers)]
        per_block = block_tokens // HASH_BLOCK_TOKENS
        self._sealed_generation = np.full((num_blocks, per_block), _NOT_SEALED, np.int64)
        self._sealed_tokens = np.zeros((num_blocks, per_block), np.int64)
        # Generation in which a hash block came without its windowed layers.
        self._lacking_generation = np.full((num_blocks, per_block), _NOT_SEALED, np.int64)
        windowed = spec.main.windowed
        self._windowed = np.array([] if windowed is None else windowed.layers, np.int64)
        marks = Marks(self._sealed_generation, self._sealed_tokens)
        self._sealer = Sealer.make(self._components, list(self._first_places.values()), digest_key, marks)

    @property
    def components(self) -> tuple[ComponentStore, ...]:
        """Planes and digests of each component, in the order of the spec: the store's own memory."""
        return tuple(self._components)

    @property
    def _shape(self) -> tuple[int, int, int]:
        return self.spec.main.num_layers, self.num_blocks, self.block_tokens

    def _use_kernels(self) -> None:
        from .planes_device import DeviceDigests, DevicePlanes

        planes = [DevicePlanes(c, *self._shape, self.device) for c in self.spec.main.components]
        self._components += planes
        if [c.name for c in self.spec.main.components] == ["k", "v"]:
            self._births = DeviceDigests(planes[0], planes[1], self._key)

    def on_host(self, num_blocks: int) -> KvStore:
        """An empty store in host memory, with the same spec, block size and digest key."""
        return KvStore(self.spec, num_blocks, self.block_tokens, digest_key=self._key)

    def release(self) -> None:
        """Give the memory of all planes back, whoever still refers to the store. It must not be used any more."""
        self._components.clear()
        self._planes.clear()
        self._births = self._sealer = self.states = None

    # ------------------------------------------------------------------ the step

    def planes(self, layer: int) -> tuple[Planes, ...]:
        """Planes of one layer, one per component of the spec: the store's own memory."""
        return self._planes[layer]

    def births(self, slots: Tensor) -> StepBirths | None:
        """Destination of the digests of a step that writes the tokens at slots [rows]; None: seals read the bytes."""
        return None if self._births is None else self._births.begin(slots)

    def seal(self, held: HeldTokens) -> None:
        """Digest the hash blocks of a range that was just computed; the last one may be partial.

        If the first tokens of a hash block are sealed already (a prompt's tail), the digest of the others is added to
        that seal, so that the seal does not cover damage done in between.
        """
        if held.count == 0 or self._seal_by_birth([held]):
            return
        first = held.start // HASH_BLOCK_TOKENS
        block, unit, generation = self._place(held, first)
        sealed = self._sealed_tokens[block, unit] if self._sealed_generation[block, unit] == generation else 0
        present = min(held.end - held.start, HASH_BLOCK_TOKENS)
        if 0 < sealed < present:
            self._extend_seal(held, int(sealed), present)
            rest = HeldTokens(held.block_table, held.generations, held.start + present, held.count - present)
            self.seal(rest)
            return
        blocks, units, generations = self._places(held)
        for store in self._components:
            store.digests[:, :, blocks, units] = self._digest(store, held)
        self._mark_sealed(held, blocks, units, generations)
        self._tell_births(held)

    def seal_all(self, ranges: Sequence[HeldTokens]) -> None:
        """Seal each range of a step; no range may be empty. Ranges without a begun seal take one kernel call."""
        if not ranges or self._seal_by_birth(ranges):
            return
        fresh: list[HeldTokens] = []
        for held in ranges:
            if self._sealer is None or self._begins_sealed(held):
                self.seal(held)
            else:
                fresh.append(held)
        if self._sealer is not None and fresh:
            self._seal_in_place(self._sealer, fresh)

    def _begins_sealed(self, held: HeldTokens) -> bool:
        block, unit, generation = self._place(held, held.start // HASH_BLOCK_TOKENS)
        return bool(self._sealed_generation[block, unit] == generation)

    def _seal_in_place(self, sealer: Sealer, ranges: Sequence[HeldTokens]) -> None:
        """Seal ranges whose first hash block is not sealed yet, by one call of the CPU kernels."""
        sealer.seal([
            (*self._place(held, number), number, min(held.end - number * HASH_BLOCK_TOKENS, HASH_BLOCK_TOKENS))
            for held in ranges
            for number in range(held.start // HASH_BLOCK_TOKENS, -(-held.end // HASH_BLOCK_TOKENS))
        ])  # fmt: skip
        if self._windowed.size:
            for held in ranges:
                blocks, units, _ = self._places(held)
                self._lacking_generation[blocks, units] = _NOT_SEALED

    def is_sealed(self, held: HeldTokens) -> bool:
        """True if a range is sealed for these generations of its blocks. Does not read the bytes: `verify` does."""
        try:
            self._check_sealed(held)
        except KvCorrupted:
            return False
        return True

    def verify(self, held: HeldTokens) -> bool:
        """True if a range is sealed for these generations of its blocks and its bytes match the seals."""
        if not self.is_sealed(held):
            return False
        whole = self._sealed_extent(held)
        blocks, units, _ = self._places(whole)
        is_there = np.ones((len(self._layers), 1, len(blocks)), bool)
        is_there[np.ix_(self._windowed, np.zeros(1, np.int64), np.flatnonzero(self._lacks_windows(whole)))] = False
        return not any(
            ((store.digests[:, :, blocks, units] != self._digest(store, whole)) & is_there).any()
            for store in self._components
        )

    def parts(self, held: HeldTokens) -> list[tuple[HeldTokens, bool]]:
        """The range in parts of whole hash blocks that are all here without their windowed layers (True), or with."""
        numbered = groupby(enumerate(self._lacks_windows(held).tolist()), key=lambda each: each[1])
        found = []
        for lacks, each in numbered:
            numbers = [number for number, _ in each]
            start = held.start + numbers[0] * HASH_BLOCK_TOKENS
            end = min(held.end, held.start + (numbers[-1] + 1) * HASH_BLOCK_TOKENS)
            found.append((HeldTokens(held.block_table, held.generations, start, end - start), lacks))
        return found

    # ------------------------------------------------------------------ peers

    def read_tokens(
        self, held: HeldTokens, into: PlaneBuffer | None = None, *, without_windows: bool = False
    ) -> tuple[SectionData, ...]:
        """Copies of a range's planes with their sealed digests, one section per component.

        `into` receives the planes: per section, payload before scales.
        If the range ends inside a hash block that is sealed further, that block is verified and its part digested.
        `without_windows`: of the full layers only, one section per component and run of neighbouring ones.

        Raises:
            KvCorrupted: a hash block is not sealed for this generation of its block, or is here without its windowed
                layers, or the last one is damaged.
        """
        self._check_sealed(held)
        blocks, units, _ = self._places(held)
        lacking = self._lacks_windows(held)
        if lacking.any() and not without_windows:
            raise KvCorrupted(f"block {blocks[int(np.argmax(lacking))]} is here without its windowed layers")
        cut = int(self._sealed_tokens[blocks[-1], units[-1]]) != (held.end - 1) % HASH_BLOCK_TOKENS + 1
        last = held.end - (held.end - 1) % HASH_BLOCK_TOKENS - 1
        tail = HeldTokens(held.block_table, held.generations, last, held.end - last)
        if cut and not self.verify(tail):
            raise KvCorrupted(f"block {blocks[-1]} does not hold what was sealed")
        sections = []
        for store in self._components:
            for run in layer_runs(self.spec.main, without_windows=without_windows):
                copied = self._copies(store, held, into, run)
                digests = store.digests[run.start : run.stop, :, blocks, units]
                if cut:
                    digests[:, :, -1] = self._digest(store, tail)[run.start : run.stop, :, 0]
                sections.append(_section(store.component, run.start, copied, digests))
        return tuple(sections)

    def write_tokens(self, held: HeldTokens, sections: Sequence[SectionData]) -> None:
        """Store planes that were verified on arrival, with their digests.

        Rows of another codec are translated and sealed again. A section may hold a part of the layers and heads, but
        all sections together must hold all of this rank's, or all but the windowed layers'. Other groups than the main
        one are ignored.

        Raises:
            KvCorrupted: layers or heads are missing, or a translated number is not finite.
        """
        blocks, units, generations = self._places(held)
        sections = [section for section in sections if section.group == self.spec.main.name]
        lacks = lacks_windows(sections, self.spec.main.windowed)
        for store in self._components:
            mine = [section for section in sections if section.component == store.component.name]
            covered = np.zeros(len(self._layers), np.int64)
            for section in mine:
                covered[section.layer_start : section.layer_start + section.layer_count] += section.head_count
            wanted = np.full(len(self._layers), store.component.heads)
            wanted[self._windowed] *= not lacks
            if not np.array_equal(covered, wanted):
                name = store.component.name
                raise KvCorrupted(f"sections hold {covered.sum()} layer-heads of {name}, not each one once")
            if lacks:
                store.clear(self._windowed.tolist(), blocks, units)
            for section in mine:
                self._write_section(store, held, section)
            if any(Codec(section.codec) is not store.codec for section in mine):
                store.digests[:, :, blocks, units] = self._digest(store, held)
        self._mark_sealed(held, blocks, units, generations)
        if lacks:
            self._lacking_generation[blocks, units] = generations
        self._tell_births(held)

    # ------------------------------------------------------------------ inside

    def _lacks_windows(self, held: HeldTokens) -> NDArray[np.bool_]:
        """Of each hash block of a range: whether it is here without its windowed layers."""
        blocks, units, generations = self._places(held)
        lacks: NDArray[np.bool_] = self._lacking_generation[blocks, units] == generations
        return lacks

    def _copies(
        self, store: ComponentStore, held: HeldTokens, into: PlaneBuffer | None, layers: range
    ) -> tuple[U8, U8 | None, U64 | None]:
        """Copies of a range's payload and scales, with their digests if they were computed in the same pass."""
        if isinstance(store, CpuPlanes) and len(layers) == len(self._layers):
            words = self._place_words(store, self._numbers(held))
            copied = store.take_in_place(self._hash_blocks(held), words, self._key, into)
            if copied is not None:
                return copied
        return *store.gather(held.block_table, range(held.start, held.end), into, layers), None

    def _hash_blocks(self, held: HeldTokens) -> HashBlocks:
        blocks, units, _ = self._places(held)
        return HashBlocks(blocks, units * HASH_BLOCK_TOKENS, self._counts(held))

    def _numbers(self, held: HeldTokens) -> NDArray[np.int64]:
        """Numbers of a range's hash blocks in the sequence."""
        return np.arange(held.start // HASH_BLOCK_TOKENS, -(-held.end // HASH_BLOCK_TOKENS))

    def _place(self, held: HeldTokens, hash_block: int) -> tuple[BlockId, int, int]:
        index, offset = divmod(hash_block * HASH_BLOCK_TOKENS, self.block_tokens)
        return held.block_table[index], offset // HASH_BLOCK_TOKENS, held.generations[index]

    def _places(self, held: HeldTokens) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Block, hash block within it, and generation of each hash block of a range."""
        assert held.start % HASH_BLOCK_TOKENS == 0, "seals begin at a hash block"
        starts = np.arange(held.start, held.end, HASH_BLOCK_TOKENS)
        first, last = held.start // self.block_tokens, -(-held.end // self.block_tokens)
        index = starts // self.block_tokens - first
        blocks = np.array(held.block_table[first:last], np.int64)[index]
        generations = np.array(held.generations[first:last], np.int64)[index]
        return blocks, starts % self.block_tokens // HASH_BLOCK_TOKENS, generations

    def _mark_sealed(
        self, held: HeldTokens, blocks: NDArray[np.int64], units: NDArray[np.int64], generations: NDArray[np.int64]
    ) -> None:
        self._sealed_tokens[blocks, units] = self._counts(held)
        self._sealed_generation[blocks, units] = generations
        self._lacking_generation[blocks, units] = _NOT_SEALED

    def _check_sealed(self, held: HeldTokens) -> None:
        blocks, units, generations = self._places(held)
        good = (self._sealed_generation[blocks, units] == generations) & (
            self._sealed_tokens[blocks, units] >= self._counts(held)
        )
        if not good.all():
            block = blocks[int(np.argmin(good))]
            raise KvCorrupted(f"block {block} is not sealed for this use of it")

    def _sealed_extent(self, held: HeldTokens) -> HeldTokens:
        """The range, extended to the end of the sealed part of its last hash block."""
        blocks, units, _ = self._places(held)
        last = held.end - (held.end - 1) % HASH_BLOCK_TOKENS - 1
        end = last + int(self._sealed_tokens[blocks[-1], units[-1]])
        return HeldTokens(held.block_table, held.generations, held.start, end - held.start)

    def _seal_by_birth(self, ranges: Sequence[HeldTokens]) -> bool:
        """Seal with the digests that steps computed on the device; False if they do not cover exactly these tokens."""
        if self._births is None:
            return False
        each = [self._places(held) for held in ranges]
        blocks, units, _ = (np.concatenate(parts) for parts in zip(*each, strict=True))
        digests = self._births.digests(blocks, units, np.concatenate([self._counts(held) for held in ranges]))
        if digests is None:
            return False
        for store, born in zip(self._components, digests, strict=True):
            store.digests[:, :, blocks, units] = born
        for held, places_of in zip(ranges, each, strict=True):
            self._mark_sealed(held, *places_of)
        return True

    def _tell_births(self, held: HeldTokens) -> None:
        """Copy digests computed from the bytes to the device, so that the digests of later tokens are added to them."""
        if self._births is not None and held.count:
            blocks, units, _ = self._places(held)
            digests = [store.digests[:, :, blocks, units] for store in self._components]
            self._births.set(blocks, units, self._counts(held), digests)

    def _counts(self, held: HeldTokens) -> NDArray[np.int64]:
        """Tokens of the range in each of its hash blocks."""
        return np.minimum(held.end - np.arange(held.start, held.end, HASH_BLOCK_TOKENS), HASH_BLOCK_TOKENS)

    def _extend_seal(self, held: HeldTokens, sealed: int, present: int) -> None:
        hash_block = held.start // HASH_BLOCK_TOKENS
        block, unit, _ = self._place(held, hash_block)
        part = HeldTokens(held.block_table, held.generations, held.start, present)
        for store in self._components:
            payload, scales = self._gather(store, part)
            place = self._place_words(store, np.array([hash_block]))[..., 0]
            rest_scales = None if scales is None else np.ascontiguousarray(scales[..., sealed:])
            rest = np.ascontiguousarray(payload[..., sealed:, :])
            store.digests[:, :, block, unit] += unit_digests(rest, rest_scales, place, self._key, sealed)
        self._sealed_tokens[block, unit] = present
        self._tell_births(part)

    def _digest(self, store: ComponentStore, held: HeldTokens) -> U64:
        """Digests [layers, heads, hash blocks] of the present contents of the planes."""
        words = self._place_words(store, self._numbers(held))
        if isinstance(store, CpuPlanes):
            digests = store.digests_in_place(self._hash_blocks(held), words, self._key)
            if digests is not None:
                return digests
        payload, scales = self._gather(store, held)
        return frame_digests(payload, scales, words, self._key, HASH_BLOCK_TOKENS)

    def _place_words(self, store: ComponentStore, hash_blocks: NDArray[np.int64]) -> U64:
        """Place words uint64 [layers, heads, n]. Only the lowest bits differ from those of hash block 0.

        Raises:
            ValueError: a hash block is outside the limit of `places`.
        """
        if hash_blocks.size and hash_blocks.max() >= MAX_HASH_BLOCKS:
            return self._place_words_of(store.component, hash_blocks)  # raises ValueError
        return self._first_places[store.component.name] | hash_blocks.astype(np.uint64)

    def _place_words_of(self, component: Component, hash_blocks: NDArray[np.int64]) -> U64:
        heads = component.first_head + np.arange(component.heads)
        return places(self._layers[:, None, None], COMPONENT_NUMBERS[component.name], heads[:, None], hash_blocks)

    def _gather(self, store: ComponentStore, held: HeldTokens) -> tuple[U8, U8 | None]:
        """Copies: payload [layers, heads, tokens, row_bytes] and scales [layers, heads, tokens]."""
        return store.gather(held.block_table, range(held.start, held.end))

    def _write_section(self, store: ComponentStore, held: HeldTokens, section: SectionData) -> None:
        encoded = transcode(section.payload, section.scales, Codec(section.codec), store.codec)
        if encoded.non_finite:
            raise KvCorrupted(f"{encoded.non_finite} rows of {section.component} are not finite")
        layers = range(section.layer_start, section.layer_start + section.layer_count)
        heads = range(section.head_start, section.head_start + section.head_count)
        rows = (encoded.payload, encoded.scales)
        is_whole = len(layers) * len(heads) == len(self._layers) * store.component.heads
        if not (is_whole and isinstance(store, CpuPlanes) and store.put_in_place(self._hash_blocks(held), rows)):
            store.scatter(held.block_table, range(held.start, held.end), layers, heads, rows)
        hash_blocks, units, _ = self._places(held)
        part, row = slice(layers.start, layers.stop), slice(heads.start, heads.stop)
        store.digests[part, row, hash_blocks, units] = section.digests


def _section(
    component: Component, layer_start: int, copied: tuple[U8, U8 | None, U64 | None], digests: U64
) -> SectionData:
    payload, scales, found = copied
    layers, heads = payload.shape[:2]
    return SectionData(
        group="main",
        component=component.name,
        layer_start=layer_start,
        layer_count=layers,
        head_start=0,
        head_count=heads,
        codec=component.codec,
        row_bytes=component.row_bytes,
        payload=payload,
        scales=scales,
        digests=digests,
        found=found,
    )
