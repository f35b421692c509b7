"""Sums of the engine counters of a model, over all workers and all their incarnations. Pure.

A worker counts from its own start and can leave at any time. The sum over workers must never fall, so only the increase
since the last report of each incarnation is added.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from ...core.tally import Spread
from .facts import LoadFacts, WorkerKey


class EngineTotals:
    """The sums of one model."""

    def __init__(self) -> None:
        self.counters: Counter[str] = Counter()
        self._spreads: dict[str, Spread] = {}
        self._last: dict[WorkerKey, LoadFacts] = {}

    @property
    def spreads(self) -> Mapping[str, Spread]:
        """Histograms, by their names in a load report."""
        return self._spreads

    def take(self, key: WorkerKey, load: LoadFacts) -> None:
        """Add a worker's newest report."""
        last = self._last.get(key, LoadFacts())
        self._last[key] = load
        if load.counters != last.counters:
            counted = dict(last.counters)
            for name, count in load.counters:
                self.counters[name] += max(0, count - counted.get(name, 0))
        if load.spreads != last.spreads:
            earlier = dict(last.spreads)
            for name, spread in load.spreads:
                self._add(name, spread.minus(earlier[name]) if name in earlier else spread)

    def forget(self, key: WorkerKey) -> None:
        """Remove a worker; its counts stay in the sums."""
        self._last.pop(key, None)

    def _add(self, name: str, news: Spread) -> None:
        known = self._spreads.get(name)
        if known is None:
            self._spreads[name] = news
        elif len(known.counts) == len(news.counts):  # else a worker of another release has other buckets
            self._spreads[name] = known.plus(news)
