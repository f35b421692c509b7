"""Turns of the planner's arm, with a planner and a cluster that only note what they are asked."""

from __future__ import annotations

from typing import Any

from twostroke.cluster.operations.room import NoRoom
from twostroke.cluster.operations.scaler import Scaler
from twostroke.cluster.placement import ProcessPlan
from twostroke.cluster.planner.config import PlannerConfig
from twostroke.cluster.planner.decision import HOLD, Decision, Start
from twostroke.core.clock import MonotonicClock
from twostroke.core.request import Role


class Cluster:
    """The changes of a cluster that has room for `room` more workers."""

    def __init__(self, room: int) -> None:
        self.rolling, self.num_owned, self.room = False, 2, room
        self.added: list[str] = []

    def observation(self) -> str:
        return "seen"

    async def add(self, role: Role) -> ProcessPlan | NoRoom:
        if len(self.added) == self.room:
            return NoRoom("full")
        self.added.append(f"{role.value}-{len(self.added)}")
        return ProcessPlan(self.added[-1], "worker", role)

    def is_serving(self, name: str) -> bool:
        return True

    def serving_by_role(self) -> dict[str, int]:
        return {}

    async def report(self, report: Any) -> None:
        self.reported = report


class Eager:
    """A planner that wants three workers whenever it sees the cluster."""

    def __init__(self) -> None:
        self.refusals: list[tuple[int, str]] = []
        self.seen: list[Any] = []

    def decide(self, observation: Any, now_s: float, num_owned: int | None = None) -> Decision:
        self.seen.append(observation)
        return Decision(now_s, Start((Role.DECODE,) * 3) if observation else HOLD, "planted")

    def refused(self, count: int, reason: str, now_s: float) -> None:
        self.refusals.append((count, reason))


def arm(cluster: Cluster) -> tuple[Scaler, Eager]:
    scaler, planner = Scaler(PlannerConfig(), cluster, 2, MonotonicClock(), lambda _: None), Eager()  # type: ignore[arg-type]
    scaler.planner = planner  # type: ignore[assignment]
    return scaler, planner


async def test_all_workers_that_find_no_room_are_refused() -> None:
    cluster = Cluster(room=1)
    scaler, planner = arm(cluster)
    await scaler.turn()
    assert cluster.added == ["decode-0"]
    assert planner.refusals == [(2, "full")]


async def test_while_workers_restart_one_by_one_nothing_is_seen_or_changed() -> None:
    cluster = Cluster(room=9)
    cluster.rolling = True
    scaler, planner = arm(cluster)
    await scaler.turn()
    assert planner.seen == [None]
    assert cluster.added == []
    cluster.rolling = False
    await scaler.turn()
    assert len(cluster.added) == 3
