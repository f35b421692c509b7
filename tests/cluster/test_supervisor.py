"""What the supervisor makes of ends and of the router's words, without a process: who is ready, absent, or hopeless."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from twostroke.cluster.config import load_config
from twostroke.cluster.launch.last_words import ProcessEnd
from twostroke.cluster.model_facts import model_facts
from twostroke.cluster.placement import place
from twostroke.cluster.restarts import Standing, Use
from twostroke.cluster.supervisor import Supervisor
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
    for name in supervisor.members:
        supervisor._members.book.want(name, 0.0)
        supervisor._members.started(name, 0.0)
    return supervisor, clock


def worker_of(supervisor: Supervisor) -> str:
    return next(name for name, member in supervisor.members.items() if member.kind == "worker")


def seen(*workers: tuple[str, str, str], role: str = "combined") -> dict[str, Any]:
    """As the router shows workers: name, incarnation, state."""
    common = {"numerics": "", "role": role}
    shown = [{"worker_id": name, "incarnation": life, "state": state, **common} for name, life, state in workers]
    return {"router": {"incarnation": "1"}, "workers": shown}


@pytest.mark.parametrize(("certain", "ends"), [(True, 1), (False, 3)])
async def test_a_start_is_given_up_when_it_is_hopeless(
    made: tuple[Supervisor, Clock], certain: bool, ends: int
) -> None:
    supervisor, clock = made
    name = worker_of(supervisor)
    for number in range(ends):
        assert not supervisor._startup_error, number
        supervisor._members.started(name, clock.at_s)
        supervisor._ended(name, ProcessEnd("no such file", is_certain=certain))
    assert "no such file" in supervisor._startup_error
    assert supervisor._settled.is_set()


async def test_a_worker_that_drains_has_the_longer_of_both_times(tiny_checkpoint: Path) -> None:
    for replace_s, drain_s in ((5.0, 40.0), (40.0, 5.0)):
        flags = {"model.path": str(tiny_checkpoint), "cluster.launcher": "inprocess", "model.max_model_len": 256}
        times = {"cluster.replace_after_s": replace_s, "cluster.drain_timeout_s": drain_s, "cache.tokens": 1024}
        config = load_config(flags={**flags, **times})
        clock = Clock()
        supervisor = Supervisor(config, place(config, machine_facts(), model_facts(config)), clock)  # type: ignore[arg-type]
        members = supervisor._members.book
        (name, *_) = (n for n, member in supervisor.members.items() if member.kind == "worker")
        members.want(name, 0.0)
        members.started(name, 0.0)
        members.ready(name, 0.0)
        members.seen(name, Use.DRAINS, 0.0)
        assert members.overdue(39.0) == []
        assert members.overdue(41.0) == [name]


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


async def test_a_wanted_restart_waits_for_the_end_and_is_no_failure(made: tuple[Supervisor, Clock]) -> None:
    supervisor, _ = made
    name = worker_of(supervisor)
    supervisor._note(seen((name, "first", "live")))
    supervisor._members.running.add(name)
    again = asyncio.create_task(supervisor.again(name, 0.0))
    while supervisor.standing(name) is not Standing.STOPPED:
        await asyncio.sleep(0)
    supervisor._ended(name, ProcessEnd("stopped"))
    await again
    assert supervisor._members.book.due(0.0) == [name]
    assert supervisor._members.book.restarts(name) == 0
