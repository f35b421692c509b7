"""The session between a router and a worker: one message per wake-up, one end per order, epochs, stops, drain."""

import asyncio
import itertools
from itertools import count

import grpc
import pytest

from twostroke.core.errors import ConfigError
from twostroke.core.request import Role
from twostroke.decode_worker import service
from twostroke.decode_worker.router_session import SessionTiming
from twostroke.engine.config import StepConfig
from twostroke.protos import common_pb2, worker_pb2
from twostroke.router.requests.attempts import CONFIRMS
from twostroke.text.stream import TextStream

LENGTH, STOP, ERROR, CANCELLED = (
    common_pb2.FINISH_REASON_LENGTH,
    common_pb2.FINISH_REASON_STOP,
    common_pb2.FINISH_REASON_ERROR,
    common_pb2.FINISH_REASON_CANCELLED,
)
FREE = {"ignore_eos": True}


@pytest.fixture
async def alone(start_worker):
    return await start_worker(Role.COMBINED)


@pytest.fixture
async def hand(alone, router_of):
    return await router_of(alone)


async def test_a_router_is_welcomed_with_who_the_worker_is(alone, hand):
    assert hand.welcome == alone.info()
    assert hand.welcome.model.name == "tiny"
    assert hand.welcome.model.max_model_len == 2048
    assert hand.welcome.address == alone.address
    described = await hand.stub.Describe(worker_pb2.DescribeRequest())
    assert described == alone.info()


async def test_all_requests_of_a_step_share_a_message(hand, make_prompt):
    answers = [await hand.submit(f"r{i}", make_prompt(20, i), sampling={"max_tokens": 400, **FREE}) for i in range(6)]
    for answer in answers:
        await answer.ended()
    shared = [m for m in hand.messages if len({t.request_id for t in m.step.tokens}) >= 5]
    assert len(shared) > 10  # of at least 400 steps, however late the last request came
    steps = [m.step.step for m in shared]
    assert steps == sorted(steps)
    assert len(set(steps)) > 10
    assert [m.sequence for m in hand.messages] == list(range(2, 2 + len(hand.messages)))


async def test_an_idle_session_beats_with_the_engines_steps(hand):
    async with asyncio.timeout(60):
        while len(beats := [m.beat for m in hand.messages if m.HasField("beat")]) < 2:
            await asyncio.sleep(0.02)
    assert beats[-1].phase == "idle"


async def test_a_stop_string_cuts_the_text_and_frees_the_blocks(alone, hand, make_prompt, all_free):
    whole = await (await hand.submit("whole", make_prompt(30), sampling={"max_tokens": 24, **FREE})).ended()
    stop = whole.text[9:11]
    answer = await (
        await hand.submit("cut", make_prompt(30), sampling={"max_tokens": 24, "stop": [stop], **FREE})
    ).ended()
    assert answer.text == whole.text[: whole.text.index(stop)]
    assert answer.end.reason == STOP
    assert len(answer.token_ids) == answer.end.usage.completion_tokens < 24
    await all_free(alone)


async def test_a_stop_token_counts_but_has_no_text(hand, make_prompt):
    whole = await (await hand.submit("whole", make_prompt(30), sampling={"max_tokens": 8, **FREE})).ended()
    place = next(i for i, t in enumerate(whole.token_ids) if t < 200 and whole.token_ids.index(t) == i and i > 1)
    sampling = {"max_tokens": 8, "stop_token_ids": [whole.token_ids[place]], **FREE}
    answer = await (await hand.submit("cut", make_prompt(30), sampling=sampling)).ended()
    assert answer.token_ids == whole.token_ids[: place + 1]
    assert len(answer.text) < len(whole.text)
    assert whole.text.startswith(answer.text)
    assert answer.end.reason == STOP


@pytest.mark.parametrize("with_peer", [False, True])
async def test_a_resumed_request_goes_on_where_it_was(start_worker, router_of, make_prompt, all_free, with_peer):
    prefill, decode = await start_worker(Role.PREFILL), await start_worker(Role.DECODE)
    hand = await router_of(decode)
    peers = [prefill] if with_peer else []
    sampling = {"max_tokens": 16, "temperature": 1.0, "seed": 5, **FREE}
    whole = await (await hand.submit("whole", make_prompt(40), peers, sampling=sampling)).ended()
    emitted = whole.token_ids[:7]
    resumed = hand.answers.setdefault(("again", 0), type(whole)())
    resumed.token_ids += emitted
    await hand.submit("again", make_prompt(40) + emitted, peers, sampling=sampling, emitted_tokens=7, domain="another")
    await resumed.ended()
    assert resumed.token_ids == whole.token_ids
    assert whole.text.endswith(resumed.text)
    assert resumed.end.usage.prompt_tokens == 40
    assert resumed.end.usage.completion_tokens == 16
    await all_free(prefill, decode)


async def test_a_peers_first_token_can_be_the_last(start_worker, router_of, make_prompt, all_free):
    prefill, decode = await start_worker(Role.PREFILL), await start_worker(Role.DECODE)
    hand = await router_of(decode)
    answer = await (await hand.submit("r", make_prompt(200), [prefill], sampling={"max_tokens": 1, **FREE})).ended()
    assert len(answer.token_ids) == 1
    assert answer.end.reason == LENGTH
    await all_free(prefill, decode)


async def test_what_is_cached_is_neither_moved_nor_computed_again(start_worker, router_of, make_prompt, all_free):
    prefill, decode = await start_worker(Role.PREFILL), await start_worker(Role.DECODE)
    hand = await router_of(decode)
    first = await (await hand.submit("a", make_prompt(100), [prefill])).ended()
    again = await (await hand.submit("b", make_prompt(100), [prefill])).ended()
    more = await (await hand.submit("c", make_prompt(100) + make_prompt(60, 9), [prefill])).ended()
    elsewhere = await (await hand.submit("d", make_prompt(100), [prefill], domain="somebody else")).ended()
    assert again.token_ids == first.token_ids
    assert again.end.handover.tokens_held == 96
    assert again.end.handover.local_reason == "under_a_block_missing"  # 4 tokens are missing: less than a block
    assert more.end.handover.tokens_held == 96
    assert more.end.handover.tokens_moved == 160 - 96
    assert more.end.usage.cached_tokens == 96
    assert elsewhere.end.handover.tokens_held == 0
    assert elsewhere.end.usage.cached_tokens == 0
    await all_free(prefill, decode)


async def test_what_the_peer_had_cached_counts_as_cached(start_worker, router_of, make_prompt):
    prefill = await start_worker(Role.PREFILL)
    for cached in (0, 96):
        decode = await start_worker(Role.DECODE)
        answer = await (await (await router_of(decode)).submit("r", make_prompt(100), [prefill])).ended()
        assert answer.end.usage.cached_tokens == cached
        assert answer.end.handover.prefill_cached_tokens == cached
        assert answer.end.handover.tokens_moved == 100


async def test_the_end_tells_the_whole_life(start_worker, router_of, make_prompt):
    prefill, decode = await start_worker(Role.PREFILL), await start_worker(Role.DECODE)
    hand = await router_of(decode)
    answer = await (await hand.submit("r", make_prompt(100), [prefill])).ended()
    at_ns = {instant.name: instant.since_seen_ns for instant in answer.end.timeline}
    order = ["received", "promised", "offered", "started", "bound", "prefill_began", "prefilled", "first_token"]
    assert set(order) | {"first_frame", "last_frame", "second_token", "finished"} <= set(at_ns)
    assert at_ns["received"] == 0
    assert at_ns["promised"] <= at_ns["bound"] <= at_ns["first_frame"] <= at_ns["last_frame"] <= at_ns["finished"]
    assert at_ns["first_token"] <= at_ns["second_token"] <= at_ns["finished"]
    handover = answer.end.handover
    spec = decode.info().model.kv_spec.groups[0]
    per_token = sum(2 * spec.num_layers * c.heads * c.width for c in spec.components)
    assert handover.bytes_as_bf16 == 100 * per_token
    assert handover.bytes_moved > 100 * per_token / 2  # fp8 payload, scales and headers
    assert handover.transport == "shm"


# ---------------------------------------------------------------- orders


async def test_a_doubled_order_runs_once(alone, hand, make_prompt):
    answer = await hand.submit("r", make_prompt(20))
    await hand.submit("r", make_prompt(20))
    await answer.ended()
    await hand.submit("r", make_prompt(20))  # also after its end
    await (await hand.submit("other", make_prompt(20))).ended()
    assert len(answer.ends) == 1
    assert len(answer.token_ids) == 8
    assert alone.counters["orders_duplicate"] == 2


async def test_a_doubled_order_is_refused_once(alone, hand, make_prompt):
    refused = await (await hand.submit("r", [])).ended()
    await hand.submit("r", [])
    await (await hand.submit("other", make_prompt(20))).ended()
    assert len(refused.ends) == 1
    assert (alone.counters["orders_refused"], alone.counters["orders_duplicate"]) == (1, 1)


async def test_a_newer_dispatch_ends_the_older_and_an_older_is_dropped(alone, hand, make_prompt, all_free):
    answer = await hand.submit("r", make_prompt(20), sampling={"max_tokens": 1500, **FREE})
    await answer.until(lambda a: len(a.token_ids) > 2)
    hand.answers[("r", 0)] = newer = type(answer)()
    newer.token_ids = []

    def by_epoch(message):
        return answer if message.epoch.counter == 1 else newer

    hand._answer = by_epoch
    await hand.submit("r", make_prompt(20), counter=2)
    await newer.ended()
    await answer.ended()
    assert answer.end.reason == CANCELLED
    assert newer.end.reason == LENGTH
    await hand.submit("r", make_prompt(20), counter=1)
    await hand.cancel("r", counter=1)
    async with asyncio.timeout(60):
        while not alone.counters["orders_stale"]:
            await asyncio.sleep(0.01)
    assert alone.counters["orders_stale"] == 1
    await all_free(alone)


async def test_a_late_cancel_of_an_older_dispatch_ends_nothing(alone, hand, make_prompt, all_free):
    answer = await hand.submit("r", make_prompt(20), counter=2, sampling={"max_tokens": 1500, **FREE})
    await answer.until(lambda a: len(a.token_ids) > 1)
    await hand.cancel("r", counter=1)
    await answer.ended()
    assert (answer.end.reason, len(answer.token_ids)) == (LENGTH, 1500)
    assert alone.counters["cancels_stale"] == 1
    await all_free(alone)


@pytest.mark.parametrize("another", [(7, "other"), (8, "hand"), (6, "hand")], ids=str)
async def test_another_routers_request_of_the_same_name_touches_nothing(
    alone, router_of, make_prompt, all_free, another
):
    hand, other = await router_of(alone), await router_of(alone, *another)
    mine = await hand.submit("r", make_prompt(20), sampling={"max_tokens": 60, **FREE})
    await mine.until(lambda a: len(a.token_ids) > 1)
    theirs = await other.submit("r", make_prompt(30, 5), sampling={"max_tokens": 60, **FREE})
    await theirs.until(lambda a: len(a.token_ids) > 1)
    await other.cancel("r", counter=9)
    await theirs.ended()
    await mine.ended()
    assert theirs.end.reason == CANCELLED
    assert mine.end.reason == LENGTH
    assert len(mine.token_ids) == 60
    await all_free(alone)


async def test_a_router_that_comes_back_may_cancel_and_replace_what_it_left(
    start_worker, router_of, make_prompt, all_free
):
    worker = await start_worker(Role.COMBINED, orphan_grace_s=30.0)
    first = await router_of(worker)
    for name in ("a", "b"):
        answer = await first.submit(name, make_prompt(20), sampling={"max_tokens": 1500, **FREE})
        await answer.until(lambda a: len(a.token_ids) > 1)
    await first.lose()
    second = await router_of(worker)
    await second.cancel("a")
    again = await second.submit("b", make_prompt(20), counter=2)
    assert (await again.ended()).end.reason == LENGTH
    await all_free(worker)
    assert worker.counters["orphans_cancelled"] == 0


async def test_an_order_that_breaks_our_own_code_ends_alone(alone, hand, make_prompt, all_free, monkeypatch):
    running = await hand.submit("good", make_prompt(20), sampling={"max_tokens": 60, **FREE})
    await running.until(lambda a: len(a.token_ids) > 1)
    make = service.order_from_wire

    def order_from_wire(message, *rest):
        if message.request_id == "bad":
            raise ZeroDivisionError("a bug of ours")
        return make(message, *rest)

    monkeypatch.setattr(service, "order_from_wire", order_from_wire)
    broken = await (await hand.submit("bad", make_prompt(20))).ended()
    assert broken.end.error.code == "internal_error"
    assert "log" in broken.end.error.message
    assert "ZeroDivision" not in broken.end.error.message
    assert (await running.ended()).end.reason == LENGTH
    assert (await (await hand.submit("next", make_prompt(20))).ended()).end.reason == LENGTH
    await all_free(alone)


async def test_choices_of_a_request_are_cancelled_together(alone, hand, make_prompt, all_free):
    answers = [
        await hand.submit("r", make_prompt(20), choice=choice, sampling={"max_tokens": 1500, **FREE})
        for choice in range(3)
    ]
    for answer in answers:
        await answer.until(lambda a: len(a.token_ids) > 1)
    await hand.cancel("r")
    await all_free(alone)
    for answer in answers:
        assert (await answer.ended()).end.reason == CANCELLED


@pytest.mark.parametrize(
    ("prompt_ids", "options", "code"),
    [
        ([], {}, "invalid_value"),
        ([1, 2, 260], {}, "invalid_value"),
        ([1] * 2048, {}, "context_length_exceeded"),
        ([1] * 2000, {"sampling": {"max_tokens": 100}}, "context_length_exceeded"),
        ([1, 2], {"sampling": {"temperature": float("nan")}}, "invalid_value"),
        ([1, 2], {"sampling": {"top_p": 0.0}}, "invalid_value"),
        ([1, 2], {"sampling": {"stop": [""]}}, "invalid_value"),
        ([1, 2], {"emitted_tokens": 2}, "invalid_value"),
    ],
)
async def test_an_impossible_order_ends_typed_and_hurts_nobody(hand, make_prompt, prompt_ids, options, code):
    other = await hand.submit("other", make_prompt(20), sampling={"max_tokens": 20, **FREE})
    answer = await (await hand.submit("r", prompt_ids, **options)).ended()
    assert answer.end.reason == ERROR
    assert answer.end.error.code == code
    assert answer.end.error.message
    assert len((await other.ended()).token_ids) == 20


async def test_a_full_queue_says_when_to_come_back(start_worker, router_of, make_prompt):
    step = StepConfig(max_num_seqs=1, max_num_batched_tokens=64, max_waiting=2)
    worker = await start_worker(Role.COMBINED, step=step)
    hand = await router_of(worker)
    answers = [await hand.submit(f"r{i}", make_prompt(20), sampling={"max_tokens": 60, **FREE}) for i in range(8)]
    for answer in answers:
        await answer.ended()
    refused = [a for a in answers if a.end.reason == ERROR]
    assert refused
    assert {a.end.error.code for a in refused} == {"overloaded"}
    assert all(a.end.error.retry_after_ms > 0 for a in refused)
    assert all(len(a.token_ids) == 60 for a in answers if a.end.reason == LENGTH)


async def test_attach_is_answered_though_nothing_can_be_attached_to_yet(hand):
    epoch = worker_pb2.Epoch(incarnation=8, counter=1)
    await hand.say(worker_pb2.SessionUp(attach=worker_pb2.Attach(request_id="gone", epoch=epoch, cursor=[3, 4])))
    for choice in range(2):
        answer = hand.answers.setdefault(("gone", choice), type(await hand.submit("warm", [1, 2]))())
        await answer.ended()
        assert answer.end.error.code == "request_not_found"


async def test_a_router_that_stops_beating_is_lost(alone, router_of, make_prompt, all_free):
    alone.faces.decode._timing = SessionTiming(silence_s=0.5)
    hand = await router_of(alone)
    await hand.say(worker_pb2.SessionUp(beat=worker_pb2.Beat(phase="idle")))
    answer = await hand.submit("r", make_prompt(20), sampling={"max_tokens": 1500, **FREE})
    await answer.until(lambda a: len(a.token_ids) > 1)
    await all_free(alone)
    assert alone.counters["sessions_lost"] == 1


# ---------------------------------------------------------------- drain


async def test_drain_lets_the_running_end_and_refuses_the_rest(start_worker, router_of, make_prompt, all_free):
    prefill, decode = await start_worker(Role.PREFILL), await start_worker(Role.DECODE)
    hand = await router_of(decode)
    running = await hand.submit("r", make_prompt(100), [prefill], sampling={"max_tokens": 60, **FREE})
    await running.until(lambda a: len(a.token_ids) > 1)
    draining = asyncio.ensure_future(hand.stub.Drain(worker_pb2.DrainRequest(timeout_ms=200_000)))
    async with asyncio.timeout(60):
        for number in itertools.count():  # until the order to drain has arrived
            refused = await (await hand.submit(f"late{number}", make_prompt(20), sampling={"max_tokens": 1})).ended()
            if refused.end.error.code:
                break
    assert refused.end.error.code == "unavailable"
    assert refused.end.error.retry_after_ms > 0
    response = await draining
    assert response.empty
    await running.ended()
    assert len(running.token_ids) == 60
    await all_free(prefill, decode)


async def test_an_undone_drain_cancels_nothing_and_new_orders_are_taken(alone, hand, make_prompt, all_free):
    running = await hand.submit("r", make_prompt(20), sampling={"max_tokens": 1800, **FREE})
    await running.until(lambda a: len(a.token_ids) > 1)
    draining = asyncio.ensure_future(hand.stub.Drain(worker_pb2.DrainRequest(timeout_ms=600_000)))
    async with asyncio.timeout(60):
        while not alone.is_draining:
            await asyncio.sleep(0.01)
    assert (await hand.stub.Undrain(worker_pb2.UndrainRequest())).worker_id == alone.settings.worker_id
    with pytest.raises(grpc.aio.AioRpcError) as undone:
        await draining
    assert undone.value.code() is grpc.StatusCode.ABORTED
    another = await (await hand.submit("new", make_prompt(20), sampling={"max_tokens": 3, **FREE})).ended()
    assert len(another.token_ids) == 3
    await hand.cancel("r")
    await running.ended()
    await alone.stop(0.0)
    with pytest.raises(ConfigError, match="ends already"):
        alone.undrain()


async def test_drain_cancels_what_does_not_end_in_time(alone, hand, make_prompt, all_free):
    running = await hand.submit("r", make_prompt(20), sampling={"max_tokens": 1800, **FREE})
    await running.until(lambda a: len(a.token_ids) > 1)
    response = await hand.stub.Drain(worker_pb2.DrainRequest(timeout_ms=100))
    assert (response.empty, response.cancelled) == (False, 1)
    assert (await running.ended()).end.reason == CANCELLED
    await all_free(alone)


async def test_a_draining_prefill_worker_refuses_and_decode_goes_on_alone(
    start_worker, router_of, make_prompt, all_free
):
    prefill, decode = await start_worker(Role.PREFILL), await start_worker(Role.DECODE)
    await prefill.drain(0.1)
    hand = await router_of(decode)
    answer = await (await hand.submit("r", make_prompt(100), [prefill])).ended()
    assert answer.end.reason == LENGTH
    assert answer.end.handover.local_reason == "peer_refused"
    await all_free(prefill, decode)


@pytest.mark.parametrize(
    "sampling",
    [{"logit_bias": {1 << 30: 1.0}}, {"stop_token_ids": [1 << 30], "min_tokens": 2}],
    ids=["bias", "stop"],
)
async def test_an_order_that_names_tokens_of_another_vocabulary_breaks_no_step(
    start_worker, router_of, make_prompt, sampling
):
    worker = await start_worker(Role.DECODE)
    hand = await router_of(worker)
    good = await hand.submit("good", make_prompt(20))
    refused = await (await hand.submit("bad", make_prompt(20), sampling=sampling)).ended()
    assert refused.end.error.code == "invalid_value"
    assert (await good.ended()).end.error.code == ""


@pytest.mark.parametrize("fails", ["__init__", "push", "flush"])
@pytest.mark.parametrize("with_peer", [False, True])
async def test_text_that_cannot_be_made_ends_its_own_choice_and_no_other(
    start_worker, router_of, make_prompt, all_free, monkeypatch, *, fails, with_peer
):
    worker = await start_worker(Role.DECODE)
    peers = [await start_worker(Role.PREFILL)] if with_peer else []
    hand = await router_of(worker)
    texts = count()
    plain = getattr(TextStream, fails)

    def broken(stream, *given):
        if getattr(stream, "is_doomed", False) and given != ((),):  # () at its birth: nothing was emitted yet
            raise ValueError("no text for these")
        return plain(stream, *given)

    def born(stream, *given, **named):
        begun(stream, *given, **named)
        stream.is_doomed = next(texts) == 1
        if stream.is_doomed and fails == "__init__":
            raise ValueError("no text at all")

    begun = TextStream.__init__
    monkeypatch.setattr(TextStream, "__init__", born)
    if fails != "__init__":
        monkeypatch.setattr(TextStream, fails, broken)
    answers = [
        await hand.submit(f"r{i}", make_prompt(40, i), peers, sampling={"max_tokens": 12, **FREE}) for i in range(3)
    ]
    ends = [(await answer.ended()).end for answer in answers]
    assert [end.reason for end in ends] == [LENGTH, ERROR, LENGTH]
    assert ends[1].error.code == "internal_error"
    assert "log" in ends[1].error.message
    assert [len(answer.token_ids) for answer in answers if answer is not answers[1]] == [12, 12]
    await all_free(worker, *peers)


async def test_an_order_of_a_suspect_is_confirmed_before_its_first_token(hand, make_prompt):
    for name, confirm in (("plain", 0), ("suspect", 4)):
        answer = await hand.submit(name, make_prompt(20), sampling={"max_tokens": 6, **FREE}, confirm=confirm)
        await answer.ended()
    ((place, taken),) = [(place, one) for place, m in enumerate(hand.messages) for one in m.step.taken]
    assert (taken.request_id, taken.epoch.counter, taken.HasField("peer")) == ("suspect", 1, False)
    assert not any(part.request_id == "suspect" for m in hand.messages[:place] for part in m.step.tokens)
    assert CONFIRMS in hand.welcome.capabilities


async def test_a_suspect_is_refused_while_one_of_another_router_is_computed(alone, hand, router_of, make_prompt):
    other = await router_of(alone, router_id="other")
    theirs = await other.submit("theirs", make_prompt(20), sampling={"max_tokens": 1500, **FREE}, confirm=2000)
    await theirs.until(lambda answer: bool(answer.token_ids))
    answer = await hand.submit("suspect", make_prompt(20), confirm=4)
    refused = (await answer.ended()).end
    assert (refused.reason, refused.error.code) == (ERROR, "overloaded")
    assert not any(m.step.taken for m in hand.messages)
    plain = await hand.submit("plain", make_prompt(20))
    assert (await plain.ended()).end.reason != ERROR
    await other.cancel("theirs")
    await theirs.ended()
    answer.ends.clear()
    await hand.submit("suspect", make_prompt(20), counter=2, confirm=4)
    assert (await answer.ended()).end.reason != ERROR
