"""Simulated KV of two layers, one of which has a sliding window: hash blocks may be here without it.

The windowed layer of a token is a function of its cell, so only whether it is here is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby

import numpy as np

from ...core.errors import KvCorrupted
from ...kv.block import BlockId
from ...kv.cache.pool import BlockPool
from ...kv.digest import frame_digests, places
from ...kv.section import HeldTokens, SectionData
from ...kv.spec import HASH_BLOCK_TOKENS
from ..invariants import Violation
from .cells import DIGEST_KEY, CellStore

_MARK = np.uint64(0x57_49_4E_44_4F_57)
_LAYER = 1


def windowed_planes(cells: Sequence[int]) -> bytes:
    """The windowed layer of tokens with these cells."""
    return (np.array(cells, np.uint64) ^ _MARK).tobytes()


class WindowedCells(CellStore):
    """Blocks of cells, some hash blocks without their windowed layer."""

    def __init__(
        self,
        window: int,
        block_tokens: int,
        pool: BlockPool | None = None,
        damaged: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__(block_tokens, pool, damaged)
        self._window = window
        self._lacking: dict[BlockId, set[int]] = {}  # numbers of hash blocks inside a block, of its present use

    def lacks(self, block: BlockId) -> bool:
        """True if some hash block of a block is here without its windowed layer."""
        return bool(self._lacking.get(block))

    def parts(self, held: HeldTokens) -> list[tuple[HeldTokens, bool]]:
        """Implements `SealedStore.parts`."""
        found = []
        starts = range(held.start, held.end, HASH_BLOCK_TOKENS)
        for lacks, each in groupby(starts, key=lambda start: self._lacks_at(held, start)):
            numbers = list(each)
            end = min(held.end, numbers[-1] + HASH_BLOCK_TOKENS)
            found.append((replace(held, start=numbers[0], count=end - numbers[0]), lacks))
        return found

    def read_tokens(self, held: HeldTokens, *, without_windows: bool = False) -> tuple[SectionData, ...]:
        """Implements `SealedStore.read_tokens`."""
        (full,) = super().read_tokens(held)
        if without_windows:
            return (full,)
        if any(lacks for _, lacks in self.parts(held)):
            raise KvCorrupted(f"tokens {held.start}+{held.count} are here without their windowed layer")
        windowed = (full.payload.reshape(-1).view(np.uint64) ^ _MARK).view(np.uint8).reshape(full.payload.shape)
        numbers = np.arange(held.start // HASH_BLOCK_TOKENS, -(-held.end // HASH_BLOCK_TOKENS))
        place = places(np.full((1, 1, 1), _LAYER), 0, np.zeros((1, 1), np.int64), numbers)
        seals = frame_digests(windowed, None, place, DIGEST_KEY, HASH_BLOCK_TOKENS)
        payload = np.concatenate([full.payload, windowed])
        return (replace(full, layer_count=2, payload=payload, digests=np.concatenate([full.digests, seals])),)

    def write_tokens(self, held: HeldTokens, sections: Sequence[SectionData]) -> None:
        """Implements `SealedStore.write_tokens`."""
        (section,) = sections
        first = replace(section, layer_count=1, payload=section.payload[:1], digests=section.digests[:1])
        if section.layer_count == 2:
            cells = section.payload[0].reshape(-1).view(np.uint64)
            if section.payload[1].tobytes() != (cells ^ _MARK).tobytes():
                raise Violation("K4", f"the windowed layer of {held.start}+{held.count} is not that of its tokens")
        super().write_tokens(held, (first,))
        if section.layer_count == 1:
            for start in range(held.start, held.end, HASH_BLOCK_TOKENS):
                block, offset = self._place(held, start)
                self._lacking.setdefault(block, set()).add(offset // HASH_BLOCK_TOKENS)

    def write(self, held: HeldTokens, cells: Sequence[int]) -> None:
        """What a step computes, or a peer sends, has both layers, unless `write_tokens` says otherwise."""
        super().write(held, cells)
        first = held.start + -held.start % HASH_BLOCK_TOKENS
        for start in range(first, held.end, HASH_BLOCK_TOKENS):
            block, offset = self._place(held, start)
            self._lacking.get(block, set()).discard(offset // HASH_BLOCK_TOKENS)

    def check_prefix(self, held: HeldTokens, known: Sequence[int]) -> None:
        """Check K4 also of the windowed layer: a step's first query sees the last tokens before it."""
        super().check_prefix(held, known)
        seen = max(0, held.end - self._window + 1)
        for start in range(seen - seen % HASH_BLOCK_TOKENS, held.end, HASH_BLOCK_TOKENS):
            if self._lacks_at(held, start):
                raise Violation(
                    "K4", f"a query after token {held.end} sees token {max(seen, start)}, which lacks a layer"
                )

    def _begin(self, block: BlockId, use: int) -> None:
        if self._uses.get(block) != use:
            self._lacking.pop(block, None)
        super()._begin(block, use)

    def _lacks_at(self, held: HeldTokens, start: int) -> bool:
        block, offset = self._place(held, start)
        return offset // HASH_BLOCK_TOKENS in self._lacking.get(block, ())
