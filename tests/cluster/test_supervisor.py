"""What the supervisor makes of ends and of the router's words, without a process: who is ready, absent, or hopeless."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from twostroke.cluster.config import load_config
from twostroke.cluster.launch.last_words import DeviceEnd, ProcessEnd
from twostroke.cluster.model_facts import model_facts
from twostroke.cluster.placement import place
from twostroke.cluster.restarts import Standing, Use
from twostroke.cluster.supervisor import Supervisor
from twostroke.core.request import Role
from twostroke.worker.machine import machine_facts


class Clock:
    def __init__(self) -> None:
        self.at_s = 0.0

    def now_s(self) -> float:
        return self.at_s


@pytest.fixture
async def made(tiny_checkpoint: Path) -> tuple[Supervisor, Clock]:
    flags = {"model.path": str(tiny_checkpoint), "cluster.launcher": "inprocess", "cluster.prefill": 0}
    config = load_config(flags={**flags, "model.max_model_len": 256, "cache.tokens": 1024})
    clock = Clock()
    plan = place(config, machine_facts(), model_facts(config))
    supervisor = Supervisor(config, plan, clock, say=lambda _: None)  # type: ignore[arg-type]
    for name in supervisor._members:
        supervisor._membership.want(name, 0.0)
        supervisor._membership.started(name, 0.0)
    return supervisor, clock


def worker_of(supervisor: Supervisor) -> str:
    return next(name for name, member in supervisor._members.items() if member.kind == "worker")


def seen(*workers: tuple[str, str, str], role: str = "combined") -> dict[str, Any]:
    """As the router shows workers: name, incarnation, state."""
    common = {"numerics": "", "role": role}
    shown = [{"worker_id": name, "incarnation": life, "state": state, **common} for name, life, state in workers]
    return {"router": {"incarnation": "1"}, "workers": shown}


async def test_the_life_that_ended_does_not_pass_for_the_new_one(made: tuple[Supervisor, Clock]) -> None:
    supervisor, clock = made
    name, standing = worker_of(supervisor), supervisor._membership.standing
    supervisor._note(seen((name, "first", "live")))
    assert standing(name) is Standing.READY
    supervisor._ended(name, ProcessEnd("killed"))
    supervisor._membership.started(name, clock.at_s)
    supervisor._note(seen((name, "first", "live")))  # the router has not heard of the end yet
    assert standing(name) is Standing.STARTING
    supervisor._note(seen((name, "second", "live")))
    assert standing(name) is Standing.READY


async def test_a_changed_role_is_the_role_of_the_next_process(made: tuple[Supervisor, Clock]) -> None:
    supervisor, clock = made
    name = worker_of(supervisor)
    supervisor._note(seen((name, "first", "live")))
    assert supervisor._members[name].role is Role.COMBINED
    supervisor._note(seen((name, "first", "live"), role="prefill"))
    supervisor._ended(name, ProcessEnd("killed"))
    assert supervisor._members[name].role is Role.PREFILL
    supervisor._membership.started(name, clock.at_s)
    supervisor._note(seen((name, "first", "suspect"), role="decode"))  # late words about the life that ended
    supervisor._note(None)
    assert supervisor._members[name].role is Role.PREFILL


async def test_of_workers_a_router_that_is_away_says_nothing(made: tuple[Supervisor, Clock]) -> None:
    supervisor, clock = made
    name = worker_of(supervisor)
    supervisor._note(seen((name, "first", "live")))
    for clock.at_s in range(0, 1000, 4):
        supervisor._note(None)
    assert name not in supervisor._membership.overdue(clock.at_s)


@pytest.mark.parametrize(("certain", "ends"), [(True, 1), (False, 3)])
async def test_a_start_is_given_up_when_it_is_hopeless(
    made: tuple[Supervisor, Clock], certain: bool, ends: int
) -> None:
    supervisor, clock = made
    name = worker_of(supervisor)
    for number in range(ends):
        assert not supervisor._startup_error, number
        supervisor._membership.started(name, clock.at_s)
        supervisor._ended(name, ProcessEnd("no such file", is_certain=certain))
    assert "no such file" in supervisor._startup_error
    assert supervisor._settled.is_set()


async def test_that_an_ended_life_serves_is_no_use_of_the_new_one(made: tuple[Supervisor, Clock]) -> None:
    supervisor, clock = made
    name = worker_of(supervisor)
    supervisor._note(seen((name, "first", "live")))
    supervisor._ended(name, ProcessEnd("killed"))
    supervisor._membership.started(name, clock.at_s)
    supervisor._note(seen((name, "second", "live")))
    for clock.at_s in range(1, 100):
        supervisor._note(seen((name, "first", "live")))
    assert name in supervisor._membership.overdue(clock.at_s)


async def test_a_worker_that_drains_has_the_longer_of_both_times(tiny_checkpoint: Path) -> None:
    for replace_s, drain_s in ((5.0, 40.0), (40.0, 5.0)):
        flags = {"model.path": str(tiny_checkpoint), "cluster.launcher": "inprocess", "model.max_model_len": 256}
        times = {"cluster.replace_after_s": replace_s, "cluster.drain_timeout_s": drain_s, "cache.tokens": 1024}
        config = load_config(flags={**flags, **times})
        clock = Clock()
        supervisor = Supervisor(config, place(config, machine_facts(), model_facts(config)), clock)  # type: ignore[arg-type]
        members = supervisor._membership
        (name, *_) = (n for n, member in supervisor._members.items() if member.kind == "worker")
        members.want(name, 0.0)
        members.started(name, 0.0)
        members.ready(name, 0.0)
        members.seen(name, Use.DRAINS, 0.0)
        assert members.overdue(39.0) == []
        assert members.overdue(41.0) == [name]


async def test_one_end_is_by_our_own_hand_once(made: tuple[Supervisor, Clock]) -> None:
    supervisor, clock = made
    name, said = worker_of(supervisor), []
    supervisor._settled.set()
    supervisor._say = said.append
    supervisor._replaced.add(name)
    for cause in ("signal 9", "out of memory"):
        supervisor._membership.started(name, clock.at_s)
        supervisor._ended(name, ProcessEnd(cause))
    assert [line.partition(";")[0] for line in said] == [
        f"{name} ended (killed, to be replaced)",
        f"{name} ended (out of memory)",
    ]


async def test_routers_stop_first_and_only_then_their_workers(made: tuple[Supervisor, Clock]) -> None:
    """Else the streams that a router lets end have no worker any more."""

    class Stops:
        async def stop(self, name: str, grace_s: float) -> None:
            acts.append(f"stop {name}")
            await asyncio.sleep(0)
            acts.append(f"{name} is over")

        async def close(self) -> None:
            acts.append("close")

    supervisor, _ = made
    acts: list[str] = []
    supervisor._launcher = Stops()  # type: ignore[assignment]
    await supervisor.stop()
    worker = worker_of(supervisor)
    assert acts == ["stop router-0", "router-0 is over", f"stop {worker}", f"{worker} is over", "close"]


async def test_a_worker_that_reported_a_cordoned_gpu_is_not_started_again_however_it_ends(
    made: tuple[Supervisor, Clock],
) -> None:
    """A process that hangs in its driver is killed in the end, and cannot say why."""
    supervisor, _ = made
    name = worker_of(supervisor)
    supervisor._settled.set()
    report = seen((name, "first", "live"))
    report["workers"][0]["gpus"] = [{"uuid": "GPU-a", "verdict": "cordon", "reasons": ["XID 79"]}]
    supervisor._note(report)
    supervisor._ended(name, ProcessEnd("SIGKILL"))
    assert supervisor._membership.standing(name) is Standing.WITHHELD
    assert supervisor._membership.last_words(name) == "GPU-a is cordoned: XID 79"


async def test_many_faults_of_one_gpu_cordon_it(made: tuple[Supervisor, Clock]) -> None:
    supervisor, clock = made
    name = worker_of(supervisor)
    supervisor._settled.set()
    standings = []
    for clock.at_s in range(4):
        supervisor._membership.started(name, clock.at_s)
        supervisor._ended(name, ProcessEnd("XID 31", device=DeviceEnd.FAULT))
        standings.append(supervisor._membership.standing(name))
    assert standings == [Standing.WAITING] * 3 + [Standing.WITHHELD]


async def test_a_worker_that_was_let_go_is_forgotten_at_its_end_whoever_ended_it(
    made: tuple[Supervisor, Clock],
) -> None:
    supervisor, _ = made
    name = worker_of(supervisor)
    supervisor._note(seen((name, "first", "live")))
    assert (supervisor.num_owned, supervisor.room.num_free) == (1, 0)
    supervisor.let_go(name)
    assert (supervisor.num_owned, supervisor.standing(name)) == (0, Standing.STOPPED)
    supervisor._ended(name, ProcessEnd("killed"))
    assert (supervisor.standing(name), supervisor.room.num_free) == (None, 1)
    supervisor._ended(name, ProcessEnd("killed"))  # a late word of it changes nothing
    assert supervisor._membership.next_due_s() is None


async def test_a_worker_whose_place_another_has_leaves_none(made: tuple[Supervisor, Clock]) -> None:
    supervisor, _ = made
    name = worker_of(supervisor)
    supervisor.let_go(name, frees_place=False)
    supervisor._ended(name, ProcessEnd("stopped"))
    assert (supervisor.standing(name), supervisor.room.num_free) == (None, 0)


async def test_a_wanted_restart_waits_for_the_end_and_is_no_failure(made: tuple[Supervisor, Clock]) -> None:
    supervisor, _ = made
    name = worker_of(supervisor)
    supervisor._note(seen((name, "first", "live")))
    supervisor._processes.add(name)
    again = asyncio.create_task(supervisor.again(name, 0.0))
    while supervisor.standing(name) is not Standing.STOPPED:
        await asyncio.sleep(0)
    supervisor._ended(name, ProcessEnd("stopped"))
    await again
    assert supervisor._membership.due(0.0) == [name]
    assert supervisor._membership.restarts(name) == 0
