"""One trace under the planner, static splits, KEDA's rule and an oracle: attainment of the targets and GPU-hours."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from ...cluster.planner.config import PlannerConfig
from .cluster import Control, Outcome, SimCluster, Times
from .controls import KedaControl, NoControl, PlannerControl
from .demand import Demand
from .machine import H200_8B, Machine
from .oracle import OracleControl, schedule_of, smoothed

MARGINS = (0.85, 1.0, 1.2, 1.5, 2.0)  # of the oracle, on each role's load
WIDTHS = (0, 6, 18)  # slots on each side whose largest need the oracle takes
KEDA_TOKENS = (8192.0, 2048.0)  # queued prompt tokens per worker: the chart's target, and an eager one
KEDA_SHARES = (0.7, 0.15)  # of KV in use: the chart's target, and one that the ITL target would want on this machine
KEDA_STABILISATION_S = 300.0  # Kubernetes' default


@dataclass(frozen=True, slots=True)
class Case:
    """What is compared on one trace."""

    demands: Sequence[Demand]
    ttft_target_s: float = 2.0
    itl_target_s: float = 0.020
    goal: float = 0.99  # share of the best attainment that any control must reach to count
    machine: Machine = H200_8B
    times: Times = field(default_factory=Times)
    most: int = 24  # workers of each role

    @property
    def targets_s(self) -> tuple[float, float]:
        """Both targets."""
        return self.ttft_target_s, self.itl_target_s


@dataclass(frozen=True, slots=True)
class Row:
    """Figures of one control on one trace."""

    control: str
    attainment: float  # share of requests within both targets
    ttft_attainment: float
    itl_attainment: float
    gpu_hours: float
    ttft_p99_s: float
    role_changes: int
    starts: int
    drains: int
    course: tuple[tuple[float, int, int, int], ...] = ()


def play(case: Case, name: str, split: tuple[int, int], control: Control) -> Row:
    """One run."""
    cluster = SimCluster(case.machine, split, case.times, case.targets_s)
    return row_of(name, case, cluster.run(case.demands, control))


def row_of(name: str, case: Case, outcome: Outcome) -> Row:
    """The figures of a run."""
    count = max(1, outcome.num_requests)
    ordered = sorted(outcome.ttft_s)
    return Row(
        name,
        outcome.both / count,
        sum(each <= case.ttft_target_s for each in ordered) / count,
        sum(each <= case.itl_target_s for each in outcome.itl_s) / count,
        outcome.paid_s / 3600,
        ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
        outcome.counts["role_changes"],
        outcome.counts["starts"],
        outcome.counts["drains"],
        tuple(outcome.course),
    )


class Comparison:
    """The runs on one trace, in the order in which they build on each other."""

    def __init__(self, case: Case, said: Callable[[str], None] = lambda _: None) -> None:
        self._case = case
        self._said = said
        self._static: dict[tuple[int, int], Row] = {}
        self.statics: list[Row] = []

    @property
    def played(self) -> list[tuple[tuple[int, int], Row]]:
        """The static splits that were played."""
        return list(self._static.items())

    def static(self, prefill: int, decode: int) -> Row:
        """A static split, played once."""
        split = (prefill, decode)
        if split not in self._static:
            self._static[split] = play(self._case, f"static {prefill}P + {decode}D", split, NoControl())
            self._said(f"{self._static[split].control}: {self._static[split].attainment:.4f}")
        return self._static[split]

    def best_static(self) -> Row:
        """The cheapest static split whose attainment is at least `goal` of what unlimited workers attain.

        More workers of one role never make the other's attainment worse, so each role is searched by bisection beside
        plenty of the other, and the neighbourhood of the two results is played.
        """
        most = self._case.most
        bound = self.static(most, most).attainment * self._case.goal
        prefill = _least(most, lambda n: self.static(n, most).attainment >= bound)
        decode = _least(most, lambda n: self.static(most, n).attainment >= bound)
        near = [self.static(p, d) for p in range(prefill, prefill + 3) for d in range(decode, decode + 3)]
        good = [row for row in near if row.attainment >= bound]
        for less_p, less_d in ((1, 0), (0, 1), (2, 0), (1, 1)):  # below: for the plot
            if prefill > less_p and decode > less_d:
                self.static(prefill - less_p, decode - less_d)
        self.statics = sorted(
            (row for split, row in self._static.items() if most not in split), key=lambda row: row.gpu_hours
        )
        return min(good, key=lambda row: (row.gpu_hours, -row.attainment))

    def oracle(self, best_static: Row) -> Row:
        """The cheapest schedule that attains what the best static split does; that split is one of them.

        Decode's margin is searched beside the largest one of prefill, then prefill's, for each width of smoothing.
        """
        found, bound = [best_static], best_static.attainment
        for width in WIDTHS:
            decode = self._cheapest(bound, [(MARGINS[-1], margin, width) for margin in MARGINS[::-1]])
            if decode is not None:
                margins = [(margin, decode[1], width) for margin in MARGINS[::-1]]
                self._cheapest(bound, margins, found)
        return min(found, key=lambda row: row.gpu_hours)

    def _cheapest(
        self, bound: float, tries: list[tuple[float, float, int]], found: list[Row] | None = None
    ) -> tuple[float, float, int] | None:
        """The last of falling margins that attains `bound`; None: the first does not."""
        best = None
        for each in tries:
            row = self._oracle(*each)
            if row.attainment < bound:
                break
            best = each
            if found is not None:
                found.append(row)
        return best

    def _oracle(self, prefill: float, decode: float, width: int) -> Row:
        case = self._case
        schedule = schedule_of(case.demands, case.machine, case.targets_s, (prefill, decode))
        control = OracleControl(smoothed(schedule, width), case.times)
        row = play(case, f"oracle (margins {prefill:g}, {decode:g}; ± {width} slots)", control.first, control)
        self._said(f"{row.control}: {row.attainment:.4f}, {row.gpu_hours:.2f} GPU-hours")
        return row

    def planner(self, split: tuple[int, int], config: PlannerConfig | None = None) -> Row:
        """The production planner."""
        case = self._case
        config = config or planner_config(case)
        return play(case, "planner", split, PlannerControl(config, sum(split)))

    def keda(self, split: tuple[int, int]) -> Iterator[Row]:
        """KEDA's rule: the chart's targets, and eager ones."""
        for tokens, share in zip(KEDA_TOKENS, KEDA_SHARES, strict=True):
            control = KedaControl(tokens, share, KEDA_STABILISATION_S, (1, self._case.most))
            yield play(self._case, f"KEDA ({tokens:.0f} tokens, KV {share:.0%})", split, control)


def planner_config(case: Case) -> PlannerConfig:
    """The planner's defaults with this case's targets and start-up time."""
    return PlannerConfig(
        enabled=True,
        ttft_target_ms=case.ttft_target_s * 1e3,
        itl_target_ms=case.itl_target_s * 1e3,
        max_workers=2 * case.most,
        max_prefill_workers=case.most,
        max_decode_workers=case.most,
        start_up_s=case.times.start_up_s,
    )


def _least(most: int, holds: Callable[[int], bool]) -> int:
    """The smallest number from 1 that holds, by bisection; `most` is known to hold."""
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return high
