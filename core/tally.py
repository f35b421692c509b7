"""Numbers counted into fixed buckets: a histogram as plain integers. Pure; knows no exposition format."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple


class Spread(NamedTuple):
    """The counts of a histogram at one moment."""

    counts: tuple[int, ...]  # per bucket, not cumulative; the last one is of what exceeds every bound
    total: float  # of the values

    def plus(self, other: Spread) -> Spread:
        """Both together. They have the same bounds."""
        counts = tuple(mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True))
        return Spread(counts, self.total + other.total)

    def minus(self, earlier: Spread) -> Spread:
        """What came since an earlier moment of the same histogram."""
        counts = tuple(mine - theirs for mine, theirs in zip(self.counts, earlier.counts, strict=True))
        return Spread(counts, self.total - earlier.total)


class Tally:
    """Counts values by upper bounds; a value that equals a bound belongs to it, as Prometheus has it."""

    __slots__ = ("_bounds", "_counts", "_spread", "_total")

    def __init__(self, bounds: Sequence[float]) -> None:
        """`bounds` ascend."""
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0
        self._spread: Spread | None = None  # of the counts, until they change

    def add(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value
        self._spread = None

    @property
    def spread(self) -> Spread:
        """The counts now."""
        if self._spread is None:
            self._spread = Spread(tuple(self._counts), self._total)
        return self._spread
