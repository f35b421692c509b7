"""The flow against workers that speak the real protocol over real sockets, and misbehave on demand."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest
from support.clusters.flow_cluster import (
    KEY,
    PROMPT,
    cluster,
    collect,
    collect_into,
    dropped,
    expected,
    request,
    tokens_of,
    until,
)
from support.fakes.fake_worker import FINGERPRINT, MODEL, Behaviour, FakeWorker

from twostroke.core import errors
from twostroke.core.request import CacheScope, FinishReason, Request, Role, SamplingParams
from twostroke.core.timeline import Timeline
from twostroke.kv.keys import PromptHasher
from twostroke.protos import common_pb2
from twostroke.router.api.openai_responses import usage_body
from twostroke.router.requests.pieces import OutputDelta, TokenUsage


async def test_streams_a_request_and_explains_it() -> None:
    async with cluster() as c:
        prefill, decode = FakeWorker("prefill-0", Role.PREFILL), FakeWorker("decode-0", Role.DECODE)
        decode.behaviour.bytes_moved = 1000
        await c.add(prefill, decode)
        pieces = await collect(c.flow, request())
        assert tokens_of(pieces) == expected(5)
        assert pieces[-1].finish_reason is FinishReason.LENGTH
        assert pieces[-1].text == "."
        assert pieces[-1].usage is not None
        assert pieces[-1].usage.prompt_tokens == 100
        assert pieces[-1].usage.completion_tokens == 5
        assert [p.usage for p in pieces[:-1]] == [None] * (len(pieces) - 1)
        assert decode.submits[0].prefill_peers[0].address == prefill.address
        explained = c.flow.explain("tenant", "r1")
        assert explained is not None
        json.dumps(explained)
        assert explained["state"] == "finished"
        assert (explained["prefill_worker"], explained["decode_worker"]) == ("prefill-0", "decode-0")
        assert (explained["kv_bytes_moved"], explained["kv_bytes_as_bf16"]) == (1000, 2000)
        assert explained["tokens"] == {"prompt": 100, "cached": 0, "completion": 5}
        assert explained["ttft_ms"] > 0
        assert explained["itl_ms"]["max"] >= explained["itl_ms"]["p50"] > 0
        order = list(explained["timeline"])
        assert order[:3] == ["arrived", "admitted", "routed"]
        assert order[-1] == "finished"
        assert order.index("received") < order.index("first_token") < order.index("first_sent")
        assert explained["choice"]["winner"]["prefill_worker"] == "prefill-0"
        assert len(explained["choice"]["candidates"]) == 2  # the pair, and decode by itself
        terms = (
            "prefill_queue_ms",
            "prefill_ms",
            "transfer_ms",
            "decode_queue_ms",
            "load_penalty_ms",
            "throttle_ms",
        )  # as README says
        for candidate in explained["choice"]["candidates"]:
            assert candidate["total_ms"] == pytest.approx(sum(candidate[term] for term in terms), abs=0.01)
        json.dumps(c.flow.cluster())
        assert [model.name for model in c.flow.models()] == [MODEL]
        assert c.flow.explain("tenant", "unknown") is None


async def test_choices_are_merged_gapless_and_usage_comes_once() -> None:
    async with cluster() as c:
        worker = await c.add(FakeWorker("w"))
        pieces = await collect(c.flow, request(num_choices=3))
        for choice in range(3):
            assert tokens_of(pieces, choice) == expected(5, choice)
        assert [order.choice for order in worker.submits] == [0, 1, 2]
        assert sum(p.usage is not None for p in pieces) == 1
        usage = pieces[-1].usage
        assert usage is not None
        assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (100, 15, 0)
        assert sum(p.finish_reason is not None for p in pieces) == 3


async def test_guesses_of_all_choices_are_told_in_usage_and_explained() -> None:
    async with cluster() as c:
        worker = FakeWorker("w")
        worker.behaviour = Behaviour(guesses=4)
        await c.add(worker)
        usage = (await collect(c.flow, request(num_choices=3)))[-1].usage
        assert usage is not None
        assert (usage.draft_tokens, usage.accepted_tokens) == (36, 12)
        explained = c.flow.explain("tenant", "r1")
        assert explained is not None
        assert explained["speculation"] == {"proposers": ["ngram"], "draft_tokens": 36, "accepted_tokens": 12}
        details = {"accepted_prediction_tokens": 12, "rejected_prediction_tokens": 24}
        assert usage_body(usage)["completion_tokens_details"] == details
        assert usage_body(usage, 5)["completion_tokens_details"] == {"reasoning_tokens": 5} | details
        assert "completion_tokens_details" not in usage_body(TokenUsage(100, 15, 0))


async def test_stale_repeated_and_doubled_messages_are_dropped_and_counted() -> None:
    async with cluster() as c:
        worker = FakeWorker("w")
        worker.behaviour = Behaviour(stale_tokens=True, repeat_tokens=True, end_twice=True)
        await c.add(worker)
        pieces = await collect(c.flow, request())
        assert tokens_of(pieces) == expected(5)
        await until(lambda: dropped(c.flow, "unknown_request") == 1)  # the second end
        assert dropped(c.flow, "stale_epoch") == 5
        assert dropped(c.flow, "repeated") == 5


async def test_skipped_tokens_end_the_request_and_never_reach_the_client() -> None:
    async with cluster() as c:
        worker = FakeWorker("w")
        worker.behaviour.skip_index = 2
        await c.add(worker)
        got: list[OutputDelta] = []
        with pytest.raises(errors.TokensLost):
            await collect_into(got, c.flow.generate(request(), Timeline()))
        assert tokens_of(got) == expected(2)
        await until(lambda: worker.cancels)


async def test_closing_the_stream_cancels_on_the_worker_within_a_moment() -> None:
    async with cluster() as c:
        worker = await c.add(FakeWorker("w"))
        stream = c.flow.generate(request(max_tokens=1000), Timeline())
        await anext(stream)
        await stream.aclose()
        await until(lambda: worker.cancels and not worker.running, 60.0)
        assert c.flow.cluster()["router"]["in_flight_requests"] == 0
        explained = c.flow.explain("tenant", "r1")
        assert explained is not None
        assert (explained["state"], explained["error"]["code"]) == ("cancelled", "cancelled")
        counters = c.flow.cluster()["counters"]
        assert (counters["offered"], counters["accepted"], counters["cancelled"]) == (1, 0, 1)


async def test_cancelling_the_task_before_the_first_token_cancels_on_the_worker() -> None:
    async with cluster() as c:
        worker = FakeWorker("w")
        worker.behaviour.hold_first = asyncio.Event()
        await c.add(worker)
        task = asyncio.create_task(collect(c.flow, request()))
        await until(lambda: worker.submits)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: worker.cancels, 60.0)


async def test_abort_ends_the_stream_typed() -> None:
    async with cluster() as c:
        worker = await c.add(FakeWorker("w"))
        worker.behaviour.stop_after = 2
        task = asyncio.create_task(collect(c.flow, request()))
        await until(lambda: worker.submits)
        assert await c.flow.abort("tenant", "r1")
        assert not await c.flow.abort("tenant", "r1")
        with pytest.raises(errors.Cancelled):
            await task
        await until(lambda: worker.cancels)


async def test_the_deadline_cancels_and_names_itself() -> None:
    async with cluster() as c:
        worker = await c.add(FakeWorker("w"))
        worker.behaviour.stop_after = 1
        with pytest.raises(errors.DeadlineExceeded):
            await collect(c.flow, request(timeout_s=0.3))
        await until(lambda: worker.cancels)
        assert worker.submits[0].timeout_ms <= 300


async def test_a_slow_client_is_dropped_and_others_are_not() -> None:
    async with cluster(client_buffer_pieces=16, slow_client_s=60.0) as c:
        worker = await c.add(FakeWorker("w"))
        slow = c.flow.generate(request("slow", max_tokens=2000), Timeline())
        got = [await anext(slow)]
        other = await collect(c.flow, request("other", max_tokens=50))
        assert tokens_of(other) == expected(50)
        life = c.flow._life
        (run,) = life.runs.active.values()
        await until(lambda: run.delivery.completion_tokens > 100, 60.0)
        assert not worker.cancels
        life._limits = replace(life._limits, slow_client_s=0.1)  # now, however long those tokens took
        await until(lambda: worker.cancels, 60.0)
        with pytest.raises(errors.Cancelled, match="buffer full"):
            await collect_into(got, slow)
        assert len(got) <= 18  # bounded items
        tokens = tokens_of(got)
        assert len(tokens) > 100
        assert tokens == expected(len(tokens))


async def test_overload_is_refused_with_advice_and_every_request_is_accounted_for() -> None:
    async with cluster(max_running=2) as c:
        worker = FakeWorker("w")
        worker.behaviour.hold_first = asyncio.Event()
        await c.add(worker)
        tasks = [asyncio.create_task(collect(c.flow, request(f"r{n}"))) for n in range(2)]
        await until(lambda: len(worker.submits) == 2)
        with pytest.raises(errors.Overloaded) as caught:
            await collect(c.flow, request("r9"))
        assert caught.value.retry_after_s
        worker.behaviour.hold_first.set()
        await asyncio.gather(*tasks)
        counters = c.flow.cluster()["counters"]
        assert (counters["offered"], counters["accepted"], counters["rejected"]) == (3, 2, 1)


async def test_what_cannot_be_served_is_refused_by_its_type() -> None:
    async with cluster() as c:
        with pytest.raises(errors.Unavailable):
            await collect(c.flow, request())
        worker = await c.add(FakeWorker("w", kv_blocks=10))
        with pytest.raises(errors.ContextLengthExceeded, match="160"):
            await collect(c.flow, request(max_tokens=61))
        with pytest.raises(errors.ModelNotFound):
            await collect(c.flow, Request("x", "other", PROMPT, SamplingParams(5), 1, "t", 5.0))
        with pytest.raises(errors.InvalidRequest):
            await collect(c.flow, request(prompt_ids=()))
        assert not worker.submits


async def test_a_request_id_in_use_is_refused_and_the_first_goes_on() -> None:
    async with cluster() as c:
        worker = FakeWorker("w")
        worker.behaviour.hold_first = asyncio.Event()
        await c.add(worker)
        task = asyncio.create_task(collect(c.flow, request()))
        await until(lambda: worker.submits)
        with pytest.raises(errors.InvalidRequest, match="in use"):
            await collect(c.flow, request())
        worker.behaviour.hold_first.set()
        assert tokens_of(await task) == expected(5)


async def test_goes_where_the_prefix_is_held_and_resyncs_after_a_gap() -> None:
    prompt = tuple(range(1600))
    hasher = PromptHasher(KEY, FINGERPRINT, b"n" * 16)
    blocks = [bytes(identity) for identity in hasher.name(prompt, CacheScope("tenant", b"")).identities]
    async with cluster() as c:
        holder = FakeWorker("holder", held=blocks)
        await c.add(FakeWorker("empty-1"), holder, FakeWorker("empty-2"))
        await until(lambda: c.flow.cluster()["router"]["prefix_blocks"] == 100)
        for number in range(4):
            await collect(c.flow, request(f"r{number}", prompt_ids=prompt))
        assert len(holder.submits) == 4
        explained = c.flow.explain("tenant", "r0")
        assert explained is not None
        assert explained["choice"]["winner"]["decode_held_tokens"] == 1584
        holder.push_delta([b"x" * 16], sequence=7)
        await until(lambda: holder.num_watches == 2)
        assert c.flow.cluster()["counters"]["prefix_gaps"] == 1
        await until(lambda: c.flow.cluster()["router"]["prefix_blocks"] == 100)


async def test_other_tenants_do_not_share_the_prefix() -> None:
    prompt = tuple(range(1600))
    hasher = PromptHasher(KEY, FINGERPRINT, b"n" * 16)
    blocks = [bytes(identity) for identity in hasher.name(prompt, CacheScope("tenant", b"")).identities]
    async with cluster() as c:
        await c.add(FakeWorker("holder", held=blocks))
        await collect(c.flow, request(prompt_ids=prompt, isolation_domain="somebody else"))
        explained = c.flow.explain("somebody else", "r1")
        assert explained is not None
        assert explained["choice"]["winner"]["decode_held_tokens"] == 0


async def test_a_burst_of_identical_prompts_goes_where_the_first_went() -> None:
    prompt = tuple(range(1600))
    async with cluster() as c:
        workers = [FakeWorker("p0", Role.PREFILL), FakeWorker("p1", Role.PREFILL)]
        workers += [FakeWorker("d0", Role.DECODE), FakeWorker("d1", Role.DECODE)]
        await c.add(*workers)
        for worker in workers:
            worker.behaviour.hold_first = asyncio.Event()
        tasks = [asyncio.create_task(collect(c.flow, request(f"r{n}", prompt_ids=prompt))) for n in range(6)]
        orders = lambda: [o for w in workers for o in w.submits]  # noqa: E731
        await until(lambda: len(orders()) == 6)
        assert len({o.prefill_peers[0].worker_id for o in orders()}) == 1
        for worker in workers:
            worker.behaviour.hold_first.set()  # type: ignore[union-attr]
        await asyncio.gather(*tasks)


async def test_a_request_waits_for_a_worker_that_is_on_its_way() -> None:
    async with cluster(worker_patience_s=3.0) as c:
        await c.add(FakeWorker("a"))
        await c.workers[0].die()
        await until(lambda: c.state("a") is None)
        prefill = await c.add(FakeWorker("p", Role.PREFILL))
        with pytest.raises(errors.Unavailable):  # nobody who decodes is in sight: no waiting
            await asyncio.wait_for(collect(c.flow, request()), 60)
        slow = FakeWorker("b")
        slow.behaviour.mute = True
        await slow.start(c.internal)
        c.workers.append(slow)
        slow.behaviour.mute = False
        await until(lambda: c.state("b") is not None)
        assert tokens_of(await collect(c.flow, request("r2"))) == expected(5)
        assert not prefill.submits


async def test_draining_refuses_new_requests_and_waits_for_the_running_ones() -> None:
    async with cluster() as c:
        worker = await c.add(FakeWorker("w"))
        worker.behaviour.token_s = 0.02
        task = asyncio.create_task(collect(c.flow, request(max_tokens=10)))
        await until(lambda: worker.submits)
        draining = asyncio.create_task(c.flow.drain(5.0))
        await asyncio.sleep(0)
        with pytest.raises(errors.Unavailable, match="draining"):
            await collect(c.flow, request("r2"))
        assert await draining
        assert tokens_of(await task) == expected(10)


async def test_closing_the_router_tells_clients_and_workers() -> None:
    async with cluster() as c:
        worker = await c.add(FakeWorker("w"))
        worker.behaviour.stop_after = 1
        stream = c.flow.generate(request(), Timeline())
        await anext(stream)
        await c.flow.close()
        with pytest.raises(errors.Unavailable):
            await anext(stream)
        await until(lambda: worker.cancels, 60.0)


async def test_the_retry_budget_bounds_second_dispatches() -> None:
    async with cluster() as c:
        workers = [FakeWorker(name) for name in "abc"]
        await c.add(*workers)
        for worker in workers:
            worker.behaviour.refuse = common_pb2.Error(code="unavailable", message="no", retry_after_ms=500)
        asked = 30
        for number in range(asked):
            with pytest.raises(errors.Unavailable):
                await asyncio.wait_for(collect(c.flow, request(f"r{number}")), 60)
        dispatches = sum(len(worker.submits) for worker in workers)
        assert asked + 10 <= dispatches <= asked + 10 + 3 + 1  # the reserve, and a tenth


async def test_the_decision_log_has_a_line_per_request(tmp_path: Path) -> None:
    path = tmp_path / "log" / "decisions.jsonl"
    async with cluster(decision_log=path) as c:
        await c.add(FakeWorker("w"))
        await collect(c.flow, request("r1"))
        await collect(c.flow, request("r2"))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["request_id"] for line in lines] == ["r1", "r2"]
    assert lines[0]["choice"]["reason"]


async def test_nothing_of_a_running_request_is_explained_to_another_tenant() -> None:
    async with cluster() as c:
        worker = FakeWorker("w")
        worker.behaviour.hold_first = asyncio.Event()
        await c.add(worker)
        task = asyncio.create_task(collect(c.flow, request("r1")))
        await until(lambda: worker.submits)
        assert c.flow.explain("tenant", "r1") is not None
        assert c.flow.explain("another tenant", "r1") is None
        worker.behaviour.hold_first.set()
        await task
        assert c.flow.explain("another tenant", "r1") is None
        assert c.flow.cluster()["counters"]["handovers"] == 0


async def test_metrics_exist_with_zero_and_then_count() -> None:
    async with cluster() as c:
        value = c.flow.metrics.registry.get_sample_value
        assert value("twostroke_requests_total", {"outcome": "finished"}) == 0
        await c.add(FakeWorker("w"))
        assert value("vllm:generation_tokens_total", {"model_name": MODEL}) == 0
        await collect(c.flow, request())
        assert value("twostroke_requests_total", {"outcome": "finished"}) == 1
        assert value("vllm:generation_tokens_total", {"model_name": MODEL}) == 5
        assert value("vllm:request_success_total", {"model_name": MODEL, "finished_reason": "length"}) == 1
        assert value("vllm:time_to_first_token_seconds_count", {"model_name": MODEL}) == 1
        assert value("vllm:inter_token_latency_seconds_count", {"model_name": MODEL}) == 4


async def test_a_drain_waits_for_clients_that_have_not_read_all_yet() -> None:
    async with cluster() as c:
        worker = await c.add(FakeWorker("w"))
        stream = c.flow.generate(request(max_tokens=10), Timeline())
        got = [await anext(stream)]
        await until(lambda: not c.flow._life.runs.active)
        assert worker.submits
        assert not await c.flow.drain(0.05)
        draining = asyncio.create_task(c.flow.drain(5.0))
        await asyncio.sleep(0.02)
        assert not draining.done()
        await collect_into(got, stream)
        assert tokens_of(got) == expected(10)
        assert await draining
