"""Requests whose model lost its only decode worker: they wait until it is back, within bounds."""

import pytest
from support.fakes.list_router import Router

from twostroke.core import errors
from twostroke.core.request import Role
from twostroke.router.requests.state import Stage
from twostroke.router.routing.facts import WorkerKey, WorkerState

KEY = WorkerKey("a", 1)


def lose(router: Router, name: str = "a") -> None:
    """The worker's process is killed: both of its streams end."""
    key = WorkerKey(name, 1)
    router.roster.session_down(key, "broke", router.now_s)
    router.roster.announce_ended(key, router.now_s)
    router.roster.tick(router.now_s, 100)


def pass_s(router: Router, seconds: int) -> None:
    """Time passes; workers that have a session beat."""
    for _ in range(seconds):
        router.pass_s(1.0)
        for worker in router.roster.fleet:
            router.roster.beat(worker.facts.key, None, router.now_s)
        router.roster.tick(router.now_s, 100)


def test_old_and_new_requests_go_to_the_worker_when_it_is_back() -> None:
    router = Router("a", return_s=30.0)
    old = router.ask("old", timeout_s=60.0)
    lose(router)
    new = router.ask("new", timeout_s=60.0)
    pass_s(router, 20)  # longer than a request waits for a worker that is known
    assert old.stage is new.stage is Stage.ROUTING
    router.join("a", incarnation=2)
    router.pass_s(0.1)
    assert [run.dispatches[-1].decode for run in (old, new)] == [WorkerKey("a", 2)] * 2
    assert router.roster.fleet.lost.until_s("m") is None


def test_the_wait_ends_with_the_time_in_which_it_may_return() -> None:
    router = Router("a", return_s=30.0)
    lose(router)
    pass_s(router, 20)
    run = router.ask(timeout_s=60.0)
    pass_s(router, 9)
    assert run.error is None
    pass_s(router, 2)
    assert isinstance(run.error, errors.Unavailable)
    assert run.error.retry_after_s
    assert router.life.conclude(run)
    router.assert_nothing_is_left()
    with pytest.raises(errors.Unavailable, match="no worker has announced itself"):
        router.ask("late")


def test_the_wait_ends_with_the_deadline() -> None:
    router = Router("a", return_s=30.0)
    lose(router)
    run = router.ask(timeout_s=5.0)
    pass_s(router, 6)
    assert isinstance(run.error, errors.DeadlineExceeded)
    assert router.life.conclude(run)
    router.assert_nothing_is_left()


def test_a_worker_that_is_lost_again_and_again_does_not_prolong_a_wait() -> None:
    router = Router("a", return_s=10.0)
    lose(router)
    run = router.ask(timeout_s=60.0)
    for incarnation in range(2, 5):
        pass_s(router, 4)
        router.full.add("a")
        router.sent = [("a", "submit")]  # it refuses every order
        router.join("a", incarnation)
        router.roster.session_down(WorkerKey("a", incarnation), "broke", router.now_s)
        router.roster.announce_ended(WorkerKey("a", incarnation), router.now_s)
    pass_s(router, 1)
    assert isinstance(run.error, errors.Unavailable)


def test_nobody_waits_for_a_worker_that_left_or_does_not_decode() -> None:
    left = Router("a", return_s=30.0)
    left.roster.leaving(KEY)
    lose(left)
    with pytest.raises(errors.Unavailable):
        left.ask()
    prefill = Router(return_s=30.0)
    prefill.join("p", role=Role.PREFILL)
    prefill.join("b", role=Role.PREFILL)
    lose(prefill, "b")
    run = prefill.ask()
    prefill.pass_s(0.1)
    assert isinstance(run.error, errors.Unavailable)


def test_another_worker_takes_the_request_at_once() -> None:
    router = Router("a", "b", return_s=30.0)
    lose(router)
    assert router.ask().dispatches[-1].decode == WorkerKey("b", 1)


def test_the_last_worker_that_may_return_ends_the_wait() -> None:
    router = Router("a", "b", return_s=30.0)
    lose(router, "a")
    pass_s(router, 20)
    lose(router, "b")
    run = router.ask(timeout_s=90.0)
    pass_s(router, 20)
    assert run.stage is Stage.ROUTING
    pass_s(router, 11)
    assert isinstance(run.error, errors.Unavailable)


def test_a_new_request_waits_for_a_suspect_as_for_one_that_is_lost() -> None:
    """Its usual patience is over before it is known whether the worker lives."""
    router = Router("a", return_s=30.0, worker_patience_s=0.3)
    router.pass_s(1.5)
    router.roster.tick(router.now_s, 100)
    assert [worker.state for worker in router.roster.fleet] == [WorkerState.SUSPECT]
    run = router.ask(timeout_s=60.0)
    router.pass_s(0.4)
    assert run.error is None
    assert run.stage is Stage.ROUTING
    router.roster.beat(KEY, None, router.now_s)
    router.roster.tick(router.now_s, 100)
    router.pass_s(0.1)
    assert run.dispatches[-1].decode == KEY
