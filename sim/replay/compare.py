"""Policies beside each other on one trace, at shares of the cluster's capacity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...core.errors import ConfigError
from .figures import Row, Targets, row_of
from .play import ORACLE, OURS, POLICIES, QUEUE, Played, play
from .spec import ClusterSpec
from .trace import Trace

CAPACITY_REQUESTS = 3000  # of the trace, with which the capacity is measured
MIDDLE = (0.25, 0.75)  # of the ends: the run's begin and end are not full


@dataclass(frozen=True, slots=True)
class Compared:
    """All rows of one trace and cluster."""

    capacity_per_s: float
    rows: tuple[Row, ...]

    def at(self, load: float) -> list[Row]:
        """The rows of one load, in the order in which they were played."""
        return [row for row in self.rows if row.load == load]


def parse_policies(text: str) -> list[str]:
    """Names of policies, separated by commas; "all" is every one.

    Raises:
        ConfigError: one is unknown; lists the known ones.
    """
    names = list(POLICIES) if text == "all" else [name.strip() for name in text.split(",")]
    for name in names:
        if name.removesuffix(QUEUE) not in POLICIES:
            raise ConfigError(f"--policy names {name!r}; known: {', '.join(POLICIES)}, each with {QUEUE}, or all")
    return list(dict.fromkeys(names))


def parse_loads(text: str) -> list[float]:
    """Shares of the capacity, separated by commas.

    Raises:
        ConfigError: one is no number from 0.01 to 10.
    """
    try:
        loads = [float(part) for part in text.split(",")]
    except ValueError:
        loads = []
    if not loads or not all(0.01 <= load <= 10 for load in loads):
        raise ConfigError(f"--load is {text!r}; must be shares of the capacity from 0.01 to 10, e.g. 0.3,0.6,0.9,1.2")
    return loads


def capacity_per_s(trace: Trace, spec: ClusterSpec) -> float:
    """Requests per second that the cluster completes while more wait, under the production policy.

    Measured: the first requests of the trace all wait from the beginning; the rate is that of the middle of the ends.
    """
    sample = trace.first(CAPACITY_REQUESTS)
    ends = sorted(course.ended_s for course in play(sample.at_once(), spec, OURS).courses)
    first, last = (int(share * (len(ends) - 1)) for share in MIDDLE)
    if ends[last] <= ends[first]:
        raise ConfigError(f"the trace has {len(ends)} requests; too few to measure the capacity, give --capacity")
    return (last - first) / (ends[last] - ends[first])


def compare(
    trace: Trace,
    spec: ClusterSpec,
    policies: Sequence[str],
    loads: Sequence[float],
    targets: Targets,
    *,
    capacity: float | None = None,
    seed: int = 1,
    said: Callable[[str], None] = lambda _: None,
) -> Compared:
    """Play every policy at every load, the oracle first. `capacity`: None: it is measured."""
    num_runs = len(policies) * len(loads)
    said(f"{len(trace.asks):,} requests, {num_runs} runs: {len(policies)} policies at {len(loads)} loads")
    per_s = capacity_per_s(trace, spec) if capacity is None else capacity
    said(f"capacity: {per_s:.2f} requests/s")
    rows = []
    for load in loads:
        scaled = trace.at_rate(load * per_s)
        oracle: Played | None = None
        for name in sorted(policies, key=lambda name: name != ORACLE):
            played = play(scaled, spec, name, seed)
            oracle = played if name == ORACLE else oracle
            rows.append(row_of(played, load, targets, oracle))
            said(f"{len(rows)} of {num_runs}: load {load:g}, {name}: {rows[-1].attained.value:.2%} within the targets")
    return Compared(per_s, tuple(rows))
