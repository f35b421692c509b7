"""Estimates that admission learns from requests that end: rates, lengths of answers, errors of predictions. Pure."""

from __future__ import annotations

import math

_RATE_WINDOW_S = 10.0
_LEAST_FULL_S = 1.0  # shorter times with waiting requests tell nothing about the rate
_ANSWER_SMOOTHING = 0.05
_MAX_TIMING_ERROR = 2.0


class FullRate:
    """Rate at which work ends while other work waits for it, over the last seconds of such time.

    Unlike the rate over all time it does not fall when little is asked for, so it predicts waits.
    """

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0
        self._full_since_s: float | None = None  # the part before is in `_seconds`

    def see(self, now_s: float, *, is_full: bool) -> None:
        """Requests wait from now on, or none does."""
        self._advance(now_s)
        self._full_since_s = now_s if is_full else None

    def note(self, tokens: int, now_s: float) -> None:
        """Add the tokens of a request that ended now, if others wait."""
        if self._full_since_s is not None:
            self._advance(now_s)
            self._tokens += tokens

    def per_s(self, now_s: float) -> float | None:
        """Tokens per second; None: unknown."""
        self._advance(now_s)
        return self._tokens / self._seconds if self._tokens and self._seconds >= _LEAST_FULL_S else None

    def _advance(self, now_s: float) -> None:
        if self._full_since_s is not None:
            kept = math.exp(-max(0.0, now_s - self._full_since_s) / _RATE_WINDOW_S)
            self._tokens *= kept
            self._seconds = self._seconds * kept + _RATE_WINDOW_S * (1.0 - kept)
            self._full_since_s = now_s


class AnswerShare:
    """Share of the expected tokens that answers have had, exponentially weighted over the last dozens of requests.

    Clients ask for far more tokens than they get. 0 before the first answer: only what is known refuses a request.
    """

    def __init__(self) -> None:
        self.mean = 0.0

    def note(self, generated: int, expected: int) -> None:
        """Add a request that ended by itself."""
        self.mean += _ANSWER_SMOOTHING * (min(1.0, generated / max(1, expected)) - self.mean)


class TimingError:
    """How much longer answers take than was predicted for their length: mean plus deviation, within bounds.

    A queue in which many wait gives a free worker to the one whose deadline is nearest to be missed. So a prediction
    that is a little short would let all of them begin and none of them end in time.
    Source: the estimate of retransmission timeouts (Jacobson 1988).
    """

    def __init__(self) -> None:
        self._mean = 1.0
        self._deviation = 0.0

    @property
    def factor(self) -> float:
        """Factor on predicted times, from 1 to _MAX_TIMING_ERROR."""
        return min(_MAX_TIMING_ERROR, max(1.0, self._mean + self._deviation))

    def note(self, predicted_ms: float, took_ms: float) -> None:
        """Add a request that ended, or whose deadline passed: then with the predicted time of what it lacked."""
        if predicted_ms <= 0:
            return
        error = min(_MAX_TIMING_ERROR, took_ms / predicted_ms) - self._mean
        self._mean += error / 8
        self._deviation += (abs(error) - self._deviation) / 4


class DrainRate:
    """Rate of finished work in tokens per second, over the last seconds."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self._since_s: float | None = None
        self._noted_s = 0.0

    def note(self, tokens: int, now_s: float) -> None:
        """Add the tokens of a request that ended now."""
        if self._since_s is None:
            self._since_s = self._noted_s = now_s
        self._decay(now_s)
        self._tokens += tokens

    def per_s(self, now_s: float) -> float:
        """Present rate in tokens per second; 0 before any request has ended."""
        if self._since_s is None:
            return 0.0
        self._decay(now_s)
        return self._tokens / min(_RATE_WINDOW_S, max(1.0, now_s - self._since_s))

    def _decay(self, now_s: float) -> None:
        self._tokens *= math.exp(-(now_s - self._noted_s) / _RATE_WINDOW_S)
        self._noted_s = now_s
