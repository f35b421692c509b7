"""Which stream's KV is offered to its buddy next, and when. Pure: knows no stream, no clock, no tensor.

    tokens of a run    0 ───────────── kept ─────────────── full ──── computed
                       | the buddy has | offered when there are enough | its block is not full

A stream whose worker dies is computed again from what nobody has. The buddy's copy is a cached prefix like any other:
evicted first, found by the routers' prefix maps, fetched or handed over from there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ..core.request import SequenceKey


@dataclass(frozen=True, slots=True)
class JournalLimits:
    """Bounds of all offers of one worker."""

    bytes_per_s: float
    batch_tokens: int = 64  # that an offer adds, at least: less is computed again in no time
    max_under_way: int = 2
    retry_s: float = 2.0  # after a buddy that kept nothing; doubled each time
    max_retry_s: float = 60.0


class Offer(NamedTuple):
    """The first `num_tokens` tokens of a run, all in full blocks."""

    key: SequenceKey
    num_tokens: int


@dataclass(slots=True)
class _Run:
    kept: int
    full: int = 0
    is_offered: bool = False
    retry_at_s: float = 0.0
    num_refused: int = 0


class Journal:
    """The runs of one worker that have a buddy."""

    def __init__(self, limits: JournalLimits, bytes_per_token: int, block_tokens: int) -> None:
        self._limits = limits
        self._bytes_per_token = bytes_per_token
        self._block_tokens = block_tokens
        self._runs: dict[SequenceKey, _Run] = {}
        self._room = limits.bytes_per_s  # bytes that may be offered now: at most a second's, negative after a large one
        self._filled_s: float | None = None
        self.num_under_way = 0  # offers without an answer, also those of runs that have ended

    def begin(self, key: SequenceKey, kept_tokens: int) -> None:
        """A run has a buddy, which is believed to hold its first tokens."""
        self._runs[key] = _Run(kept_tokens - kept_tokens % self._block_tokens)

    def grew(self, key: SequenceKey, num_tokens: int) -> None:
        """A run has so many tokens, prompt included; the KV of all but the last is computed."""
        run = self._runs.get(key)
        if run is not None:
            run.full = max(run.full, (num_tokens - 1) // self._block_tokens * self._block_tokens)

    def end(self, key: SequenceKey) -> None:
        """A run is over."""
        self._runs.pop(key, None)

    def next(self, now_s: float) -> Offer | None:
        """The offer to make now: of the run that would lose most. `answered` must follow."""
        self._fill(now_s)
        if self._room <= 0 or self.num_under_way >= self._limits.max_under_way:
            return None
        due = [key for key, run in self._runs.items() if self._is_due(run, now_s)]
        if not due:
            return None
        key = max(due, key=lambda key: self._runs[key].full - self._runs[key].kept)
        run = self._runs[key]
        run.is_offered = True
        self.num_under_way += 1
        self._room -= (run.full - run.kept) * self._bytes_per_token
        return Offer(key, run.full)

    def answered(self, offer: Offer, kept_tokens: int, now_s: float) -> None:
        """The buddy holds so many leading tokens now; 0 also if it did not answer."""
        self.num_under_way -= 1
        run = self._runs.get(offer.key)
        if run is None:
            return
        run.is_offered = False
        if kept_tokens >= offer.num_tokens:
            run.kept, run.num_refused = offer.num_tokens, 0
            return
        wait_s = min(self._limits.retry_s * 2 ** min(run.num_refused, 20), self._limits.max_retry_s)
        run.kept = min(kept_tokens, run.full)
        run.num_refused += 1
        run.retry_at_s = now_s + wait_s

    def next_s(self, now_s: float) -> float | None:
        """When `next` may have an offer if no run grows before; None: it has none."""
        due = [max(run.retry_at_s, now_s) for run in self._runs.values() if self._is_due(run, run.retry_at_s)]
        if not due:
            return None
        self._fill(now_s)
        return max(min(due), now_s + max(0.0, -self._room) / self._limits.bytes_per_s)

    def _is_due(self, run: _Run, now_s: float) -> bool:
        has_enough = run.full - run.kept >= self._limits.batch_tokens
        return has_enough and not run.is_offered and now_s >= run.retry_at_s

    def _fill(self, now_s: float) -> None:
        passed_s = 0.0 if self._filled_s is None else now_s - self._filled_s
        self._filled_s = now_s
        self._room = min(self._limits.bytes_per_s, self._room + passed_s * self._limits.bytes_per_s)
