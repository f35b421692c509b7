"""Histograms of the lifetime, idle time and reuse of a pool's blocks, measured on a sample of the blocks. Pure.

Every n-th block of the pool is watched, so that the work per step is the same for a pool of any size.

    taken ──▶ published (findable) ──▶ found again … ──▶ taken anew: evicted
      |<------------------- lifetime ------------------->|
                                      |<----- idle ------>|     from its last use
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...core.buckets import RESIDENCY_S
from ...core.tally import Spread, Tally
from ..block import BlockId

MAX_WATCHED = 256


@dataclass(slots=True)
class _Stay:
    since_s: float
    used_s: float
    is_findable: bool = False


class Residency:
    """Three histograms, fed by the owner of a pool. Set `now_s` to the current time before each report."""

    def __init__(self, num_blocks: int, max_watched: int = MAX_WATCHED) -> None:
        self.now_s = 0.0
        self._watched = frozenset(range(0, num_blocks, -(-num_blocks // max_watched)))
        self._stays: dict[int, _Stay] = {}
        self._lifetime = Tally(RESIDENCY_S)
        self._idle = Tally(RESIDENCY_S)
        self._reuse_gap = Tally(RESIDENCY_S)

    def taken(self, blocks: Sequence[BlockId]) -> None:
        """Report that blocks were taken: their contents are gone. Contents that were never findable are not counted."""
        for block in self._watched.intersection(blocks):
            stay = self._stays.get(block)
            if stay is not None and stay.is_findable:
                self._lifetime.add(self.now_s - stay.since_s)
                self._idle.add(self.now_s - stay.used_s)
            self._stays[block] = _Stay(self.now_s, self.now_s)

    def published(self, blocks: Sequence[BlockId]) -> None:
        """Report that the contents of blocks became findable."""
        for block in self._watched.intersection(blocks):
            if block in self._stays:
                self._stays[block].is_findable = True

    def found(self, blocks: Sequence[BlockId]) -> None:
        """Report that another sequence found blocks in the prefix cache and uses them."""
        for block in self._watched.intersection(blocks):
            stay = self._stays.get(block)
            if stay is not None:
                self._reuse_gap.add(self.now_s - stay.used_s)
                stay.used_s = self.now_s

    @property
    def spreads(self) -> tuple[tuple[str, Spread], ...]:
        """The histograms, each with its name in a load report; values in seconds."""
        return (
            ("block_lifetime_s", self._lifetime.spread),
            ("block_idle_s", self._idle.spread),
            ("block_reuse_gap_s", self._reuse_gap.spread),
        )
