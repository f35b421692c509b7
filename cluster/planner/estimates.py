"""Rates, trends and the decode step's time as a function of the KV in use, from observations. Pure."""

from __future__ import annotations

import math

from .config import PlannerConfig
from .observation import Observation, Prompts, WorkerReport

_STEP_FADE_S = 3600.0  # memory of the step-time fit: it needs loads that differ
_PRIOR_WEIGHT = 0.05  # of the guess below, in observations
_PRIOR_BASE_SHARE = 0.5  # guess: half of a step's time does not depend on the KV in use


class Trend:
    """Level and slope of a quantity from two exponential averages of unlike memory.

    On a ramp an average with time constant T lags T seconds behind; so the two differ by slope * (slow - fast).
    Source: double exponential smoothing (Brown 1959), with time constants in place of per-sample weights.
    """

    def __init__(self, fast_s: float, slow_s: float) -> None:
        self._fast_s, self._slow_s = fast_s, slow_s
        self._fast = self._slow = 0.0
        self._age_s = 0.0
        self._is_known = False

    def add(self, value: float, seconds: float) -> None:
        """Add the mean of the last `seconds`."""
        if not self._is_known:
            self._fast = self._slow = value
            self._is_known = True
        self._age_s += seconds
        # While young, an average counts all of its values alike.
        self._fast += _weight(seconds, min(self._fast_s, self._age_s)) * (value - self._fast)
        self._slow += _weight(seconds, min(self._slow_s, self._age_s)) * (value - self._slow)

    @property
    def slope(self) -> float:
        """Growth per second; never below zero: a falling load is believed when it has fallen."""
        if self._age_s < self._slow_s / 2:
            return 0.0
        return max(0.0, self._fast - self._slow) / (self._slow_s - self._fast_s)

    def ahead(self, seconds: float) -> float:
        """The level in so many seconds; 0: now."""
        return self._fast + self.slope * (seconds + self._fast_s)


def _weight(seconds: float, constant_s: float) -> float:
    return 1.0 - math.exp(-seconds / constant_s) if constant_s > 0 else 1.0


class StepFit:
    """Milliseconds of a decode step = base + slope * KV tokens in use: weights and KV are read once per step.

    Faded least squares, drawn towards a guess until loads have differed enough to tell base from slope.
    """

    def __init__(self) -> None:
        self._sums = (0.0, 0.0, 0.0, 0.0, 0.0)  # faded: 1, x, y, x*x, x*y

    def add(self, kv_tokens: float, step_ms: float, seconds: float) -> None:
        """Add one worker's observation; `seconds` since its last one."""
        kept = math.exp(-seconds / _STEP_FADE_S)
        news = (1.0, kv_tokens, step_ms, kv_tokens * kv_tokens, kv_tokens * step_ms)
        self._sums = tuple(kept * old + new for old, new in zip(self._sums, news, strict=True))  # type: ignore[assignment]

    @property
    def line(self) -> tuple[float, float]:
        """Base in ms and slope in ms per token; (0, 0): nothing was measured."""
        count, x, y, xx, xy = self._sums
        if count == 0 or y <= 0:
            return 0.0, 0.0
        mean_x, mean_y = x / count, y / count
        if mean_x < 1:
            return mean_y, 0.0
        spread = max(0.0, xx - x * mean_x)
        together = xy - x * mean_y
        guess = (1 - _PRIOR_BASE_SHARE) * mean_y / mean_x
        weight = _PRIOR_WEIGHT * mean_x * mean_x
        slope = min(max(0.0, (together + weight * guess) / (spread + weight)), mean_y / mean_x)
        return mean_y - slope * mean_x, slope


class Estimates:
    """What the planner knows of the load beyond the last observation."""

    def __init__(self, config: PlannerConfig) -> None:
        def trend() -> Trend:
            return Trend(config.rate_window_s, config.trend_window_s)

        self.prompts, self.tokens, self.tokens_squared = trend(), trend(), trend()  # per second
        self.kv_tokens_per_ms, self.sequences_per_ms = trend(), trend()
        self.step = StepFit()
        self._last: Observation | None = None

    def take(self, observation: Observation, decoders: list[WorkerReport]) -> None:
        """Add an observation. One that is not newer than the last changes nothing.

        `decoders`: workers that hold sequences which decode.
        """
        last, self._last = self._last, observation
        if last is None:
            return
        seconds = observation.at_s - last.at_s
        if seconds <= 0:
            self._last = last
            return
        if observation.source == last.source:
            self._rates(last.prompts, observation.prompts, seconds)
        busy = [worker for worker in decoders if worker.decode_step_ms > 0 and worker.running + worker.waiting > 0]
        for worker in busy:
            if worker.running:
                self.step.add(worker.kv_tokens, worker.decode_step_ms, seconds / len(busy))
        self.kv_tokens_per_ms.add(sum(worker.kv_tokens / worker.decode_step_ms for worker in busy), seconds)
        asked = sum((worker.running + worker.waiting) / worker.decode_step_ms for worker in busy)
        self.sequences_per_ms.add(asked, seconds)

    def _rates(self, before: Prompts, now: Prompts, seconds: float) -> None:
        self.prompts.add(max(0, now.count - before.count) / seconds, seconds)
        self.tokens.add(max(0, now.tokens - before.tokens) / seconds, seconds)
        self.tokens_squared.add(max(0, now.tokens_squared - before.tokens_squared) / seconds, seconds)
