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

    def __init__(self, room: int, num_to_come: int = 0) -> None:
        self.rolling, self.num_owned, self.room, self.num_to_come = False, 2, room, num_to_come
        self.added: list[str] = []
        self.wanted: list[int] = []
        self.silent: set[str] = set()
        self.withdrawn: list[str] = []

    def observation(self) -> str:
        return "seen"

    async def add(self, role: Role) -> ProcessPlan | NoRoom:
        if len(self.added) == self.room:
            return NoRoom("full", self.num_to_come)
        self.added.append(f"{role.value}-{len(self.added)}")
        return ProcessPlan(self.added[-1], "worker", role)

    async def want(self, num_more: int) -> str:
        self.wanted.append(num_more)
        return f"asked for {num_more} more"

    def is_serving(self, name: str) -> bool:
        return name not in self.silent

    async def withdraw(self, name: str) -> None:
        self.withdrawn.append(name)

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


class Clock:
    now = 100.0

    def now_s(self) -> float:
        return self.now


def arm(cluster: Cluster, clock: Clock | None = None, **settings: Any) -> tuple[Scaler, Eager]:
    config = PlannerConfig(**settings)
    scaler, planner = Scaler(config, cluster, 2, clock or MonotonicClock(), lambda _: None), Eager()  # type: ignore[arg-type]
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


async def test_a_started_worker_that_does_not_serve_in_time_is_taken_back_once() -> None:
    cluster, clock = Cluster(room=3), Clock()
    scaler, planner = arm(cluster, clock, start_timeout_s=60.0)
    cluster.silent = {"decode-1"}
    await scaler.turn()
    planner.decide = lambda *_: Decision(clock.now, HOLD, "planted")  # type: ignore[method-assign,misc]
    for after_s, withdrawn in ((59.0, []), (2.0, ["decode-1"]), (60.0, ["decode-1"])):
        clock.now += after_s
        await scaler.turn()
        assert cluster.withdrawn == withdrawn
    assert planner.refusals == [(1, "decode-1 did not serve within 60 s")]


async def test_workers_wait_for_machines_that_may_come_and_the_whole_is_asked_for_in_every_turn() -> None:
    cluster, clock = Cluster(room=0, num_to_come=2), Clock()
    scaler, planner = arm(cluster, clock, max_workers=9)
    await scaler.turn()
    assert planner.refusals == [(1, "full")]
    assert cluster.wanted == [2]
    assert scaler.last is not None
    assert "2 decode worker(s) wait for a machine: asked for 2 more" in scaler.last.pending
    planner.decide = lambda *_: Decision(clock.now, HOLD, "planted")  # type: ignore[method-assign,misc]
    cluster.room = 1
    clock.now += 1.0
    await scaler.turn()
    assert cluster.added == [], "who asks all machines asks seldom"
    clock.now += 5.0
    await scaler.turn()
    assert cluster.added == ["decode-0"]
    assert cluster.wanted == [2, 2, 1]
    assert any("decode-0 starts on" in event for event in scaler.events)
    clock.now += 700.0
    await scaler.turn()
    assert planner.refusals[1:] == [(1, "no machine came for a decode worker within 600 s")]
    assert cluster.wanted[-1] == 0
    assert [event for event in scaler.events if "asked for" in event] == [
        f"planner: asked for {count} more" for count in (2, 1, 0)
    ]


async def test_a_machine_that_may_come_is_waited_for_by_one_worker() -> None:
    cluster = Cluster(room=0, num_to_come=2)
    scaler, planner = arm(cluster, Clock(), max_workers=9)
    await scaler.turn()
    await scaler.turn()
    assert planner.refusals == [(1, "full"), (3, "full")]
    assert cluster.wanted == [2, 2]


async def test_where_only_roles_change_nobody_is_asked_for_machines() -> None:
    cluster = Cluster(room=9)
    scaler, _ = arm(cluster)
    await scaler.turn()
    assert cluster.wanted == []
