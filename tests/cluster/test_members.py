"""Members and what ends and reports make of them: who is ready, absent, moved or forgotten."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from twostroke.cluster.config import load_config
from twostroke.cluster.launch.last_words import DeviceEnd, ProcessEnd
from twostroke.cluster.lives import lives_of
from twostroke.cluster.members import Ended, Members
from twostroke.cluster.model_facts import model_facts
from twostroke.cluster.placement import Plan, ProcessPlan, place
from twostroke.cluster.restarts import RestartBook, Standing
from twostroke.core.request import Role
from twostroke.worker.machine import MachineFacts, machine_facts


@pytest.fixture
def plan(tiny_checkpoint: Path) -> Plan:
    """A router and a worker."""
    flags = {"model.path": str(tiny_checkpoint), "cluster.launcher": "inprocess", "cluster.prefill": 0}
    config = load_config(flags={**flags, "model.max_model_len": 256, "cache.tokens": 1024})
    return place(config, machine_facts(), model_facts(config))


@pytest.fixture
def members(plan: Plan) -> Members:
    """They, started at 0 s."""
    return started(plan)


@pytest.fixture
def gpus(plan: Plan) -> Members:
    """They, with the worker on the first of three GPUs."""
    on_gpu = (replace(member, device="cuda" if member.kind == "worker" else "cpu") for member in plan.members)
    return started(replace(plan, members=tuple(on_gpu), spare_gpus=(1, 2)))


@pytest.fixture
def name(members: Members) -> str:
    """The worker."""
    (worker,) = members.of_kind("worker")
    return worker


def started(plan: Plan) -> Members:
    made = Members(plan, RestartBook())
    for name in made.plans:
        made.book.want(name, 0.0)
        made.started(name, 0.0)
    return made


def seen(*workers: tuple[str, str, str], role: str = "combined") -> dict[str, Any]:
    """As the router shows workers: name, incarnation, state."""
    common = {"numerics": "", "role": role}
    shown = [{"worker_id": name, "incarnation": life, "state": state, **common} for name, life, state in workers]
    return {"router": {"incarnation": "1"}, "workers": shown}


AMPLE = MachineFacts(8, 64 << 30)
CORDON = "GPU-a is cordoned: XID 79"


def cordoned(name: str, life: str) -> dict[str, Any]:
    """As the router shows a worker whose GPU is cordoned."""
    cluster = seen((name, life, "live"))
    cluster["workers"][0]["gpus"] = [{"uuid": "GPU-a", "verdict": "cordon", "reasons": ["XID 79"]}]
    return cluster


def report(members: Members, cluster: dict[str, Any] | None, now_s: float = 0.0) -> list[str]:
    is_heard = cluster is not None
    return members.reported(lives_of(cluster), now_s, hears_workers=is_heard, hears_routers=is_heard)


def test_a_member_that_serves_is_told_once(members: Members, name: str) -> None:
    assert report(members, seen((name, "first", "live"))) == ["router-0", name]
    assert report(members, seen((name, "first", "live"))) == []


def test_the_life_that_ended_does_not_pass_for_the_new_one(members: Members, name: str) -> None:
    report(members, seen((name, "first", "live")))
    assert members.standing(name) is Standing.READY
    members.ended(name, ProcessEnd("killed"), 0.0)
    members.started(name, 0.0)
    report(members, seen((name, "first", "live")))  # the router has not heard of the end yet
    assert members.standing(name) is Standing.STARTING
    report(members, seen((name, "second", "live")))
    assert members.standing(name) is Standing.READY


def test_a_worker_that_changes_its_cache_is_not_missed_and_its_later_life_ends_with_its_process(
    members: Members, name: str
) -> None:
    changes = seen((name, "first", "draining"))
    changes["workers"][0]["changes_codec_to"] = "bfloat16"
    report(members, seen((name, "first", "live")))
    for now_s in range(100):
        report(members, changes, now_s)
        assert name not in members.book.overdue(now_s)
    report(members, seen((name, "second", "live")), 100)
    members.ended(name, ProcessEnd("killed"), 100)
    members.started(name, 100)
    report(members, seen((name, "second", "live")), 101)  # the router has not heard of the end yet
    assert members.standing(name) is Standing.STARTING


def test_a_changed_role_is_the_role_of_the_next_process(members: Members, name: str) -> None:
    report(members, seen((name, "first", "live")))
    assert members.plans[name].role is Role.COMBINED
    report(members, seen((name, "first", "live"), role="prefill"))
    members.ended(name, ProcessEnd("killed"), 0.0)
    assert members.plans[name].role is Role.PREFILL
    members.started(name, 0.0)
    report(members, seen((name, "first", "suspect"), role="decode"))  # late words about the life that ended
    report(members, None)
    assert members.plans[name].role is Role.PREFILL


def test_of_workers_a_router_that_is_away_says_nothing(members: Members, name: str) -> None:
    report(members, seen((name, "first", "live")))
    for now_s in range(0, 1000, 4):
        report(members, None, now_s)
    assert name not in members.book.overdue(996)


@pytest.mark.parametrize("heard", ["router", "worker"])
def test_only_members_of_a_kind_that_is_heard_of_are_missed(members: Members, name: str, heard: str) -> None:
    report(members, seen((name, "first", "live")))
    for now_s in range(0, 100, 4):
        members.reported({}, now_s, hears_workers=heard == "worker", hears_routers=heard == "router")
    assert members.book.overdue(96) == members.of_kind(heard)


def test_that_an_ended_life_serves_is_no_use_of_the_new_one(members: Members, name: str) -> None:
    report(members, seen((name, "first", "live")))
    members.ended(name, ProcessEnd("killed"), 0.0)
    members.started(name, 0.0)
    report(members, seen((name, "second", "live")))
    for now_s in range(1, 100):
        report(members, seen((name, "first", "live")), now_s)
    assert name in members.book.overdue(99)


def test_one_end_is_by_our_own_hand_once(members: Members, name: str) -> None:
    members.replaced(name)
    causes = []
    for cause in ("signal 9", "out of memory"):
        members.started(name, 0.0)
        ended = members.ended(name, ProcessEnd(cause), 0.0)
        assert ended is not None
        causes.append(ended.end.cause)
    assert causes == ["killed, to be replaced", "out of memory"]


def test_a_worker_that_reported_a_cordoned_gpu_is_not_started_again_however_it_ends(
    members: Members, name: str
) -> None:
    """A process that hangs in its driver is killed in the end, and cannot say why."""
    report(members, cordoned(name, "first"))
    assert members.ended(name, ProcessEnd("SIGKILL"), 0.0) == Ended(ProcessEnd(CORDON), is_withheld=True)
    assert members.standing(name) is Standing.WITHHELD
    assert members.book.last_words(name) == CORDON


def test_a_worker_leaves_its_cordoned_gpu_once(gpus: Members, name: str) -> None:
    report(gpus, cordoned(name, "first"))
    moved = gpus.ended(name, ProcessEnd("SIGKILL"), 0.0)
    assert moved is not None
    assert moved.moved == f"moves from GPU 0 to GPU 1: {CORDON}"
    gpus.started(name, 0.0)
    again = gpus.ended(name, ProcessEnd("out of memory"), 0.0)
    assert again is not None
    assert (again.end.cause, again.moved, gpus.plans[name].gpu) == ("out of memory", "", 1)


def test_nobody_moves_to_a_gpu_that_a_further_worker_has(gpus: Members, name: str) -> None:
    gpus.add(replace(gpus.plans[name], name="combined-1", gpu=1), 0.0)
    gpus.ended(name, ProcessEnd("XID 79", device=DeviceEnd.CORDONED), 0.0)
    assert gpus.plans[name].gpu == 2


def test_many_faults_of_one_gpu_cordon_it(members: Members, name: str) -> None:
    standings = []
    for now_s in range(4):
        members.started(name, now_s)
        members.ended(name, ProcessEnd("XID 31", device=DeviceEnd.FAULT), now_s)
        standings.append(members.standing(name))
    assert standings == [Standing.WAITING] * 3 + [Standing.WITHHELD]
    assert members.cordoned_gpus == {0: "XID 31; the last of too many faults of this GPU"}


def test_a_worker_that_was_let_go_is_forgotten_at_its_end_whoever_ended_it(members: Members, name: str) -> None:
    report(members, seen((name, "first", "live")))
    assert (members.num_owned, members.room.num_free) == (1, 0)
    members.let_go(name, frees_place=True)
    assert (members.num_owned, members.standing(name)) == (0, Standing.STOPPED)
    assert members.ended(name, ProcessEnd("killed"), 0.0) is None
    assert (members.standing(name), members.room.num_free) == (None, 1)
    assert members.ended(name, ProcessEnd("killed"), 0.0) is None  # a late word of it changes nothing
    assert members.book.next_due_s() is None


def test_nothing_is_known_of_a_member_that_was_forgotten(members: Members, name: str) -> None:
    again = members.plans[name]
    report(members, seen((name, "first", "live")))
    members.ended(name, ProcessEnd("killed"), 0.0)
    members.started(name, 0.0)
    report(members, cordoned(name, "second"))
    members.forget(name)
    members.add(again, 0.0)
    members.started(name, 0.0)
    assert report(members, seen((name, "first", "live"))) == [name]
    assert members.ended(name, ProcessEnd("killed"), 0.0) == Ended(ProcessEnd("killed"), due_s=0.0)


def test_a_worker_whose_place_another_has_leaves_none(members: Members, name: str) -> None:
    members.let_go(name, frees_place=False)
    members.ended(name, ProcessEnd("stopped"), 0.0)
    assert (members.standing(name), members.room.num_free) == (None, 0)


def test_another_supervisor_has_them_as_they_were(members: Members, name: str, plan: Plan) -> None:
    members.room.give_back(members.plans[name])
    further = members.room.take(Role.COMBINED, AMPLE, [])
    assert isinstance(further, ProcessPlan)
    members.add(further, 0.0)
    members.room.give_back(further)
    members.let_go(name, frees_place=False)
    told = members.present(lambda member: f"process of {member}")
    assert told.members[name].handle == f"process of {name}"
    other = Members(plan, RestartBook())
    other.restore(told)
    assert (other.plans, other.going) == (members.plans, members.going)
    assert other.present(lambda member: f"process of {member}") == told
    third = other.room.take(Role.COMBINED, AMPLE, [])
    assert isinstance(third, ProcessPlan)
    assert third.name not in other.plans


def test_a_member_that_was_let_go_and_stays_is_restarted_again(members: Members, name: str) -> None:
    report(members, seen((name, "1", "live")))
    members.let_go(name, frees_place=True)
    members.keep(name, 5.0)
    assert members.standing(name) is Standing.READY
    assert name not in members.going
    ended = members.ended(name, ProcessEnd("it was killed"), 6.0)
    assert ended is not None
    assert ended.due_s == 6.0


def test_a_member_whose_process_ended_while_it_was_let_go_stays_gone(members: Members, name: str) -> None:
    members.let_go(name, frees_place=True)
    assert members.ended(name, ProcessEnd("it drained"), 1.0) is None
    members.keep(name, 2.0)
    assert members.standing(name) is None
