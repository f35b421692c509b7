"""Runs the parts of a `CodecGuard` between steps, in the engine's thread."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Protocol

from ...core.clock import Clock
from ...core.tally import Spread
from .machine import CodecGuard, Part, PartScore

_log = logging.getLogger(__name__)

RESTART = "restart this worker with another --kv-cache-dtype (bfloat16)"


class Scorer(Protocol):
    """Computes parts: model/codec_guard.py, or a replacement without weights."""

    served: str
    """Codec of the worker's cache, as --kv-cache-dtype names it."""

    def score(self, part: Part) -> PartScore:
        """Compute a part over both caches; the parts before it of its sample were computed."""
        ...


class IdleGuard:
    """A guard with its scorer."""

    def __init__(self, guard: CodecGuard, scorer: Scorer, clock: Clock, follows: str = RESTART) -> None:
        """`follows`: what is done past the bound, for the log."""
        self._guard = guard
        self._follows = follows
        self._scorer = scorer
        self._clock = clock

    def saw(self, prompt_ids: Sequence[int]) -> None:
        """A prompt arrived."""
        self._guard.saw(prompt_ids)

    def worked(self) -> None:
        """A step ended."""
        self._guard.worked(self._clock.now_s())

    def wake_s(self) -> float | None:
        """When `turn` has something to do; None: it has nothing."""
        return self._guard.wake_s(self._clock.now_s())

    def turn(self) -> None:
        """Compute one part, if the guard says so. A failure costs its sample, never a request."""
        began_s = self._clock.now_s()
        part = self._guard.next_part(began_s)
        if part is None:
            return
        try:
            score = self._scorer.score(part)
        except Exception:
            _log.exception("a sample of the cache's guard could not be scored")
            self._guard.failed(self._clock.now_s() - began_s)
            return
        verdict = self._guard.scored(part, score, self._clock.now_s() - began_s)
        if verdict is not None:
            _log.error(
                "the KV cache in %s differs from bfloat16 by %.3g nats per token, mean of the last %d sampled prompts: "
                "more than cache.guard_bound allows. Answers may be worse than the model's; %s",
                self._scorer.served, verdict.mean_nats, verdict.num_scores, self._follows,
            )  # fmt: skip

    @property
    def counters(self) -> Mapping[str, int]:
        """For load reports."""
        return self._guard.counters

    @property
    def spread(self) -> Spread:
        """Scores, for load reports."""
        return self._guard.spread
