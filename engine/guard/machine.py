"""Guard of the cache's codec: which prompts are scored, when, and the verdict. Pure; knows no tensor, no clock.

A sampled prompt is computed twice, over a cache of the served codec and over a wider one, in parts, in idle time.
The divergence KL(wide ‖ served) of its last rows is its score. When the mean of the last scores exceeds the bound, the
verdict is reached, once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import NamedTuple

from ...core import buckets
from ...core.tally import Spread, Tally

MAX_SAMPLES = 4  # waiting to be scored; the oldest is dropped
LEAST_TOKENS = 32  # of a prompt that is worth scoring
PART_TOKENS = 64  # computed at a time: a request that arrives meanwhile waits for one part
SCORED_ROWS = 32  # at the end of a sample
MOST_SAVED_S = 1.0  # of scoring that unused idle time may save up
RECENT = 16  # scores that the verdict looks at
LEAST_SCORES = 4  # before there is a verdict


@dataclass(frozen=True, slots=True)
class GuardLimits:
    """What the guard may cost, and what it tolerates."""

    bound_nats: float  # mean divergence per token
    sampled_share: float  # of prompts
    max_tokens: int  # of a prompt, its first ones
    idle_s: float = 0.25  # without a step, before scoring begins
    busy_share: float = 0.05  # of all time that scoring may take


class Part(NamedTuple):
    """Tokens to compute over both caches."""

    ids: tuple[int, ...]  # of the sample from its start to the part's end
    start: int
    first_scored: int  # rows from this position on are scored

    @property
    def num_tokens(self) -> int:
        """Tokens to compute."""
        return len(self.ids) - self.start


class PartScore(NamedTuple):
    """Divergence over the scored rows of a part, in nats."""

    total: float
    num_rows: int


class Verdict(NamedTuple):
    """The codec costs more than the bound allows."""

    mean_nats: float
    num_scores: int


class CodecGuard:
    """State of one worker's guard."""

    def __init__(self, limits: GuardLimits, now_s: float) -> None:
        self.verdict: Verdict | None = None
        self.num_scored = 0
        self.num_dropped = 0
        self._limits = limits
        self._credit_share = 0.0  # of the next sample
        self._samples: deque[tuple[int, ...]] = deque()
        self._current: tuple[int, ...] | None = None
        self._done = 0  # tokens of the current sample
        self._sum, self._rows = 0.0, 0
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._tally = Tally(buckets.NATS)
        self._worked_s = now_s
        self._allowed_s = 0.0  # of scoring, saved up
        self._counted_s = now_s

    # ------------------------------------------------------------------ what happens

    def saw(self, prompt_ids: Sequence[int]) -> None:
        """Count a new prompt; every so many are kept as samples."""
        if len(prompt_ids) < LEAST_TOKENS:
            return
        self._credit_share += self._limits.sampled_share
        if self._credit_share < 1.0:
            return
        self._credit_share -= 1.0
        if len(self._samples) == MAX_SAMPLES:
            self._samples.popleft()
            self.num_dropped += 1
        self._samples.append(tuple(prompt_ids[: self._limits.max_tokens]))

    def worked(self, now_s: float) -> None:
        """A step ended: idle time begins."""
        self._worked_s = now_s

    def scored(self, part: Part, score: PartScore, took_s: float) -> Verdict | None:
        """A part was computed. Returns the verdict when it is reached."""
        self._allowed_s -= took_s
        self._sum, self._rows = self._sum + score.total, self._rows + score.num_rows
        self._done = len(part.ids)
        assert self._current is not None
        if self._done < len(self._current):
            return None
        divergence = self._sum / self._rows
        if not isfinite(divergence):  # a prompt whose numbers overflow says nothing about the codec
            self.failed()
            return None
        self._forget_current()
        self.num_scored += 1
        self._recent.append(divergence)
        self._tally.add(divergence)
        mean = sum(self._recent) / len(self._recent)
        if self.verdict is not None or len(self._recent) < LEAST_SCORES or mean <= self._limits.bound_nats:
            return None
        self.verdict = Verdict(mean, len(self._recent))
        return self.verdict

    def failed(self, took_s: float = 0.0) -> None:
        """A part could not be computed: its sample is dropped. `took_s`: what the attempt took."""
        self._allowed_s -= took_s
        self._forget_current()
        self.num_dropped += 1

    # ------------------------------------------------------------------ what to do

    def next_part(self, now_s: float) -> Part | None:
        """The part to compute now; None: there is no sample, or no time for it yet."""
        wake_s = self.wake_s(now_s)
        if wake_s is None or wake_s > now_s:
            return None
        if self._current is None:
            self._current = self._samples.popleft()
        end = min(self._done + PART_TOKENS, len(self._current))
        return Part(self._current[:end], self._done, max(0, len(self._current) - SCORED_ROWS))

    def wake_s(self, now_s: float) -> float | None:
        """When `next_part` has one if no step runs before; None: no sample waits."""
        since_s, self._counted_s = now_s - self._counted_s, now_s
        self._allowed_s = min(self._allowed_s + since_s * self._limits.busy_share, MOST_SAVED_S)
        if self._current is None and not self._samples:
            return None
        idle_s = self._worked_s + self._limits.idle_s
        if self._allowed_s > 0:
            return idle_s
        return max(idle_s, now_s - self._allowed_s / self._limits.busy_share + 1e-3)

    # ------------------------------------------------------------------ what is told

    @property
    def mean_nats(self) -> float:
        """Mean of the last scores; 0 without any."""
        return sum(self._recent) / len(self._recent) if self._recent else 0.0

    @property
    def counters(self) -> dict[str, int]:
        """For load reports."""
        return {
            "kv_guard_scored": self.num_scored,
            "kv_guard_dropped": self.num_dropped,
            "kv_guard_exceeded": int(self.verdict is not None),
        }

    @property
    def spread(self) -> Spread:
        """Histogram of all scores."""
        return self._tally.spread

    def _forget_current(self) -> None:
        self._current, self._done, self._sum, self._rows = None, 0, 0.0, 0
