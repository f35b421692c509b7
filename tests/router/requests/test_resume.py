"""A stream survives the loss of its worker: what is ordered again, and which requests are suspected of the loss."""

from __future__ import annotations

from support.fakes.list_router import MODEL, Router

from twostroke.core import errors
from twostroke.core.request import Role, SamplingParams
from twostroke.core.timeline import Instant
from twostroke.kv.block import BlockIdentity
from twostroke.protos import worker_pb2
from twostroke.router.requests.lifecycle import MAX_RESUMED_DISPATCHES
from twostroke.router.requests.state import RequestState, Stage
from twostroke.router.requests.suspects import APART_S, PROOF_TOKENS
from twostroke.router.routing.buddies import KEEPS
from twostroke.router.routing.candidates import PolicyLimits
from twostroke.router.routing.facts import WorkerFacts, WorkerKey

LONG = SamplingParams(max_tokens=100)


def placed(run: RequestState) -> WorkerKey:
    assert run.living is not None, run.stage
    return run.living.decode


def kill(router: Router, key: WorkerKey) -> None:
    router.roster.session_down(key, "broke", router.now_s)
    router.roster.announce_ended(key, router.now_s)
    router.pass_s(0.0)


def test_a_lost_stream_is_ordered_again_after_what_its_client_has() -> None:
    router = Router("a", "b")
    run = router.ask(num_choices=3, sampling=SamplingParams(max_tokens=5, prompt_logprobs=1))
    router.tokens(run, 2, choice=0)
    router.tokens(run, 1, choice=2)
    first = placed(run)
    kill(router, first)
    assert placed(run) != first
    orders = router.orders[-3:]
    assert [(order.choice, order.emitted_tokens, len(order.prompt_ids)) for order in orders] == [
        (0, 2, 52),
        (1, 0, 50),
        (2, 1, 51),
    ]
    assert all(order.prompt_ids[:50] == list(range(50)) for order in orders)
    assert all(order.epoch.counter == 2 for order in orders)
    assert not any(order.sampling.HasField("prompt_logprobs") for order in orders), "the client has them"
    router.tokens(run, 3, choice=0)
    pieces = [piece for piece in iter(run.take_piece, None) if piece.choice == 0]
    assert [piece.first_index for piece in pieces] == [0, 2]


def test_a_scored_prompt_that_is_sent_again_may_use_what_is_cached() -> None:
    blocks = [BlockIdentity(bytes([n] * 16)) for n in range(3)]
    router = Router("a", "b")
    router.identities = lambda *_: blocks  # type: ignore[method-assign]
    for name in ("a", "b"):
        router.roster.watching(WorkerKey(name, 1))
        event = worker_pb2.WatchEvent(incarnation=1, sequence=1)
        event.snapshot.identities, event.snapshot.last = b"".join(blocks), True
        assert router.roster.take_event(WorkerKey(name, 1), event, 0.0)
    run = router.ask(sampling=SamplingParams(max_tokens=5, prompt_logprobs=1))
    router.tokens(run)
    kill(router, placed(run))
    held = [dispatch.choice.winner.decode_held_tokens for dispatch in run.dispatches]
    assert held == [0, 48], "the second one scores nothing"


def test_what_the_first_worker_still_sends_is_dropped() -> None:
    router = Router("a")
    run = router.ask(sampling=LONG)
    router.tokens(run)
    key, epoch = placed(run), run.dispatches[0].epoch
    router.roster.session_down(key, "silent", router.now_s)  # frozen: it comes back as the same one
    router.join("a")
    router.pass_s(0.0)
    assert placed(run) == key
    late = worker_pb2.TokenOutput(request_id=run.name, token_ids=[9], first_index=1)
    late.epoch.incarnation, late.epoch.counter = epoch
    router.life.take_step(key, worker_pb2.StepOutput(tokens=[late]), router.now_s)
    assert router.drops[-1] == "stale_epoch"
    assert run.delivery.ids_of(0) == (1,)


def test_choices_that_ended_are_not_ordered_again() -> None:
    router = Router("a", "b")
    run = router.ask(num_choices=2)
    router.tokens(run, 5, choice=0)
    router.end(run, choice=0)
    kill(router, placed(run))
    assert [order.choice for order in router.orders] == [0, 1, 1]
    router.end(run, choice=1)
    assert (run.stage, run.error, run.usage.completion_tokens) == (Stage.SETTLED, None, 5)
    router.life.conclude(run)
    router.assert_nothing_is_left()


def test_the_work_that_is_left_is_counted() -> None:
    router = Router("a", "b")
    run = router.ask(num_choices=2, sampling=SamplingParams(max_tokens=60))
    router.tokens(run, 30, choice=1)
    router.tokens(run, 60, choice=0)
    router.end(run, choice=0)
    kill(router, placed(run))
    assert (run.facts.prompt_tokens, run.facts.expected_tokens, run.facts.num_choices) == (80, 30, 1)
    worker = router.roster.fleet.get(placed(run).worker_id)
    assert worker is not None
    assert (worker.queued_prefill_tokens, worker.num_decoding) == (80, 1)
    router.tokens(run, 1, choice=1)
    assert worker.queued_prefill_tokens == 0, "its first token here is not its first"


def test_a_draining_workers_streams_go_on_elsewhere_without_suspicion() -> None:
    router = Router("a", "b")
    run = router.ask(sampling=LONG)
    router.tokens(run)
    key = placed(run)
    router.roster.leaving(key)
    router.roster.session_down(key, "closed", router.now_s)
    router.pass_s(0.0)
    assert placed(run) != key
    assert run.suspicion is None


def test_a_stream_waits_for_its_only_worker_to_come_back() -> None:
    router = Router("a", return_s=5.0)
    run = router.ask(sampling=LONG)
    router.tokens(run)
    kill(router, placed(run))
    router.pass_s(4.0)
    assert run.stage is Stage.ROUTING
    router.join("a", incarnation=2)
    router.pass_s(0.0)
    assert placed(run) == WorkerKey("a", 2)
    late = Router("a", return_s=5.0)
    run = late.ask(sampling=LONG)
    late.tokens(run)
    kill(late, placed(run))
    late.pass_s(5.1)
    assert isinstance(run.error, errors.WorkerLost)


def test_a_stream_asks_those_again_that_refused_it() -> None:
    router = Router("a", "b", return_s=30.0)
    run = router.ask(sampling=LONG)
    router.tokens(run)
    kill(router, placed(run))
    for _ in range(3):
        router.end(run, code="overloaded")
        router.pass_s(0.0)
        assert run.stage is Stage.ROUTING
        router.pass_s(1.0)
        assert run.stage is Stage.DISPATCHED
    assert run.error is None


def test_a_stream_waits_longer_for_a_full_cluster_than_a_new_request() -> None:
    router = Router("a", "b", return_s=6.0)
    run = router.ask(sampling=LONG)
    router.tokens(run)
    key = placed(run)
    router.roster.leaving(key)
    (heir,) = [other for other in router.up if other != key]
    router.up.discard(heir)  # it takes no orders for a while
    router.roster.session_down(key, "closed", router.now_s)
    fresh = router.ask("fresh")
    router.pass_s(4.0)
    assert isinstance(fresh.error, errors.Unavailable)
    assert run.stage is Stage.ROUTING
    router.up.add(heir)
    router.pass_s(1.0)
    assert placed(run) == heir


def test_a_stream_that_skips_tokens_goes_on_elsewhere_until_the_bound() -> None:
    router = Router("a", "b", return_s=30.0)
    run = router.ask(sampling=LONG, timeout_s=1000.0)
    router.tokens(run)
    while run.error is None:
        output = worker_pb2.TokenOutput(request_id=run.name, token_ids=[5], first_index=7)
        output.epoch.incarnation, output.epoch.counter = run.dispatches[-1].epoch
        router.life.take_step(placed(run), worker_pb2.StepOutput(tokens=[output]), router.now_s)
        router.pass_s(1.1)
        assert len(run.dispatches) <= MAX_RESUMED_DISPATCHES
    assert isinstance(run.error, errors.TokensLost)
    assert len(run.dispatches) == MAX_RESUMED_DISPATCHES
    assert run.delivery.ids_of(0) == (1,)


def test_the_timeline_keeps_the_first_token_of_the_first_worker() -> None:
    router = Router("a", "b")
    run = router.ask()
    router.pass_s(1.0)
    router.tokens(run)
    kill(router, placed(run))
    router.pass_s(1.0)
    router.tokens(run, 4)
    end = worker_pb2.RequestEnd(request_id=run.name, reason=2)
    end.timeline.add(name="first_token", since_seen_ns=10**9)
    end.timeline.add(name="last_token", since_seen_ns=2 * 10**9)
    end.epoch.incarnation, end.epoch.counter = run.dispatches[-1].epoch
    end.usage.completion_tokens = 5
    router.life.take_step(placed(run), worker_pb2.StepOutput(ends=[end]), router.now_s)
    assert run.timeline.at_s(Instant.FIRST_TOKEN) == 1.0
    assert run.timeline.at_s(Instant.LAST_TOKEN) == 3.0
    assert run.dispatches[1].timeline.at_s(Instant.FIRST_TOKEN) == 2.0


def test_the_timeline_of_an_answer_without_a_token_is_its_workers() -> None:
    router = Router("a", "b")
    run = router.ask()
    router.pass_s(1.0)
    end = worker_pb2.RequestEnd(request_id=run.name, reason=1)  # the first token was the end
    end.timeline.add(name="received", since_seen_ns=10**9)
    end.epoch.incarnation, end.epoch.counter = run.dispatches[-1].epoch
    router.life.take_step(placed(run), worker_pb2.StepOutput(ends=[end]), router.now_s)
    assert run.timeline.at_s(Instant.RECEIVED) == run.dispatches[-1].at_s + 1.0


# ------------------------------------------------------------------ who killed it


def test_a_request_that_kills_each_of_its_workers_takes_two_and_gets_a_500() -> None:
    router = Router("a", "b", "c")
    run = router.ask(sampling=LONG)
    router.tokens(run, 3)
    first = placed(run)
    kill(router, first)
    second = placed(run)
    router.tokens(run, PROOF_TOKENS - 1)
    kill(router, second)
    assert isinstance(run.error, errors.PoisonRequest)
    assert run.error.http_status == 500
    assert first.worker_id in run.error.message
    assert second.worker_id in run.error.message
    assert len(run.dispatches) == 2


def test_suspects_are_ordered_one_at_a_time_and_only_the_guilty_one_fails() -> None:
    router = Router("a", "b", return_s=30.0)
    runs = [router.ask(f"r{i}", sampling=LONG) for i in range(4)]
    victim = placed(runs[0])
    together = [run for run in runs if placed(run) == victim]
    others = [run for run in runs if placed(run) != victim]
    for run in runs:
        router.tokens(run)
    kill(router, victim)
    guilty, innocent = together
    assert all(run.suspicion is not None for run in together)
    assert all(run.suspicion is None for run in others)
    assert guilty.stage is Stage.DISPATCHED
    assert innocent.stage is Stage.ROUTING, "it waits until the other one has shown that it is harmless"
    router.pass_s(5.0)
    assert innocent.stage is Stage.ROUTING, "and for longer than for a worker"
    heir = placed(guilty)
    kill(router, heir)
    router.join("c")
    router.pass_s(0.0)
    assert isinstance(guilty.error, errors.PoisonRequest)
    assert all(run.error is None and run.suspicion is None for run in others), "whoever was beside it is not blamed"
    assert all(placed(run).worker_id == "c" for run in others)
    assert innocent.stage is Stage.ROUTING, "workers may still compute the guilty one"
    router.pass_s(APART_S)
    assert placed(innocent).worker_id == "c"


def test_a_suspect_that_gets_on_is_innocent_and_lets_the_next_one_in() -> None:
    router = Router("a", "b")
    runs = [router.ask(f"r{i}", sampling=LONG) for i in range(4)]
    victim = placed(runs[0])
    first, second = [run for run in runs if placed(run) == victim]
    for run in runs:
        router.tokens(run)
    kill(router, victim)
    router.tokens(first, PROOF_TOKENS - 1)
    router.pass_s(0.0)
    assert second.stage is Stage.ROUTING
    router.tokens(first)
    router.pass_s(0.0)
    assert first.suspicion is None
    assert second.stage is Stage.DISPATCHED
    router.life.abort("acme", second.request_id, router.now_s)
    assert not router.life._waiting


def test_the_end_of_a_suspect_lets_the_next_one_in() -> None:
    for leave in ("end", "abort", "refused", "refused in the middle"):
        router = Router("a", "b")
        runs = [router.ask(f"r{i}", sampling=LONG) for i in range(4)]
        victim = placed(runs[0])
        first, second = [run for run in runs if placed(run) == victim]
        for run in runs if leave == "refused in the middle" else ():
            router.tokens(run)  # it waits for the next worker then, and does not fail
        kill(router, victim)
        assert second.stage is Stage.ROUTING
        if leave == "end":
            router.end(first)
        elif leave == "abort":
            router.life.abort("acme", first.request_id, router.now_s)
        else:
            router.end(first, code="unavailable")
        router.pass_s(0.0)
        assert second.stage is Stage.DISPATCHED, leave


def test_a_prompt_that_kills_prefill_workers_takes_two() -> None:
    router = Router(policy=PolicyLimits(local_prefill=False))
    router.join("d", role=Role.DECODE)
    for name in ("p", "q"):
        router.join(name, role=Role.PREFILL)
    run = router.ask(sampling=LONG)
    assert run.living is not None
    peers = [peer.key for peer in run.living.choice.prefill_peers]
    assert len(peers) == 2
    kill(router, peers[0])
    assert run.stage is Stage.DISPATCHED
    assert run.suspicion is not None
    kill(router, peers[1])
    assert isinstance(run.error, errors.PoisonRequest)
    assert router.sent[-1] == ("d", f"cancel {run.name} @1")


def disaggregated(*requests: str) -> tuple[Router, list[RequestState], list[WorkerKey]]:
    """Requests on one decode worker; the prefill workers that compute their prompts, the first one now."""
    router = Router(policy=PolicyLimits(local_prefill=False))
    for name, role in (("d", Role.DECODE), ("p", Role.PREFILL)):
        router.join(name, role=role)
    runs = [router.ask(name, sampling=LONG) for name in requests]
    assert runs[0].living is not None
    return router, runs, [peer.key for peer in runs[0].living.choice.prefill_peers]


def test_a_request_whose_prompt_was_computed_did_not_kill_the_prefill_worker() -> None:
    router, (begun, waiting), peers = disaggregated("begun", "waiting")
    router.tokens(begun)
    kill(router, peers[0])
    assert (begun.suspicion, waiting.suspicion is None) == (None, False)


def test_of_several_suspects_on_one_worker_none_is_guilty() -> None:
    router, runs, peers = disaggregated("one", "other")
    kill(router, peers[0])
    assert all(run.suspicion is not None for run in runs)
    innocent = router.ask("innocent", sampling=LONG)
    router.join("e", role=Role.DECODE)
    router.join("q", role=Role.PREFILL)
    router.pass_s(0.0)
    kill(router, placed(runs[0]))
    assert all(run.error is None and run.suspicion is not None for run in runs)
    assert innocent.suspicion is None, "two are suspected more"
    assert sum(run.stage is Stage.DISPATCHED for run in runs) == 1, "from now on one at a time"


def test_a_choice_that_ended_needs_no_further_proof() -> None:
    router = Router("a", "b")
    run = router.ask(num_choices=2, sampling=LONG)
    router.tokens(run, 1, choice=0)
    kill(router, placed(run))
    router.tokens(run, 1, choice=0)
    router.end(run, choice=0)
    assert run.suspicion is not None
    router.tokens(run, PROOF_TOKENS, choice=1)
    assert run.suspicion is None


def test_what_a_draining_worker_gives_back_costs_none_of_the_retries() -> None:
    router = Router("a", "b")
    runs = [router.ask(f"r{number}", sampling=LONG) for number in range(40)]
    drained = [run for run in runs if placed(run).worker_id == "a"]
    assert len(drained) > 10, "more than the reserve of retries"
    router.roster.leaving(placed(drained[0]))
    for run in drained:
        router.end(run, code="unavailable")
    router.pass_s(0.0)
    assert {placed(run).worker_id for run in runs} == {"b"}


# ------------------------------------------------------------------ whose blocks it takes along


def holding(router: Router, name: str, blocks: list[BlockIdentity]) -> None:
    """A worker reports that it holds these blocks."""
    router.roster.watching(WorkerKey(name, 1))
    event = worker_pb2.WatchEvent(incarnation=1, sequence=1)
    event.snapshot.identities, event.snapshot.last = b"".join(blocks), True
    assert router.roster.take_event(WorkerKey(name, 1), event, router.now_s)


def given_back(router: Router) -> RequestState:
    """A stream on worker a, which drains and gives it back."""
    run = router.ask(sampling=LONG)
    while placed(run).worker_id != "a":
        run = router.ask(f"r{router.life.is_idle}{len(router.orders)}", sampling=LONG)
    router.tokens(run)
    holding(router, "a", [BlockIdentity(bytes([n] * 16)) for n in range(3)])
    router.roster.leaving(placed(run))
    router.end(run, code="unavailable")
    router.pass_s(0.0)
    return run


def test_a_stream_that_a_draining_worker_gives_back_names_it_as_the_source_of_its_blocks() -> None:
    router = Router("a", "b")
    router.identities = lambda *_: [BlockIdentity(bytes([n] * 16)) for n in range(3)]  # type: ignore[method-assign]
    run = given_back(router)
    assert placed(run).worker_id == "b"
    (source,) = router.orders[-1].block_sources
    assert (source.worker_id, source.incarnation, source.address, source.num_blocks) == ("a", 1, "a:1", 3)
    assert run.dispatches[-1].choice.winner.prefill_held_tokens == 48
    worker = router.roster.fleet.get("b")
    assert worker is not None
    assert worker.in_flight[(run.name, 0)].prefill_tokens == 3, "the rest is computed"
    router.ask("fresh")
    assert [bool(order.block_sources) for order in router.orders[-2:]] == [True, False], "a new request has none"


def test_a_worker_that_cannot_answer_is_no_source() -> None:
    for fault in ("gone", "silent", "holds none"):
        router = Router("a", "b", "c")
        router.identities = lambda *_: [BlockIdentity(bytes([n] * 16)) for n in range(3)]  # type: ignore[method-assign]
        run = router.ask(sampling=LONG)
        router.tokens(run)
        key = placed(run)
        if fault != "holds none":
            holding(router, key.worker_id, [BlockIdentity(bytes([n] * 16)) for n in range(3)])
        router.roster.leaving(key)
        if fault == "gone":
            router.roster.session_down(key, "closed", router.now_s)
        else:
            worker = router.roster.fleet.get(key.worker_id)
            assert worker is not None
            worker.silent = fault == "silent"
            router.end(run, code="unavailable")
        router.pass_s(0.0)
        assert placed(run) != key
        assert list(router.orders[-1].block_sources) == [], fault


def test_each_stream_has_a_buddy_where_copies_are_wanted() -> None:
    for has_buddies in (False, True):
        router = Router(has_buddies=has_buddies)
        for name in ("a", "b"):
            facts = WorkerFacts(name, 1, Role.COMBINED, f"{name}:1", MODEL, 1000, 16, 16, 2048, capabilities=(KEEPS,))
            router.roster.announced(facts, router.now_s)
            router.roster.session_up(facts.key, facts, router.now_s)
            router.up.add(facts.key)
        run = router.ask(sampling=LONG)
        (order,) = router.orders
        assert order.HasField("buddy") == has_buddies
        if has_buddies:
            assert {placed(run).worker_id, order.buddy.worker_id} == {"a", "b"}
            assert order.buddy.address == f"{order.buddy.worker_id}:1"
