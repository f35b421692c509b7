"""Requests whose workers are full, or suspect for a moment: they are asked again, within bounds."""

from support.fakes.list_router import Router

from twostroke.core import errors
from twostroke.core.request import SequenceKey
from twostroke.protos import worker_pb2
from twostroke.router.requests.state import RequestState, Stage
from twostroke.router.routing.facts import WorkerKey
from twostroke.router.routing.known_worker import Dispatched

KEY = WorkerKey("a", 1)
IDLE = worker_pb2.Beat(phase="idle")


def keep(router: Router, seconds: float) -> None:
    """Time passes; workers beat."""
    for _ in range(round(seconds / 0.25)):
        router.pass_s(0.25)
        router.roster.beat(KEY, IDLE, router.now_s)
        router.roster.tick(router.now_s, 100)


def is_placed(run: RequestState) -> bool:
    return run.stage is Stage.DISPATCHED


def test_the_only_worker_is_asked_again_a_second_after_it_was_full() -> None:
    router = Router("a")
    run = router.ask()
    router.end(run, code="overloaded")
    keep(router, 0.75)
    assert not is_placed(run)
    keep(router, 0.5)
    assert is_placed(run)
    assert [dispatch.decode for dispatch in run.dispatches] == [KEY, KEY]


def test_changes_of_the_workers_do_not_put_off_the_next_question() -> None:
    router = Router("a")
    run = router.ask(timeout_s=60.0)
    router.tokens(run)
    router.end(run, code="overloaded")  # its client has a token
    for _ in range(6):
        keep(router, 0.25)
        router.life.workers_changed()  # as after every request that ends
    assert is_placed(run)


def test_a_worker_that_stays_full_is_asked_until_the_patience_is_over() -> None:
    router = Router("a")
    run = router.ask()
    begin_s = router.now_s
    while run.error is None and router.now_s < begin_s + 10:
        if is_placed(run):
            router.end(run, code="overloaded")
        keep(router, 0.25)
    assert isinstance(run.error, errors.Overloaded)
    assert 2.0 <= router.now_s - begin_s <= 2.5
    assert len(run.dispatches) == 3  # at once, and once a second
    assert router.life.conclude(run)
    router.assert_nothing_is_left()


def test_refusals_of_full_workers_are_no_tries() -> None:
    router = Router("a", "b", "c")
    run = router.ask()
    for _ in range(2):
        router.end(run, code="overloaded")
        router.pass_s(0.0)
    router.end(run, code="tokens_lost")  # the third worker
    router.pass_s(1.0)
    assert is_placed(run)
    router.end(run, code="tokens_lost")
    router.pass_s(0.0)
    assert is_placed(run)
    router.end(run, code="tokens_lost")
    assert isinstance(run.error, errors.TokensLost)


def test_one_that_refuses_for_another_reason_is_not_asked_again() -> None:
    router = Router("a")
    run = router.ask()
    router.end(run, code="unavailable")
    keep(router, 2.0)
    assert len(run.dispatches) == 1
    keep(router, 2.0)
    assert isinstance(run.error, errors.Unavailable)


def test_a_suspect_that_beats_again_gets_what_waits_at_once() -> None:
    router = Router("a")
    keep(router, 0.25)
    router.pass_s(1.0)
    router.roster.tick(router.now_s, 100)  # a pause of this process is forgiven,
    for _ in range(6):
        router.pass_s(0.15)
        router.roster.tick(router.now_s, 100)  # and silence is not
    run = router.ask(timeout_s=60.0)
    assert not is_placed(run)
    router.roster.beat(KEY, IDLE, router.now_s)
    router.pass_s(0.01)
    assert is_placed(run)


def test_a_request_that_began_without_a_worker_waits_in_the_queue_for_one_that_comes_and_is_full() -> None:
    router = Router("a", return_s=30.0)
    router.roster.session_down(KEY, "broke", router.now_s)
    router.roster.announce_ended(KEY, router.now_s)
    run = router.ask(timeout_s=60.0)
    router.join("b")
    others = [SequenceKey(f"other{number}", 0) for number in range(30)]
    for other in others:
        router.roster.fleet.dispatched("b", other, Dispatched(router.now_s, 0, 10))
    for _ in range(200):
        router.pass_s(0.25)
        router.roster.beat(WorkerKey("b", 1), IDLE, router.now_s)
        router.roster.tick(router.now_s, 100)
    assert run.stage is Stage.ROUTING, "for longer than it would wait for a worker"
    for other in others:
        router.roster.fleet.ended(other)
    router.life.tick(router.now_s)
    router.pass_s(0.0)
    assert is_placed(run)
