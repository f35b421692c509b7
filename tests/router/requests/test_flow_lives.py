"""The flow while workers die, hang, leave and come back as others."""

from __future__ import annotations

import asyncio

import grpc.aio
import pytest
from support.clusters.flow_cluster import PROMPT, cluster, collect, expected, request, tokens_of, until
from support.fakes.fake_worker import MODEL, PROOF_KEY, FakeWorker, reborn

from twostroke.core import errors
from twostroke.core.inside import InsideChannel
from twostroke.core.timeline import Timeline
from twostroke.protos import common_pb2, worker_pb2, worker_pb2_grpc


async def test_a_worker_that_dies_before_the_first_token_costs_nothing() -> None:
    async with cluster() as c:
        first, second = FakeWorker("a"), FakeWorker("b")
        for worker in (first, second):
            worker.behaviour.hold_first = asyncio.Event()
        await c.add(first, second)
        task = asyncio.create_task(collect(c.flow, request(num_choices=2)))
        await until(lambda: len(first.submits) + len(second.submits) == 2)
        victim, heir = (first, second) if first.submits else (second, first)
        heir.behaviour.hold_first.set()  # type: ignore[union-attr]
        await victim.die()
        pieces = await task
        assert tokens_of(pieces) == expected(5)
        assert tokens_of(pieces, 1) == expected(5, 1)
        assert heir.submits[0].epoch.counter == 2
        assert heir.submits[0].epoch.incarnation == victim.submits[0].epoch.incarnation
        explained = c.flow.explain("tenant", "r1")
        assert explained is not None
        assert [d["decode_worker"] for d in explained["dispatches"]] == [victim.worker_id, heir.worker_id]


async def test_a_loss_that_is_told_twice_is_one_dispatch() -> None:
    async with cluster(worker_patience_s=5.0) as c:
        first = FakeWorker("a")
        first.behaviour.hold_first = asyncio.Event()
        await c.add(first)
        task = asyncio.create_task(collect(c.flow, request()))
        await until(lambda: first.submits)
        others = [FakeWorker("b"), FakeWorker("d")]
        for worker in others:  # on their way, and not there yet
            worker.refuses_sessions = True
            c.workers.append(await worker.start(c.internal))
        await until(lambda: {c.state("b"), c.state("d")} == {"joining"})
        first.break_sessions()
        await until(lambda: c.state("a") == "suspect")
        await first.die()  # its announce stream ends: the same loss once more, while the request waits for a worker
        await until(lambda: c.state("a") is None)
        for worker in others:
            worker.refuses_sessions = False
        assert tokens_of(await task) == expected(5)
        await until(lambda: {c.state("b"), c.state("d")} == {"live"})
        orders = [order for worker in others for order in worker.submits]
        assert [order.epoch.counter for order in orders] == [2]
        explained = c.flow.explain("tenant", "r1")
        assert explained is not None
        assert len(explained["dispatches"]) == 2
        assert c.flow.metrics.registry.get_sample_value("twostroke_redispatches_total") == 1


async def test_a_worker_that_lives_on_is_told_that_its_request_went_elsewhere() -> None:
    async with cluster() as c:
        for name in "ab":
            worker = FakeWorker(name)
            worker.behaviour.refuse_choice = 1
            worker.behaviour.stop_after = 0
            await c.add(worker)
        task = asyncio.create_task(collect(c.flow, request(num_choices=2)))
        await until(lambda: all(worker.submits for worker in c.workers))
        first = min(c.workers, key=lambda worker: worker.submits[0].epoch.counter)
        await until(lambda: first.cancels and not first.running)
        assert first.cancels[0].epoch == first.submits[0].epoch
        assert first.cancels[0].request_id == first.submits[0].request_id
        task.cancel()


async def test_two_tenants_and_two_routers_may_use_the_same_request_id() -> None:
    async with cluster() as c, cluster() as other:
        worker = FakeWorker("w")
        worker.behaviour.hold_first = asyncio.Event()
        await c.add(worker)
        await worker.announce_also(other.internal)
        await until(lambda: other.state("w") == "live")
        asked = [
            (c.flow, request("same", isolation_domain="one")),
            (c.flow, request("same", isolation_domain="two", prompt_ids=PROMPT[:50])),
            (other.flow, request("same", isolation_domain="one")),
        ]
        tasks = [asyncio.create_task(collect(flow, one)) for flow, one in asked]
        await until(lambda: len(worker.submits) == 3)
        assert len({order.request_id for order in worker.submits}) == 3
        assert all("same" in order.request_id for order in worker.submits), "an operator finds it in a worker's log"
        with pytest.raises(errors.InvalidRequest, match="in use"):
            await collect(c.flow, request("same", isolation_domain="two"))
        assert await c.flow.abort("two", "same")
        worker.behaviour.hold_first.set()
        assert tokens_of(await tasks[0]) == tokens_of(await tasks[2]) == expected(5)
        with pytest.raises(errors.Cancelled):
            await tasks[1]
        for tenant, state, tokens in (("one", "finished", 100), ("two", "cancelled", 50)):
            explained = c.flow.explain(tenant, "same")
            assert explained is not None
            assert (explained["state"], explained["tokens"]["prompt"]) == (state, tokens)
        assert c.flow.explain("three", "same") is None


async def test_a_worker_that_dies_in_the_middle_costs_its_streams_a_pause() -> None:
    async with cluster() as c:
        await c.add(FakeWorker("a"), FakeWorker("b"))
        for worker in c.workers:
            worker.behaviour.stop_after = 2
        stream = c.flow.generate(request(num_choices=3), Timeline())
        got = [await anext(stream) for _ in range(6)]
        victim, heir = sorted(c.workers, key=lambda worker: not worker.submits)
        heir.behaviour.stop_after = None
        await victim.die()
        got += [piece async for piece in stream]
        for choice in range(3):
            assert tokens_of(got, choice) == expected(5, choice)
            (order,) = [order for order in heir.submits if order.choice == choice]
            assert order.prompt_ids == [*PROMPT, *expected(2, choice)]
            assert (order.emitted_tokens, order.epoch.counter) == (2, 2)
        assert [piece.usage.completion_tokens for piece in got if piece.usage] == [15]
        await until(lambda: c.state(victim.worker_id) is None)
        explained = c.flow.explain("tenant", "r1")
        assert explained is not None
        first, second = explained["dispatches"]
        assert (first["resumed_tokens"], second["resumed_tokens"]) == ([0, 0, 0], [2, 2, 2])
        assert first["left"]["code"] == "worker_lost"
        assert first["at_ms"] < first["first_token_ms"] < first["left"]["at_ms"] <= second["at_ms"]
        assert second["left"] is None
        timeline = explained["timeline"]
        assert timeline["first_token"] < first["left"]["at_ms"], (
            "the client's first token, not that of the second worker"
        )
        assert explained["decode_worker"] == heir.worker_id


async def test_a_stuck_session_is_opened_anew() -> None:
    async with cluster() as c:
        worker = await c.add(FakeWorker("a"))
        stuck = set(worker.sessions)
        worker.behaviour.mute_session = True
        await until(lambda: c.state("a") == "suspect", 60.0)
        await until(lambda: not stuck & worker.sessions, 60.0)
        worker.behaviour.mute_session = False
        await until(lambda: c.state("a") == "live", 60.0)
        assert tokens_of(await collect(c.flow, request())) == expected(5)


async def test_another_life_that_answers_at_the_address_is_not_trusted() -> None:
    async with cluster() as c:
        worker = FakeWorker("a")
        worker.behaviour.welcome_as = 99
        c.workers.append(await worker.start(c.internal))
        await until(lambda: c.state("a") == "joining")
        with pytest.raises(errors.Unavailable):
            await collect(c.flow, request())
        assert not worker.submits


async def test_a_malformed_announcement_is_refused_and_others_are_heard() -> None:
    async with cluster() as c:
        async with InsideChannel(c.internal, PROOF_KEY) as channel:
            call = worker_pb2_grpc.AnnounceStub(channel).Announce()
            await call.write(worker_pb2.Announcement(worker=common_pb2.WorkerInfo(worker_id="x")))
            assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
        await c.add(FakeWorker("a"))


async def test_a_silent_worker_is_suspected_then_its_requests_are_lost_and_the_thawed_one_comes_back() -> None:
    async with cluster() as c:
        worker = await c.add(FakeWorker("a"))
        worker.behaviour.stop_after = 1
        stream = c.flow.generate(request(), Timeline())
        await anext(stream)
        worker.behaviour.mute = True
        await until(lambda: c.state("a") == "suspect", 60.0)
        with pytest.raises(errors.WorkerLost):
            await asyncio.wait_for(anext(stream), 60)
        await until(lambda: c.state("a") is None, 60.0)
        with pytest.raises(errors.Unavailable):
            await collect(c.flow, request("r2"))
        worker.behaviour.mute, worker.behaviour.stop_after = False, None
        await until(lambda: c.state("a") == "live", 60.0)
        assert tokens_of(await collect(c.flow, request("r3"))) == expected(5)


async def test_a_new_incarnation_replaces_the_old_one() -> None:
    async with cluster() as c:
        old = await c.add(FakeWorker("a"))
        await old.die()
        new = await c.add(reborn(old))
        assert tokens_of(await collect(c.flow, request())) == expected(5)
        assert len(new.submits) == 1


async def test_a_refusing_worker_is_passed_over_and_a_verdict_on_the_request_is_final() -> None:
    async with cluster() as c:
        first, second = FakeWorker("a"), FakeWorker("b")
        await c.add(first, second)
        await collect(c.flow, request("r0"))
        taker = first if first.submits else second  # who has its prefix is asked first
        taker.behaviour.refuse = common_pb2.Error(code="unavailable", message="draining", retry_after_ms=100)
        assert tokens_of(await collect(c.flow, request("r1"))) == expected(5)
        assert len(taker.submits) == 2, "the test must have met the refusing worker"
        for worker in (first, second):
            worker.behaviour.refuse = common_pb2.Error(code="non_finite_kv", message="layer 3")
        with pytest.raises(errors.NonFiniteKv, match="layer 3"):
            await collect(c.flow, request("bad"))
        assert len([o for w in (first, second) for o in w.submits if o.request_id.startswith("bad@")]) == 1


async def test_a_draining_worker_gets_nothing_new_and_ends_what_it_runs() -> None:
    async with cluster() as c:
        leaving, staying = FakeWorker("a"), FakeWorker("b")
        await c.add(leaving)
        leaving.behaviour.token_s = 0.05
        task = asyncio.create_task(collect(c.flow, request("r1", max_tokens=10)))
        await until(lambda: leaving.submits)
        leaving.leaving = True
        await until(lambda: c.state("a") == "draining")
        await c.add(staying)
        for number in range(3):
            await collect(c.flow, request(f"s{number}"))
        assert len(leaving.submits) == 1
        assert tokens_of(await task) == expected(10)


async def test_a_waiting_request_goes_as_soon_as_a_worker_is_there() -> None:
    async with cluster(worker_patience_s=60.0) as c:
        worker = FakeWorker("a")
        worker.refuses_sessions = True
        c.workers.append(await worker.start(c.internal))
        await until(lambda: c.state("a") == "joining")
        task = asyncio.create_task(collect(c.flow, request()))
        await asyncio.sleep(0)
        worker.refuses_sessions = False
        assert tokens_of(await task) == expected(5)


async def test_a_request_waits_for_the_only_worker_to_come_back() -> None:
    async with cluster(worker_return_s=60.0) as c:
        worker = await c.add(FakeWorker("a"))
        await worker.die()
        await until(lambda: c.state("a") is None)
        assert [model.name for model in c.flow.models()] == [MODEL]
        assert not c.flow.is_ready
        tasks = [asyncio.create_task(collect(c.flow, request(f"r{n}"))) for n in range(2)]
        await asyncio.sleep(0.7)  # longer than for a worker that is known
        assert not any(task.done() for task in tasks)
        await c.add(reborn(worker))
        assert [tokens_of(await task) for task in tasks] == [expected(5)] * 2
        assert c.flow.is_ready


async def test_a_worker_that_is_gone_is_counted_once_and_leaves_nothing() -> None:
    async with cluster() as c:
        worker, other = FakeWorker("a", load={"counters": {"preemptions": 3}}), FakeWorker("b")
        await c.add(worker, other)
        value = c.flow.metrics.registry.get_sample_value
        await until(lambda: value("vllm:num_preemptions_total", {"model_name": MODEL}) == 3)
        await until(lambda: 'engine="a"' in c.flow.metrics.render("")[0].decode())
        await worker.die()
        await until(lambda: c.state("a") is None)
        await c.add(FakeWorker("d"))  # the fleet changes once more
        assert value("twostroke_workers_lost_total") == 1
        assert 'engine="a"' not in c.flow.metrics.render("")[0].decode()
        assert {key.worker_id for key in c.flow.members.links} == {"b", "d"}
        before = c.state("b"), c.state("d")
        await c.flow.close()
        assert (c.state("b"), c.state("d")) == before  # what we end ourselves is no loss
        assert value("twostroke_workers_lost_total") == 1


async def test_a_router_that_closed_opens_no_session_with_who_announces_itself_late() -> None:
    async with cluster() as c:
        await c.flow.close()
        worker = FakeWorker("late")
        worker.address = "127.0.0.1:1"
        async with InsideChannel(c.internal, PROOF_KEY) as channel:
            call = worker_pb2_grpc.AnnounceStub(channel).Announce()
            await call.write(worker_pb2.Announcement(worker=worker.info(), sequence=1))
            assert (await call.read()).sequence == 1
            assert not c.flow.members.links
            call.cancel()
