"""An oracle: it knows every request beforehand and has the same actions, start-ups and drains as the planner.

Not the true optimum, which nobody computes: for every slot of 10 s it takes the fewest workers by the formulas of
cluster/planner/queueing.py from the requests of that slot, times a margin, of which the caller takes the cheapest one
that reaches the goal. Workers are ordered a start-up ahead; a gap that is shorter than a start-up is not worth leaving.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ...cluster.planner.queueing import PrefillLoad, PrefillTarget, prefill_workers
from ...core.request import Role
from .cluster import SimCluster, Times
from .demand import Demand
from .machine import Machine

SLOT_S = 10.0
_ATTAINMENT = 0.99  # of the TTFT target, before margins


class OracleControl:
    """Follows a schedule of splits."""

    def __init__(self, schedule: Sequence[tuple[int, int]], times: Times) -> None:
        self._schedule = schedule
        self._times = times
        self._totals = _filled([prefill + decode for prefill, decode in schedule], math.ceil(times.start_up_s / SLOT_S))

    @property
    def first(self) -> tuple[int, int]:
        """The split to begin with."""
        return self._schedule[0]

    def act(self, cluster: SimCluster, now_s: float) -> None:
        """Order for a start-up ahead, give roles for now, let go what is not needed until then."""
        for worker in [w for w in cluster.workers if w.draining and w.is_empty]:
            cluster.stop(worker)
        present = [worker for worker in cluster.workers if not worker.draining]
        coming = self._at(self._totals, now_s + self._times.start_up_s + 1)
        now, ahead = self._at(self._totals, now_s), self._at(self._totals, now_s + 1)
        for _ in range(coming - len(present)):
            cluster.start(Role.DECODE)
        prefill, decode = self._at(self._schedule, now_s + self._times.role_change_s)
        have = {role: cluster.live(role) for role in (Role.PREFILL, Role.DECODE)}
        want = {Role.PREFILL: prefill, Role.DECODE: decode}
        for role, other in ((Role.PREFILL, Role.DECODE), (Role.DECODE, Role.PREFILL)):
            spare = sorted((w for w in have[other] if w.next_role is None), key=lambda w: len(w.running))
            for worker in spare[: max(0, min(want[role] - len(have[role]), len(have[other]) - want[other]))]:
                cluster.change_role(worker, role)
                have[other].remove(worker)
        surplus = len(present) - max(now, ahead, coming)
        for role in (Role.PREFILL, Role.DECODE):
            idle = sorted((w for w in have[role] if w.next_role is None), key=lambda w: len(w.running))
            for worker in idle[: max(0, min(surplus, len(have[role]) - want[role]))]:
                cluster.drain(worker)
                surplus -= 1

    @staticmethod
    def _at(values: Sequence, now_s: float):  # type: ignore[type-arg, no-untyped-def]
        return values[min(len(values) - 1, int(now_s / SLOT_S))]


def schedule_of(
    demands: Sequence[Demand], machine: Machine, targets_s: tuple[float, float], margins: tuple[float, float]
) -> list[tuple[int, int]]:
    """Splits by slot, for margins on the loads of prefill and decode."""
    num_slots = int(demands[-1].arrived_s / SLOT_S) + 2
    work, count, squares, kv = ([0.0] * num_slots for _ in range(4))
    for each in demands:
        slot = int(each.arrived_s / SLOT_S)
        took_s = machine.prefill_s(each.prompt_tokens - each.held_tokens, each.held_tokens)
        work[slot] += took_s
        squares[slot] += took_s * took_s
        count[slot] += 1
        lasts_s = each.answer_tokens * targets_s[1]
        tokens = each.prompt_tokens + each.answer_tokens / 2
        for later in range(slot, min(num_slots, int((each.arrived_s + lasts_s) / SLOT_S) + 1)):
            inside_s = min((later + 1) * SLOT_S, each.arrived_s + lasts_s) - max(later * SLOT_S, each.arrived_s)
            kv[later] += tokens * inside_s / SLOT_S
    return [
        (
            _prefill(work[slot] * margins[0], count[slot], squares[slot] * margins[0] ** 2, targets_s[0]),
            _decode(machine, kv[slot] * margins[1], targets_s[1]),
        )
        for slot in range(num_slots)
    ]


def smoothed(schedule: Sequence[tuple[int, int]], width: int) -> list[tuple[int, int]]:
    """For every slot and role the largest number within `width` slots on each side: steadier, and never less."""
    near = [schedule[max(0, i - width) : i + width + 1] for i in range(len(schedule))]
    return [(max(split[0] for split in each), max(split[1] for split in each)) for each in near]


def _prefill(work_s: float, count: float, squares: float, ttft_s: float) -> int:
    if not count:
        return 1
    mean_s = work_s / count
    load = PrefillLoad(work_s / SLOT_S, 0.0, mean_s, max(0.0, squares / count / (mean_s * mean_s) - 1))
    return prefill_workers(load, PrefillTarget(ttft_s, _ATTAINMENT, 0.98))


def _decode(machine: Machine, kv_tokens: float, itl_s: float) -> int:
    """Sequences have about as many tokens as the mean: their own share of a step is in the slope."""
    room = (itl_s * 1e3 - machine.step_base_ms) / (machine.step_ms_per_kv_token + machine.step_ms_per_sequence / 1500)
    return max(1, math.ceil(kv_tokens / min(room, machine.kv_capacity_tokens)))


def _filled(totals: list[int], width: int) -> list[int]:
    """Fill valleys narrower than `width` slots: a morphological closing."""
    length = len(totals)
    high = [max(totals[max(0, i - width) : i + 1]) for i in range(length)]
    return [min(high[i : min(length, i + width + 1)]) for i in range(length)]
