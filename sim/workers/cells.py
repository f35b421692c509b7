"""Simulated KV that can be checked: the KV of a token identifies exactly the prefix that ends with this token.

A *cell* is the 64-bit number of one token position, a function of the isolation domain and of all ids up to there.
Planes hold cells; kv/digest.py makes the seals of those planes. Knows no sequence and no operation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache

import numpy as np

from ...core.errors import KvCorrupted
from ...kv.block import BlockId
from ...kv.cache.pool import BlockPool
from ...kv.digest import frame_digests, places
from ...kv.section import HeldTokens, SectionData
from ...kv.spec import HASH_BLOCK_TOKENS, Component, KvSpec, LayerGroup, WindowedLayers
from ..invariants import Violation

DIGEST_KEY = 0x5EED
CELL_BYTES = 8


@lru_cache
def spec_of(window: int, heads: int = 1) -> KvSpec:
    """Planes of 8 bytes per token and head; with a window a second layer that sees so many tokens."""
    component = Component("k", heads, 2, 3)
    if not window:
        return KvSpec((LayerGroup("main", 1, (component,)),))
    return KvSpec((LayerGroup("main", 2, (component,), WindowedLayers((1,), window)),))


SPEC = spec_of(0)

_MASK = (1 << 64) - 1
_POISON = 0xDEAD
_UNIT = HASH_BLOCK_TOKENS


def mix(previous: int, value: int) -> int:
    """64-bit hash of both numbers. Source: the finaliser of splitmix64 (Steele, Lea and Flood 2014)."""
    x = (previous + (value + 1) * 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    return x ^ (x >> 31)


def domain_cell(domain: str) -> int:
    """Cell before the first token of every prompt of a tenant."""
    return mix(int.from_bytes(domain.encode()[:8], "little"), 0x70)


def cells_after(cell: int, token_ids: Iterable[int]) -> list[int]:
    """Cells of `token_ids`, which follow the token whose cell is `cell`."""
    cells = []
    for token_id in token_ids:
        cell = mix(cell, token_id)
        cells.append(cell)
    return cells


@lru_cache(maxsize=1 << 14)
def _digest(planes: bytes, unit: int) -> int:
    payload = np.frombuffer(planes, np.uint8).reshape(1, 1, -1, CELL_BYTES)
    return int(frame_digests(payload, None, places([[[0]]], 0, [[0]], [unit]), DIGEST_KEY, _UNIT)[0, 0, 0])


def digest_of(cells: Sequence[int], unit: int) -> int:
    """The digest of one hash block's (or tail's) cells."""
    return _digest(np.array(cells, np.uint64).tobytes(), unit)


class CellStore:
    """Blocks of cells with their seals. Implements SealedStore of kv/store/host_store.py; every access is checked.

    With a pool, a writer must own the blocks that it writes. Without one (host memory), ownership is not checked.
    """

    def __init__(
        self, block_tokens: int, pool: BlockPool | None = None, damaged: Callable[[], bool] = lambda: False
    ) -> None:
        """`damaged()`: whether to damage a hash block that `write_tokens` has just written."""
        self._size = block_tokens
        self._pool = pool
        self._damaged = damaged
        self._uses: dict[BlockId, int] = {}
        self._cells: dict[BlockId, list[int]] = {}
        self._seals: dict[BlockId, dict[int, tuple[int, int]]] = {}  # by hash block: digest, and tokens it covers

    # ------------------------------------------------------------------ SealedStore

    def is_sealed(self, held: HeldTokens) -> bool:
        """Implements `SealedStore.is_sealed`."""
        return all(self._sealed(held, unit)[1] >= end - start for unit, start, end in _units(held))

    def seal(self, held: HeldTokens) -> None:
        """Implements `SealedStore.seal`. A seal over more tokens of the block stays."""
        for unit, start, end in _units(held):
            if self._sealed(held, unit)[1] < end - start:
                block, _ = self._place(held, start)
                self._seals[block][unit] = digest_of(self._get(held, start, end), unit), end - start

    def parts(self, held: HeldTokens) -> list[tuple[HeldTokens, bool]]:
        """Implements `SealedStore.parts`: the one layer has no window."""
        return [(held, False)]

    def read_tokens(self, held: HeldTokens, *, without_windows: bool = False) -> tuple[SectionData, ...]:
        """Implements `SealedStore.read_tokens`."""
        cells: list[int] = []
        digests = []
        for unit, start, end in _units(held):
            digest, count = self._sealed(held, unit)
            if count < end - start:
                raise Violation("K4", f"hash block {unit} leaves block {self._place(held, start)[0]} unsealed")
            got = self._get(held, start, end)
            if count > end - start:  # a part of the sealed range: verify the whole range, then digest the part
                if not self.verify(HeldTokens(held.block_table, held.generations, start, count)):
                    raise KvCorrupted(f"hash block {unit} does not hold what was sealed")
                digest = digest_of(got, unit)
            cells += got
            digests.append(digest)
        planes = np.array(cells, np.uint64).view(np.uint8).reshape(1, 1, -1, CELL_BYTES)
        seals = np.array(digests, np.uint64).reshape(1, 1, -1)
        return (SectionData("main", "k", 0, 1, 0, 1, 3, CELL_BYTES, planes, None, seals),)

    def write_tokens(self, held: HeldTokens, sections: Sequence[SectionData]) -> None:
        """Implements `SealedStore.write_tokens`."""
        (section,) = sections
        self.write(held, np.frombuffer(section.payload.tobytes(), np.uint64).tolist())
        for (unit, start, end), digest in zip(_units(held), section.digests.reshape(-1).tolist(), strict=True):
            block, offset = self._place(held, start)
            self._seals[block][unit] = digest, end - start
            if self._damaged():
                self._cells[block][offset] ^= 4

    def verify(self, held: HeldTokens) -> bool:
        """Implements `SealedStore.verify`."""
        for unit, start, end in _units(held):
            digest, count = self._sealed(held, unit)
            if count < end - start or digest_of(self._get(held, start, start + count), unit) != digest:
                return False
        return True

    # ------------------------------------------------------------------ the step

    def write(self, held: HeldTokens, cells: Sequence[int]) -> None:
        """Write cells that a step computed or a peer sent. The rest of a block in a new use is poison."""
        if len(cells) != held.count:
            raise Violation("K4", f"{len(cells)} tokens come for {held.count}")
        for place, cell in enumerate(cells, held.start):
            block, offset = self._place(held, place)
            if place == held.start or offset == 0:
                self._begin(block, held.generations[place // self._size])
            self._cells[block][offset] = cell

    def check_prefix(self, held: HeldTokens, known: Sequence[int]) -> None:
        """Check K3 and K4: a step reads the cells of its own tokens, in blocks that its sequence owns."""
        size = self._size
        for index in range(-(-held.count // size)):
            block, use = held.block_table[index], held.generations[index]
            self._check_use(block, use)
            expected = known[index * size : min(held.count, (index + 1) * size)]
            if self._uses.get(block) != use or self._cells[block][: len(expected)] != expected:
                raise Violation("K4", f"block {block} is read: not what stands for its tokens there")

    def check_owned(self, held: HeldTokens) -> None:
        """Check K3: the sequence still owns a range that is read for a hand-over or a swap."""
        for _, start, _ in _units(held):
            self._check_use(held.block_table[start // self._size], held.generations[start // self._size])

    def has(self, block: BlockId, cells: Sequence[int]) -> bool:
        """Return whether a block holds these cells, the first of them at the beginning of a hash block."""
        found, size = self._cells.get(block, []), len(cells)
        return any(found[start : start + size] == cells for start in range(0, len(found), _UNIT))

    # ------------------------------------------------------------------ inside

    def _place(self, held: HeldTokens, token: int) -> tuple[BlockId, int]:
        return held.block_table[token // self._size], token % self._size

    def _get(self, held: HeldTokens, start: int, end: int) -> list[int]:
        block, offset = self._place(held, start)
        use = held.generations[start // self._size]
        if self._uses.get(block) != use:
            raise Violation("K3", f"tokens {start}+{end - start} are read from block {block}, which is another's")
        return self._cells[block][offset : offset + end - start]

    def _sealed(self, held: HeldTokens, unit: int) -> tuple[int, int]:
        block, _ = self._place(held, unit * _UNIT)
        is_this_use = self._uses.get(block) == held.generations[unit * _UNIT // self._size]
        return self._seals[block].get(unit, (0, 0)) if is_this_use else (0, 0)

    def _begin(self, block: BlockId, use: int) -> None:
        pool = self._pool
        self._check_use(block, use)
        if pool is not None and pool.owners(block) == 0:
            raise Violation("K3", f"block {block} is written by somebody who has it no more")
        if pool is not None and (pool.owners(block) > 1 or pool.is_cached(block)):
            raise Violation("K3", f"block {block} is written though others read it")
        if self._uses.get(block) != use:
            self._uses[block], self._cells[block], self._seals[block] = use, [_POISON] * self._size, {}

    def _check_use(self, block: BlockId, use: int) -> None:
        if self._pool is not None and self._pool.generation(block) != use:
            raise Violation("K3", f"block {block} changed hands")


def _units(held: HeldTokens) -> list[tuple[int, int, int]]:
    """Hash blocks of a range: the number of each, and its tokens [start, end)."""
    return [(start // _UNIT, start, min(start + _UNIT, held.end)) for start in range(held.start, held.end, _UNIT)]
