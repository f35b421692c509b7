"""Histogram with fixed buckets, as plain integers. Pure; knows no exposition format."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple


class Spread(NamedTuple):
    """Counts of a histogram at one moment."""

    counts: tuple[int, ...]  # per bucket, not cumulative; the last bucket is above all bounds
    total: float  # sum of the values

    def plus(self, other: Spread) -> Spread:
        """Return the sum of two histograms with the same bounds."""
        counts = tuple(mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True))
        return Spread(counts, self.total + other.total)

    def minus(self, earlier: Spread) -> Spread:
        """Return the counts since an earlier moment of the same histogram."""
        counts = tuple(mine - theirs for mine, theirs in zip(self.counts, earlier.counts, strict=True))
        return Spread(counts, self.total - earlier.total)


class Tally:
    """Counter of values by upper bounds. A value equal to a bound belongs to its bucket, as in Prometheus."""

    __slots__ = ("_bounds", "_counts", "_spread", "_total")

    def __init__(self, bounds: Sequence[float]) -> None:
        """`bounds` must be ascending."""
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0
        self._spread: Spread | None = None  # cached until the counts change

    def add(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value
        self._spread = None

    @property
    def spread(self) -> Spread:
        """Current counts."""
        if self._spread is None:
            self._spread = Spread(tuple(self._counts), self._total)
        return self._spread
