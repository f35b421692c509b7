"""Speed coefficients of a worker, measured by itself; before that, estimates from other workers. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .facts import LoadFacts

_SMOOTHING = 0.1


def pairs_of(uncached: int, held: int) -> float:
    """(query, key) pairs of `uncached` tokens after `held` ones."""
    return uncached * (held + uncached / 2)


@dataclass(frozen=True, slots=True)
class Coefficients:
    """Prefilling u tokens after h held ones takes `a*u + b*u*(h + u/2)` ms; a decode step takes `decode_step_ms`."""

    prefill_ms_per_token: float = 0.5  # a
    prefill_ms_per_token_pair: float = 1e-5  # b
    decode_step_ms: float = 20.0
    handover_bytes_per_s: float = 5e8

    def prefill_ms(self, uncached: int, held: int) -> float:
        """Time to compute `uncached` tokens after `held` ones."""
        return self.work_ms(uncached, pairs_of(uncached, held))

    def work_ms(self, tokens: float, pairs: float) -> float:
        """Time to compute this many tokens, with this many (query, key) pairs."""
        return self.prefill_ms_per_token * tokens + self.prefill_ms_per_token_pair * pairs


DEFAULTS = Coefficients()
FIELDS = ("prefill_ms_per_token", "prefill_ms_per_token_pair", "decode_step_ms", "handover_bytes_per_s")


def guess(loads: Iterable[LoadFacts]) -> Coefficients:
    """Coefficients for a worker without measurements: the mean of the measured ones, else constants."""
    reports = list(loads)
    values = {}
    for name in FIELDS:
        measured = [value for report in reports if (value := getattr(report, name)) > 0]
        values[name] = sum(measured) / len(measured) if measured else getattr(DEFAULTS, name)
    return Coefficients(**values)


def coefficients_of(load: LoadFacts, otherwise: Coefficients) -> Coefficients:
    """A worker's measured coefficients; those of `otherwise` for values that it has not measured yet."""
    return Coefficients(**{name: getattr(load, name) or getattr(otherwise, name) for name in FIELDS})


class PredictionError:
    """Error of predicted times to the first token, exponentially weighted over the last dozens of requests."""

    def __init__(self) -> None:
        self.mean_ratio: float | None = None  # of |predicted - measured| to measured

    def note(self, predicted_ms: float, measured_ms: float) -> float:
        """Add one request; returns its own error ratio."""
        ratio = abs(predicted_ms - measured_ms) / max(measured_ms, 0.1)
        mean = ratio if self.mean_ratio is None else self.mean_ratio
        self.mean_ratio = mean + _SMOOTHING * (ratio - mean)
        return ratio
