"""The life of requests as a pure machine: what is sent, what is taken, and that everything is given back."""

from __future__ import annotations

import pytest
from support.fakes.list_router import MODEL, Router

from twostroke.core import errors
from twostroke.core.request import Role, SamplingParams
from twostroke.kv.block import BlockIdentity
from twostroke.protos import common_pb2, worker_pb2
from twostroke.router.requests.admission.bounds import AdmissionLimits
from twostroke.router.requests.state import RequestState, Stage
from twostroke.router.routing.facts import WorkerFacts, WorkerKey
from twostroke.router.routing.policy import PolicyLimits


def placed(run: RequestState) -> WorkerKey:
    assert run.living is not None
    return run.living.decode


def test_a_request_is_ordered_heard_and_settled_and_nothing_is_left() -> None:
    router = Router("a", "b")
    run = router.ask()
    key = placed(run)
    assert router.sent == [(key.worker_id, f"submit {run.name}#0 @1")]
    router.tokens(run, 2)
    router.end(run)
    assert run.stage is Stage.SETTLED
    assert [len(piece.token_ids) for piece in iter(run.take_piece, None)] == [2, 0]
    assert run.is_over
    assert router.life.conclude(run)
    assert not router.life.conclude(run)
    assert router.life.admission.accepted == 1
    router.assert_nothing_is_left()


def test_what_each_choice_costs_is_counted_until_it_is_over() -> None:
    router = Router("a")
    run = router.ask(num_choices=2)
    worker = router.roster.fleet.get("a")
    assert worker is not None
    assert router.life.admission.tokens == 2 * (50 + run.request.expected_tokens)
    assert (worker.queued_prefill_tokens, worker.num_decoding) == (51, 2)
    router.tokens(run, choice=0)
    assert (worker.queued_prefill_tokens, worker.num_decoding) == (1, 2)
    router.tokens(run, choice=1)
    assert (worker.queued_prefill_tokens, worker.num_decoding) == (0, 2)
    router.end(run, choice=0)
    assert worker.num_decoding == 1


def test_only_the_worker_that_was_asked_is_heard() -> None:
    router = Router("a", "b")
    run = router.ask()
    other = next(key for key in router.up if key != placed(run))
    output = worker_pb2.TokenOutput(request_id=run.name, token_ids=[1])
    output.epoch.incarnation, output.epoch.counter = run.dispatches[-1].epoch
    router.life.take_step(other, worker_pb2.StepOutput(tokens=[output]), router.now_s)
    router.end(run, key=other)
    assert (run.delivery.completion_tokens, run.stage) == (0, Stage.DISPATCHED)
    assert router.drops == ["wrong_worker", "wrong_worker"]


def test_one_loss_is_one_dispatch_even_if_it_is_told_twice_while_nobody_is_there() -> None:
    router = Router("a")
    run = router.ask()
    key = placed(run)
    router.roster.session_down(key, "broke", router.now_s)  # lost
    assert run.stage is Stage.ROUTING
    router.pass_s(0.6)
    assert run.stage is Stage.ROUTING, "nobody is there"
    router.roster.announce_ended(key, router.now_s)  # gone: the same loss once more
    router.join("b")
    router.join("d")
    router.pass_s(0.1)
    assert [what for _, what in router.sent if what.startswith("submit")] == [
        f"submit {run.name}#0 @1",
        f"submit {run.name}#0 @2",
    ]
    assert router.lost_runs == ["r"]
    assert router.life.admission._retry_tokens == router.life.admission.limits.retry_reserve, "a loss costs no retry"
    assert len(run.dispatches) == 2
    assert placed(run).worker_id in ("b", "d")


def test_the_old_worker_is_told_when_a_request_is_sent_elsewhere() -> None:
    router = Router("a", "b")
    run = router.ask(num_choices=2)
    first = placed(run)
    router.end(run, choice=1, code="overloaded")  # its sibling runs on there
    assert router.sent[-1] == (first.worker_id, f"cancel {run.name} @1")
    router.tokens(run, choice=0)  # under way meanwhile: stale
    assert router.drops == ["wrong_worker"]
    assert not [w for w in router.roster.fleet if w.in_flight], "it counts against nobody while it is routed"
    router.pass_s(0.0)
    second = placed(run)
    assert second != first, "the worker that refused it is passed over"
    assert [what for name, what in router.sent if name == second.worker_id] == [
        f"submit {run.name}#0 @2",
        f"submit {run.name}#1 @2",
    ]
    for choice in (0, 1):
        router.end(run, choice)
    router.life.conclude(run)
    router.assert_nothing_is_left()


def test_siblings_that_were_ordered_before_a_queue_was_full_are_cancelled() -> None:
    router = Router("a", "b")
    router.full = {"a", "b"}
    run = router.ask(num_choices=3)
    tried = {name for name, _ in router.sent}
    assert tried == {"a", "b"}
    for name, counter in zip(dict(router.sent), (1, 2), strict=True):
        assert [what for who, what in router.sent if who == name] == [
            f"submit {run.name}#0 @{counter}",
            f"cancel {run.name} @{counter}",
        ]
    assert not [w for w in router.roster.fleet if w.in_flight]
    router.pass_s(3.0)
    assert isinstance(run.error, errors.Unavailable)
    router.life.conclude(run)
    router.assert_nothing_is_left()


def test_a_worker_whose_session_broke_gets_the_request_once_more_when_it_is_back() -> None:
    router = Router("a")
    run = router.ask()
    key = placed(run)
    router.roster.session_down(key, "broke", router.now_s)
    router.pass_s(0.05)
    assert run.stage is Stage.ROUTING
    router.join("a")
    router.pass_s(0.0)
    assert placed(run) == key
    assert [d.epoch.counter for d in run.dispatches] == [1, 2], "the higher one ends what still runs there"
    stale = router.drops.copy()
    router.tokens(run, epoch=run.dispatches[0].epoch)
    assert router.drops == [*stale, "stale_epoch"]


def test_what_a_recalled_dispatch_still_sends_is_stale() -> None:
    router = Router("a")
    run = router.ask()
    epoch = run.dispatches[0].epoch
    run.recall(errors.WorkerLost("gone"), router.now_s)
    assert not run.delivery.is_awaited(0, epoch)


def test_the_end_of_an_older_dispatch_on_the_same_worker_is_stale() -> None:
    router = Router("a")
    run = router.ask()
    key, old = placed(run), run.dispatches[0].epoch
    router.roster.session_down(key, "broke", router.now_s)
    router.join("a")
    router.pass_s(0.0)
    assert placed(run) == key
    end = worker_pb2.RequestEnd(request_id=run.name, reason=common_pb2.FINISH_REASON_CANCELLED)
    end.epoch.incarnation, end.epoch.counter = old
    router.life.take_step(key, worker_pb2.StepOutput(ends=[end]), router.now_s)
    assert (run.stage, len(run.dispatches), router.drops) == (Stage.DISPATCHED, 2, ["stale_epoch"])


def test_an_end_before_all_tokens_came_is_no_end() -> None:
    router = Router("a", "b")
    first, second = router.ask("r1"), router.ask("r2")
    router.tokens(first)
    router.end(first, missing=1)  # the client has some of it already
    router.end(second, missing=5)
    router.pass_s(0.0)
    assert len(first.dispatches) == len(second.dispatches) == 2
    assert first.dispatches[0].left is not None
    assert isinstance(first.dispatches[0].left.error, errors.TokensLost)
    assert first.finish_reasons == second.finish_reasons == ()


@pytest.mark.parametrize("code", ["unavailable", "worker_lost", "tokens_lost"])
def test_a_request_is_sent_three_times_at_most(code: str) -> None:
    router = Router("a", "b", "c", "d")
    run = router.ask()
    workers = []
    while run.stage is not Stage.SETTLED:
        workers.append(placed(run))
        router.end(run, code=code)
        router.pass_s(0.0)
    assert len(workers) == len(set(workers)) == 3
    assert run.error is not None
    assert run.error.code == code


def test_the_retry_budget_is_charged_once_per_second_dispatch() -> None:
    router = Router("a", "b", admission=AdmissionLimits(retry_reserve=1.0, retry_share=0.0))
    first, second = router.ask("r1"), router.ask("r2")
    for run in (first, second):
        router.end(run, code="unavailable")
    assert first.stage is Stage.ROUTING
    assert isinstance(second.error, errors.Unavailable), "the budget is spent"


def test_a_request_waits_for_a_worker_and_gives_up_when_its_patience_is_over() -> None:
    router = Router("p")
    router.roster.session_down(WorkerKey("p", 1), "broke", 0.0)
    waits, gives_up = router.ask("r1"), router.ask("r2", timeout_s=0.5)
    router.pass_s(1.0)
    assert waits.stage is Stage.ROUTING
    assert isinstance(gives_up.error, errors.DeadlineExceeded)
    router.join("q")
    router.pass_s(0.0)
    assert placed(waits).worker_id == "q"
    late = Router("p")
    late.roster.session_down(WorkerKey("p", 1), "broke", 0.0)
    run = late.ask()
    late.pass_s(2.1)
    assert isinstance(run.error, errors.Unavailable)
    assert late.life.admission.rejected == 1
    late.life.conclude(run)
    late.assert_nothing_is_left()


def test_who_gives_up_waiting_says_why_it_had_to_wait() -> None:
    router = Router("a")
    run = router.ask()
    router.end(run, code="tokens_lost")
    router.pass_s(9.0)
    assert isinstance(run.error, errors.TokensLost)


def test_a_settled_request_wakes_those_that_wait() -> None:
    router = Router("a")
    router.roster.session_down(WorkerKey("a", 1), "broke", 0.0)
    one, other = router.ask("r1"), router.ask("r2")
    looked: list[str] = []
    route = router.life._route
    router.life._route = lambda run, now_s: (looked.append(run.request_id), route(run, now_s))  # type: ignore[method-assign]
    router.life.fail(one, errors.Cancelled("gone"), 0.0)
    router.pass_s(0.0)
    assert looked == ["r2"]
    assert other.stage is Stage.ROUTING


def test_the_clients_id_is_no_key_inside() -> None:
    router = Router("a")
    one, other = router.ask("same", domain="acme"), router.ask("same", domain="umbrella")
    assert one.name != other.name
    assert all(run.name.startswith("same@") for run in (one, other))
    with pytest.raises(errors.InvalidRequest, match="in use"):
        router.ask("same", domain="acme")
    assert router.life.runs.find("umbrella", "same") is other
    assert not router.life.abort("nobody", "same", 0.0)
    assert router.life.abort("umbrella", "same", 0.0)
    assert (one.error, other.stage) == (None, Stage.SETTLED)
    router.end(one)
    for run in (one, other):
        router.life.conclude(run)
    again = router.ask("same", domain="acme")
    assert again.name not in (one.name, other.name)
    long = router.ask("x" * 1000)
    assert len(long.name) < 200


def test_names_of_two_routers_and_of_two_lives_differ() -> None:
    names = set()
    for incarnation in (1, 2):
        router = Router("a")
        router.life._incarnation = incarnation
        names.add(router.ask().name)
    assert len(names) == 2


def test_every_way_out_cancels_the_deadline_and_gives_everything_back() -> None:
    ways = {
        "end": lambda router, run: router.end(run),
        "verdict": lambda router, run: router.end(run, code="non_finite_kv"),
        "abort": lambda router, run: router.life.abort("acme", "r", router.now_s),
        "left": lambda router, run: router.life.fail(run, errors.Cancelled("left"), router.now_s),
        "deadline": lambda router, run: router.pass_s(9.1),
        "lost": lambda router, run: (
            router.tokens(run),
            router.roster.session_down(placed(run), "broke", router.now_s),
            router.pass_s(9.1),
        ),
    }
    expected = {"end": "accepted", "abort": "cancelled", "left": "cancelled"}
    for way, leave in ways.items():
        router = Router("a")
        run = router.ask()
        leave(router, run)
        assert run.stage is Stage.SETTLED, way
        router.life.conclude(run)
        assert getattr(router.life.admission, expected.get(way, "accepted")) == 1, way
        router.assert_nothing_is_left()


def test_a_client_that_does_not_read_is_given_up() -> None:
    router = Router("a", buffer_pieces=2, slow_client_s=1.0)
    run = router.ask()
    for _ in range(4):
        router.tokens(run)
    router.life.tick(0.9)
    assert run.error is None
    router.life.tick(1.1)
    assert isinstance(run.error, errors.Cancelled)
    assert router.sent[-1][1].startswith("cancel")


def test_prompts_that_are_scored_expect_nothing_cached() -> None:
    blocks = [BlockIdentity(bytes([n] * 16)) for n in range(3)]
    for scored, held in ((None, 48), (0, 0)):
        router = Router("a")
        router.identities = lambda *_: blocks  # type: ignore[method-assign]
        router.roster.watching(WorkerKey("a", 1))
        event = worker_pb2.WatchEvent(incarnation=1, sequence=1)
        event.snapshot.identities, event.snapshot.last = b"".join(blocks), True
        assert router.roster.take_event(WorkerKey("a", 1), event, 0.0)
        run = router.ask(sampling=SamplingParams(max_tokens=5, prompt_logprobs=scored))
        assert run.dispatches[0].choice.winner.decode_held_tokens == held


def test_what_workers_drop_is_dropped_from_the_map() -> None:
    router = Router("a")
    blocks = [BlockIdentity(bytes([n] * 16)) for n in range(3)]
    key = WorkerKey("a", 1)
    router.roster.watching(key)
    snapshot = worker_pb2.WatchEvent(incarnation=1, sequence=1)
    snapshot.snapshot.identities, snapshot.snapshot.last = b"".join(blocks), True
    delta = worker_pb2.WatchEvent(incarnation=1, sequence=2)
    delta.delta.removed = blocks[2]
    other_life = worker_pb2.WatchEvent(incarnation=2, sequence=3)
    other_life.delta.stored = blocks[2]
    assert router.roster.take_event(key, snapshot, 0.0)
    assert router.roster.take_event(key, delta, 0.0)
    assert not router.roster.take_event(key, other_life, 0.0)
    assert not router.roster.take_event(WorkerKey("b", 1), delta, 0.0)
    assert router.roster.prefixes.held(blocks) == {"a": 2}


def test_a_worker_that_falls_silent_is_tried_again_and_one_that_goes_is_left() -> None:
    router = Router("a", "b")
    for beat in [number / 5 for number in range(1, 13)]:
        router.roster.beat(WorkerKey("b", 1), worker_pb2.Beat(phase="run", steps=7), beat)
        router.roster.announced(WorkerFacts("a", 1, Role.COMBINED, "a:1", MODEL, 1000, 16, 16, 2048), beat)
        router.roster.tick(beat, 100)
    worker = router.roster.fleet.get("b")
    assert worker is not None
    assert (worker.phase, worker.steps) == ("run", 7)
    router.roster.announce_ended(WorkerKey("b", 1), 2.5)
    router.roster.session_down(WorkerKey("b", 1), "broke", 2.6)
    assert router.wires == ["connect a #1", "connect b #1", "reset a #1", "disconnect b #1"]


def test_of_an_earlier_life_nothing_is_heard_and_nothing_stays() -> None:
    router = Router("a")
    blocks = [BlockIdentity(bytes([n] * 16)) for n in range(3)]
    old, new, roster = WorkerKey("a", 1), WorkerKey("a", 2), router.roster
    snapshot = worker_pb2.WatchEvent(incarnation=1, sequence=1)
    snapshot.snapshot.identities, snapshot.snapshot.last = b"".join(blocks), True
    roster.watching(old)
    assert roster.take_event(old, snapshot, 0.0)
    assert roster.prefixes.held(blocks) == {"a": 3}
    router.join("a", incarnation=2)
    assert roster.prefixes.held(blocks) == {}
    roster.watching(old)  # its link is still closing
    assert not roster.prefixes.needs_snapshot("a")
    roster.watching(new)
    assert not roster.take_event(old, snapshot, 0.0)
    assert roster.prefixes.held(blocks) == {}
    roster.tick(0.0, 100)
    assert len(roster.prefixes) == 0


def test_deadlines_count_from_the_arrival_on_the_worker_too() -> None:
    router = Router("a")
    router.now_s = 3.0
    run = router.ask(arrived_s=1.0, timeout_s=9.0)
    assert router.timeouts_ms == [7000]
    router.pass_s(2.0)
    router.end(run, code="overloaded")
    router.join("b")
    router.pass_s(0.1)
    assert router.timeouts_ms == [7000, 5000]
    router.pass_s(4.8)
    assert run.stage is Stage.DISPATCHED
    router.pass_s(0.2)
    assert isinstance(run.error, errors.DeadlineExceeded)


def test_a_request_that_is_taken_back_waits_as_long_as_a_new_one() -> None:
    router = Router("a")
    run = router.ask()
    router.pass_s(5.0)
    router.roster.beat(placed(run), None, router.now_s)
    router.roster.session_down(placed(run), "broke", router.now_s)
    router.pass_s(1.9)
    assert run.stage is Stage.ROUTING
    router.pass_s(0.2)
    assert isinstance(run.error, errors.WorkerLost)


def test_an_equal_prompt_goes_to_the_prefill_worker_that_computes_the_first_one() -> None:
    """Also while nothing has told the router yet that its blocks are cached there."""
    router = Router(policy=PolicyLimits(local_prefill=False))
    router.identities = lambda *_: [BlockIdentity(bytes([n]) * 16) for n in range(3)]  # type: ignore[method-assign]
    for name, role in (("p", Role.PREFILL), ("q", Role.PREFILL), ("d", Role.DECODE), ("e", Role.DECODE)):
        router.roster.watching(router.join(name, role=role))
    first, second = [router.ask(name).dispatches[-1].choice.winner for name in ("first", "second")]
    assert first.prefill is not None
    assert (first.prefill_held_tokens, second.prefill_held_tokens, second.decode_held_tokens) == (0, 48, 0)
    assert second.computes.worker_id == first.prefill.worker_id
