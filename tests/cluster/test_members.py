"""Members and what ends and reports make of them: who is ready, absent, moved or forgotten."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from twostroke.cluster.config import load_config
from twostroke.cluster.launch.last_words import DeviceEnd, ProcessEnd
from twostroke.cluster.lives import lives_of
from twostroke.cluster.members import Ended, Members
from twostroke.cluster.model_facts import model_facts
from twostroke.cluster.placement import place
from twostroke.cluster.restarts import RestartBook, Standing
from twostroke.core.request import Role
from twostroke.worker.machine import machine_facts


@pytest.fixture
def members(tiny_checkpoint: Path) -> Members:
    """A router and a worker, started at 0 s."""
    flags = {"model.path": str(tiny_checkpoint), "cluster.launcher": "inprocess", "cluster.prefill": 0}
    config = load_config(flags={**flags, "model.max_model_len": 256, "cache.tokens": 1024})
    made = Members(place(config, machine_facts(), model_facts(config)), RestartBook())
    for name in made.plans:
        made.book.want(name, 0.0)
        made.started(name, 0.0)
    return made


@pytest.fixture
def name(members: Members) -> str:
    """The worker."""
    (worker,) = members.of_kind("worker")
    return worker


def seen(*workers: tuple[str, str, str], role: str = "combined") -> dict[str, Any]:
    """As the router shows workers: name, incarnation, state."""
    common = {"numerics": "", "role": role}
    shown = [{"worker_id": name, "incarnation": life, "state": state, **common} for name, life, state in workers]
    return {"router": {"incarnation": "1"}, "workers": shown}


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
    cluster = seen((name, "first", "live"))
    cluster["workers"][0]["gpus"] = [{"uuid": "GPU-a", "verdict": "cordon", "reasons": ["XID 79"]}]
    report(members, cluster)
    reason = "GPU-a is cordoned: XID 79"
    assert members.ended(name, ProcessEnd("SIGKILL"), 0.0) == Ended(ProcessEnd(reason), is_withheld=True)
    assert members.standing(name) is Standing.WITHHELD
    assert members.book.last_words(name) == reason


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


def test_a_worker_whose_place_another_has_leaves_none(members: Members, name: str) -> None:
    members.let_go(name, frees_place=False)
    members.ended(name, ProcessEnd("stopped"), 0.0)
    assert (members.standing(name), members.room.num_free) == (None, 0)


def test_another_supervisor_has_them_as_they_were(members: Members, name: str, tiny_checkpoint: Path) -> None:
    members.let_go(name, frees_place=False)
    members.add(next(iter(members.plans.values())), 0.0)
    told = members.present(lambda member: f"process of {member}")
    assert told.members[name].handle == f"process of {name}"
    config = load_config(
        flags={
            "model.path": str(tiny_checkpoint),
            "cluster.launcher": "inprocess",
            "cluster.prefill": 0,
            "model.max_model_len": 256,
            "cache.tokens": 1024,
        }
    )
    other = Members(place(config, machine_facts(), model_facts(config)), RestartBook())
    other.restore(told)
    assert (other.plans, other.going) == (members.plans, members.going)
    assert other.present(lambda member: f"process of {member}") == told
