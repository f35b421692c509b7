"""Figures of runs: goodput under targets, percentiles, regret, and bootstrap intervals over time windows. Pure.

Requests near each other in time are not independent (one queue delays them all), so the bootstrap draws whole windows
of the arrivals, and the same windows for two runs that are compared. Source: block bootstrap (Künsch 1989).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .play import Course, Played

WINDOWS = 24
DRAWS = 400
LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Targets:
    """The service level: a request counts if it keeps both."""

    ttft_s: float = 5.0
    itl_s: float = 0.075  # mean of a request

    def met(self, course: Course) -> bool:
        """True if this request keeps both."""
        return course.ttft_s <= self.ttft_s and course.itl_s <= self.itl_s


class Interval(NamedTuple):
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Row:
    """Figures of one policy at one load."""

    policy: str
    load: float  # of the capacity
    rate_per_s: float  # of arrivals
    attained: Interval  # share of the requests that keep both targets
    goodput_per_s: float
    ttft_mean_s: Interval
    ttft_p50_s: float
    ttft_p90_s: float
    ttft_p99_s: float
    itl_p50_ms: float  # of the requests' means
    itl_p99_ms: float
    gap_p99_ms: float  # of all times between tokens
    hit_rate: float  # share of the prompt tokens found in a cache
    imbalance: float
    num_preemptions: int
    regret: Interval | None  # 1 - goodput / goodput of the oracle; None: it was not played


def row_of(played: Played, load: float, targets: Targets, oracle: Played | None) -> Row:
    """The figures of a run."""
    courses = played.courses
    lasts_s = max(course.arrived_s for course in courses) or played.ended_s
    met = [float(targets.met(course)) for course in courses]
    ttfts = sorted(course.ttft_s for course in courses)
    itls = sorted(course.itl_s for course in courses if course.answer_tokens > 1) or [0.0]
    regret = None
    if oracle is not None:
        best = [float(targets.met(course)) for course in oracle.courses]
        regret = _interval(courses, [met, best], lambda sums: 1.0 - sums[0] / sums[1] if sums[1] else 0.0)
    count = [1.0] * len(courses)
    return Row(
        policy=played.policy,
        load=load,
        rate_per_s=len(courses) / lasts_s,
        attained=_interval(courses, [met, count], _ratio),
        goodput_per_s=sum(met) / lasts_s,
        ttft_mean_s=_interval(courses, [[course.ttft_s for course in courses], count], _ratio),
        ttft_p50_s=quantile(ttfts, 0.5),
        ttft_p90_s=quantile(ttfts, 0.9),
        ttft_p99_s=quantile(ttfts, 0.99),
        itl_p50_ms=quantile(itls, 0.5) * 1e3,
        itl_p99_ms=quantile(itls, 0.99) * 1e3,
        gap_p99_ms=float(_weighted_quantile(played.gaps_ms, 0.99)),
        hit_rate=sum(c.cached_tokens for c in courses) / sum(c.prompt_tokens for c in courses),
        imbalance=played.imbalance,
        num_preemptions=played.num_preemptions,
        regret=regret,
    )


def quantile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of the values does not exceed."""
    return ordered[min(len(ordered) - 1, max(0, -(-int(share * len(ordered) * 1e6) // 1_000_000) - 1))]


def _weighted_quantile(count_by_value: Mapping[int, int], share: float) -> int:
    left = share * sum(count_by_value.values())
    for value in sorted(count_by_value):
        left -= count_by_value[value]
        if left <= 0:
            return value
    return 0


def _ratio(sums: Sequence[float]) -> float:
    return sums[0] / sums[1] if sums[1] else 0.0


def _interval(
    courses: Sequence[Course], series: Sequence[Sequence[float]], figure: Callable[[Sequence[float]], float]
) -> Interval:
    """A figure of sums, with the interval of its values over windows that are drawn with replacement."""
    windows = [list(sums) for sums in _window_sums(courses, series)]
    value = figure([sum(column) for column in zip(*windows, strict=True)])
    chance = random.Random(1)
    found = []
    for _ in range(DRAWS):
        drawn = chance.choices(windows, k=len(windows))
        found.append(figure([sum(column) for column in zip(*drawn, strict=True)]))
    found.sort()
    tail = (1.0 - LEVEL) / 2
    return Interval(value, found[int(tail * DRAWS)], found[min(DRAWS - 1, int((1.0 - tail) * DRAWS))])


def _window_sums(courses: Sequence[Course], series: Sequence[Sequence[float]]) -> list[tuple[float, ...]]:
    """Sums of each series over windows with equal numbers of requests, in the order of arrival."""
    size = max(1, -(-len(courses) // WINDOWS))
    starts = range(0, len(courses), size)
    return [tuple(sum(values[start : start + size]) for values in series) for start in starts]
