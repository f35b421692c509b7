"""What happens to requests when all workers are full: who waits, who starts, who is refused, and what comes back."""

from __future__ import annotations

import pytest
from support.fakes.list_router import Router

from twostroke.core import errors
from twostroke.core.request import Allowance, Request, SamplingParams
from twostroke.core.timeline import Instant, Timeline
from twostroke.protos import worker_pb2
from twostroke.router.requests.admission.bounds import AdmissionLimits
from twostroke.router.requests.admission.entrance import Announced
from twostroke.router.requests.admission.estimates import TimingError
from twostroke.router.requests.state import RequestState, Stage
from twostroke.router.routing.facts import WorkerKey

SEATS, AHEAD = 16, 4  # of a worker of list_router: a quarter more than its seats


def ask(router: Router, name: str, tenant: str = "acme", **fields: object) -> RequestState:
    """A request of 55 tokens that may have any field."""
    values = {"prompt_ids": tuple(range(50)), "sampling": SamplingParams(max_tokens=5), "num_choices": 1} | fields
    request = Request(name, "m", isolation_domain=tenant, timeout_s=values.pop("timeout_s", 100.0), **values)  # type: ignore[arg-type]
    timeline = Timeline()
    timeline.mark(Instant.ARRIVED, router.now_s)
    run = router.life.admit(request, timeline, router.now_s)
    router.life.begin(run, router.now_s)
    return run


def full(router: Router, tenant: str = "first") -> list[RequestState]:
    """Requests that take every seat of one worker and what it may have waiting."""
    runs = [ask(router, f"seat{number}", tenant) for number in range(SEATS + AHEAD)]
    assert all(run.stage is Stage.DISPATCHED for run in runs)
    return runs


def finish(router: Router, run: RequestState) -> None:
    router.tokens(run)
    router.end(run)
    router.life.conclude(run)
    router.pass_s(0.0)


def test_what_finds_no_free_worker_waits_in_the_router_and_starts_when_one_is() -> None:
    router = Router("a")
    runs = full(router)
    waits = ask(router, "w")
    assert (waits.stage, len(router.life.entrance), len(waits.dispatches)) == (Stage.ROUTING, 1, 0)
    finish(router, runs[0])
    assert waits.stage is Stage.DISPATCHED
    for run in (*runs[1:], waits):
        finish(router, run)
    router.pass_s(0.0)
    router.assert_nothing_is_left()


def test_a_worker_that_joins_is_used_at_once() -> None:
    router = Router("a")
    full(router)
    waits = ask(router, "w")
    router.join("b")
    router.pass_s(0.0)
    assert [dispatch.decode for dispatch in waits.dispatches] == [WorkerKey("b", 1)]


def test_room_that_only_a_load_report_tells_of_is_used_with_the_next_tick() -> None:
    router = Router("a")
    event = worker_pb2.WatchEvent(incarnation=1)
    event.load.role, event.load.running, event.load.free_blocks = 3, 40, 1000  # of another router's requests
    router.roster.watching(WorkerKey("a", 1))
    assert router.roster.take_event(WorkerKey("a", 1), event, 0.0)
    waits = ask(router, "w")
    assert waits.stage is Stage.ROUTING
    event.load.running = 0
    assert router.roster.take_event(WorkerKey("a", 1), event, 0.1)
    router.life.tick(0.1)
    router.pass_s(0.0)
    assert waits.stage is Stage.DISPATCHED


def test_prompts_wait_while_the_queue_of_prefill_is_long() -> None:
    router = Router("a")
    long = {"prompt_ids": tuple(range(2500))}
    runs = [ask(router, name, **long) for name in ("r1", "r2", "r3")]
    assert [run.stage for run in runs] == [Stage.DISPATCHED, Stage.DISPATCHED, Stage.ROUTING]
    router.tokens(runs[0])
    router.pass_s(0.0)
    assert runs[2].stage is Stage.DISPATCHED, "a prompt is computed"


def test_a_request_with_more_choices_than_seats_gets_an_idle_worker() -> None:
    router = Router("a")
    assert ask(router, "r", num_choices=64).stage is Stage.DISPATCHED


def test_tenants_take_turns_however_many_one_of_them_sends() -> None:
    router = Router("a")
    runs = full(router)
    flood = [ask(router, f"f{number}", "flood") for number in range(20)]
    other = [ask(router, f"o{number}", "other") for number in range(4)]
    for run in runs[:8]:
        finish(router, run)
    assert [len(run.dispatches) for run in other] == [1] * 4
    assert sum(len(run.dispatches) for run in flood) == 4


def test_a_priority_goes_first_and_reaches_the_worker() -> None:
    router = Router("a")
    runs = full(router)
    low, usual, high = ask(router, "l", priority=5), ask(router, "u"), ask(router, "h", priority=-5)
    for run in runs[:3]:
        finish(router, run)
    started = [order.request_id for order in router.orders[-3:]]
    assert started == [high.name, usual.name, low.name]
    assert [order.priority for order in router.orders[-3:]] == [1005, 1000, 995]


def test_a_full_queue_makes_room_for_who_has_little_there() -> None:
    router = Router("a", admission=AdmissionLimits(max_requests=SEATS + AHEAD + 4))
    full(router)
    flood = [ask(router, f"f{number}", "flood") for number in range(4)]
    with pytest.raises(errors.Overloaded) as caught:
        ask(router, "more", "flood")
    assert caught.value.retry_after_s
    other = ask(router, "o", "other")
    assert other.stage is Stage.ROUTING
    assert [type(run.error) for run in flood] == [type(None)] * 3 + [errors.Overloaded]
    assert flood[3].error is not None
    assert flood[3].error.retry_after_s
    admission = router.life.admission
    assert admission.offered == admission.accepted + admission.rejected + admission.cancelled
    assert (admission.rejected, len(admission)) == (2, SEATS + AHEAD + 4)


def test_nobody_gives_way_in_vain() -> None:
    router = Router("a", admission=AdmissionLimits(max_requests=100, max_tokens=55 * (SEATS + AHEAD + 4)))
    full(router)
    flood = [ask(router, f"f{number}", "flood") for number in range(4)]
    with pytest.raises(errors.Overloaded):
        ask(router, "large", "other", prompt_ids=tuple(range(2000)))
    assert not any(run.error for run in flood)


def test_a_wait_that_is_longer_than_the_deadline_is_refused_with_the_time_to_come_back() -> None:
    router = Router("a")
    runs = full(router)
    waiting = [ask(router, f"w{number}") for number in range(20)]
    for second in range(1, 11):  # one request of 55 tokens per second
        router.pass_s(1.0)
        router.roster.announced(router.roster.fleet.get("a").facts, router.now_s)  # type: ignore[union-attr]
        finish(router, runs[second])
    assert router.life.admission.full_rate.per_s(router.now_s) == pytest.approx(55, rel=0.1)
    left = sum(not run.dispatches for run in waiting)
    with pytest.raises(errors.Overloaded, match="come first") as caught:
        ask(router, "hasty", timeout_s=left - 4.0)
    assert caught.value.retry_after_s == pytest.approx(4.0, abs=1.0)
    assert ask(router, "patient", timeout_s=left + 2.0).stage is Stage.ROUTING
    with pytest.raises(errors.Overloaded, match="come first"):
        router.life.foresee(Announced("acme", 0, None, 100, left - 4.0), router.now_s)
    router.life.foresee(Announced("acme", 0, None, 100, left + 2.0), router.now_s)
    router.life.foresee(Announced("another", 0, None, 100, left - 4.0), router.now_s)


def test_a_deadline_that_passes_in_the_queue_ends_it_without_a_worker() -> None:
    router = Router("a")
    full(router)
    sent = len(router.sent)
    waits = ask(router, "w", timeout_s=1.0)
    router.pass_s(1.1)
    assert isinstance(waits.error, errors.DeadlineExceeded)
    assert (len(router.sent), len(router.life.entrance)) == (sent, 0)
    late = Timeline()
    late.mark(Instant.ARRIVED, router.now_s - 5.0)
    request = Request("late", "m", (1, 2), SamplingParams(max_tokens=1), 1, "acme", 4.0)
    with pytest.raises(errors.DeadlineExceeded):
        router.life.admit(request, late, router.now_s)
    assert router.life.admission.rejected == 2


def test_a_client_that_leaves_the_queue_frees_its_place() -> None:
    router = Router("a")
    full(router)
    waits = ask(router, "w")
    router.life.fail(waits, errors.Cancelled("left"), router.now_s)
    assert (len(router.life.entrance), router.life.admission.cancelled) == (0, 1)


def test_an_answer_that_would_come_too_late_is_not_begun_once_lengths_and_steps_are_known() -> None:
    router = Router("a")
    event = worker_pb2.WatchEvent(incarnation=1)
    event.load.role, event.load.free_blocks, event.load.decode_step_ms = 3, 1000, 100.0
    event.load.prefill_ms_per_token = 0.01
    router.roster.watching(WorkerKey("a", 1))
    assert router.roster.take_event(WorkerKey("a", 1), event, 0.0)
    long = {"sampling": SamplingParams(max_tokens=100), "timeout_s": 2.0}
    assert ask(router, "unknown", **long).stage is Stage.DISPATCHED, "answers may be short: nothing is known"
    router.life.admission.answers.mean = 0.5
    late = ask(router, "late", **long)
    assert isinstance(late.error, errors.DeadlineExceeded), "50 steps of 100 ms"
    assert ask(router, "soon", sampling=SamplingParams(max_tokens=100), timeout_s=6.0).stage is Stage.DISPATCHED


def test_quotas_are_charged_once_and_what_is_not_used_comes_back() -> None:
    router = Router("a")
    key = Allowance("k", requests_per_minute=10, tokens_per_minute=110)
    run = ask(router, "r1", allowance=key)
    ask(router, "r2", allowance=key)
    with pytest.raises(errors.QuotaExceeded) as caught:
        ask(router, "r3", allowance=key)
    assert caught.value.retry_after_s == pytest.approx(30.0)
    router.tokens(run)
    router.end(run)  # 1 of 5 expected tokens
    with pytest.raises(errors.QuotaExceeded) as caught:
        ask(router, "r4", allowance=key)
    assert caught.value.retry_after_s == pytest.approx(51 * 60 / 110)
    with pytest.raises(errors.QuotaExceeded):
        router.life.foresee(Announced("acme", 0, key, 16 * 50, 9.0), router.now_s)
    assert router.life.admission.rejected == 3


def test_a_request_that_was_never_served_costs_no_quota() -> None:
    router = Router("a")
    full(router)
    key = Allowance("k", requests_per_minute=1, tokens_per_minute=55)
    for name in ("r1", "r2", "r3"):
        run = ask(router, name, allowance=key)
        router.life.fail(run, errors.Cancelled("left"), router.now_s)


def test_a_stream_that_goes_on_elsewhere_passes_the_queue() -> None:
    router = Router("a", "b")
    runs = [ask(router, f"r{number}") for number in range(2 * (SEATS + AHEAD))]
    waits = ask(router, "w")
    lost = next(run for run in runs if run.dispatches[0].decode.worker_id == "a")
    router.tokens(lost)
    router.roster.session_down(WorkerKey("a", 1), "broke", router.now_s)
    router.pass_s(0.0)
    assert lost.dispatches[-1].decode.worker_id == "b"
    assert waits.stage is Stage.ROUTING


def test_predictions_that_are_right_on_average_and_often_wrong_are_trusted_less() -> None:
    exact, wrong = TimingError(), TimingError()
    for number in range(60):
        exact.note(100.0, 100.0)
        wrong.note(100.0, 50.0 if number % 2 else 150.0)
    assert exact.factor == pytest.approx(1.0)
    assert 1.3 < wrong.factor < 1.7
