"""What a worker tells besides tokens: Watch, Blocks.Fetch, health, reflection, Announce."""

import asyncio
import contextlib
import time
from dataclasses import replace

import grpc
import grpc.aio
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from support.clusters.flow_cluster import until
from support.fakes.ear import KEY, Ear

from twostroke.cluster.discovery.names import Names
from twostroke.core.inside import InsideChannel
from twostroke.core.lease import WORKER_LEASE
from twostroke.core.request import CacheScope, Role
from twostroke.kv.config import CacheConfig
from twostroke.kv.handover.damage import verify_frame
from twostroke.kv.handover.frames import Frame, decode_envelope
from twostroke.kv.handover.transports.grpc import Channels
from twostroke.kv.messages import role_to_wire
from twostroke.protos import common_pb2, handover_pb2, worker_pb2, worker_pb2_grpc
from twostroke.worker import announcer as announcer_module
from twostroke.worker.announcer import Announcer, Retry

SMALL = CacheConfig(tokens=1024, frame_bytes=8192)  # 64 blocks: evicts all the time


class Watched:
    """What a router would know of a worker's prefix cache."""

    def __init__(self, stub):
        self.identities = set()
        self.load = None
        self.sequence = 0
        self.num_snapshots = 0
        self.changed = asyncio.Event()
        self._in_snapshot = False
        self._task = asyncio.create_task(self._run(stub))

    async def _run(self, stub):
        async for event in stub.Watch(worker_pb2.WatchRequest(router_id="test")):
            self.take(event)
            self.changed.set()

    def take(self, event):
        if event.HasField("load"):
            assert event.sequence == self.sequence
            self.load = event.load
            return
        assert event.sequence == self.sequence + 1, "a gap"
        self.sequence = event.sequence
        if event.HasField("snapshot"):
            if not self._in_snapshot:
                self.identities.clear()
                self.num_snapshots += 1
            self.identities |= _split(event.snapshot.identities)
            self._in_snapshot = not event.snapshot.last
        else:
            self.identities |= _split(event.delta.stored)
            self.identities -= _split(event.delta.removed)

    async def until(self, condition):
        async def wait():
            while not condition():
                self.changed.clear()
                await self.changed.wait()

        await asyncio.wait_for(wait(), 60)

    async def close(self):
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


def _split(identities):
    return {identities[place : place + 16] for place in range(0, len(identities), 16)}


def held_by(worker):
    """The truth, read from the idle engine's own index."""
    return set(worker.room.engine.core.prefix.snapshot())


@pytest.fixture
async def watch():
    watched = []

    def start(hand):
        watched.append(Watched(hand.stub))
        return watched[-1]

    yield start
    for one in watched:
        await one.close()


async def test_snapshot_and_deltas_rebuild_the_prefix_cache(start_worker, router_of, make_prompt, all_free, watch):
    worker = await start_worker(Role.COMBINED, cache=SMALL)
    hand = await router_of(worker)
    early = watch(hand)
    await early.until(lambda: early.num_snapshots == 1)
    for place in range(12):  # 12 x 160 tokens through a pool of 1,024
        await (await hand.submit(f"r{place}", make_prompt(150, place), sampling={"max_tokens": 10})).ended()
        if place == 6:
            late = watch(hand)
    await all_free(worker)
    truth = held_by(worker)
    assert len(truth) > 10
    await early.until(lambda: early.identities == truth)
    await late.until(lambda: late.identities == truth)
    assert (early.num_snapshots, late.num_snapshots) == (1, 1)
    assert early.load.total_blocks == 64
    assert early.load.role == common_pb2.ROLE_COMBINED
    # Times tell which of the two it is; reports come at their own pace.
    await early.until(lambda: max(early.load.prefill_ms_per_token, early.load.prefill_ms_per_token_pair) > 0)


async def test_a_slow_watcher_gets_a_new_snapshot_instead_of_a_long_queue(start_worker, router_of, make_prompt, watch):
    worker = await start_worker(Role.COMBINED, cache=SMALL)
    worker.faces.watchers._max_pending = 4
    hand = await router_of(worker)
    slow = worker.faces.watchers.watch()
    view = Watched.__new__(Watched)
    view.identities, view.sequence, view.num_snapshots, view._in_snapshot = set(), 0, 0, False
    while view.num_snapshots == 0:
        view.take(await anext(slow))
    for place in range(6):  # nobody reads meanwhile
        await (await hand.submit(f"r{place}", make_prompt(150, place))).ended()
    (watcher,) = worker.faces.watchers._open
    assert sum(len(d.stored) + len(d.removed) for d in watcher._deltas) <= 4 + 20
    await asyncio.sleep(0.3)
    truth = held_by(worker)
    async with asyncio.timeout(60):
        while view.identities != truth:
            view.take(await anext(slow))
    assert view.num_snapshots == 2
    assert worker.counters["watch_resyncs"] == 1
    await slow.aclose()


async def test_fetch_gives_verified_frames_of_what_is_cached(
    start_worker, router_of, make_prompt, all_free, monkeypatch
):
    worker = await start_worker(Role.COMBINED)
    hand = await router_of(worker)
    ids = make_prompt(330)
    await (await hand.submit("r", ids)).ended()
    await all_free(worker)
    facts = worker.room.facts
    names = facts.namer.name(ids, CacheScope("tests", b"")).identities
    unknown = facts.namer.name(ids, CacheScope("somebody else", b"")).identities
    channels = Channels(KEY)

    async def fetch(domain="tests", **wanted):
        request = handover_pb2.FetchRequest(isolation_domain=domain, **wanted).SerializeToString()
        return [decode_envelope(e) async for e in channels.fetch(worker.address, request, 5.0)]

    frames = await fetch(identities=[*names, unknown[-1]])
    assert len(frames) > 1
    assert all(
        isinstance(frame, Frame) and verify_frame(frame, facts.digest_key, facts.model.kv_spec) for frame in frames
    )
    assert [i for frame in frames for i in frame.header.identities] == list(names)
    assert [frame.header.token_start for frame in frames] == [*range(0, 320, frames[0].header.token_count)]
    (part,) = await fetch(
        identities=names[:1], components=["v"], layer_start=1, layer_count=1, head_start=1, head_count=1
    )
    (section,) = part.sections
    whole = next(s for s in frames[0].sections if s.component == "v")
    assert np.array_equal(section.payload[0, 0], whole.payload[1 - whole.layer_start, 1, :16])
    assert verify_frame(part, facts.digest_key)
    assert await fetch(identities=unknown) == []
    assert await fetch(identities=names, domain="somebody else") == []  # the right names of another tenant's blocks
    assert await fetch(identities=names, domain="") == []
    assert len(frames[0].header.identities) == 3
    (leading,) = await fetch(identities=[*names[:2], unknown[2], *names[3:]])  # nothing is served behind a gap
    assert list(leading.header.identities) == list(names[:2])
    monkeypatch.setattr("twostroke.worker.blocks.fetch.MAX_IDENTITIES", 3)
    assert [list(frame.header.identities) for frame in await fetch(identities=names[:3])] == [list(names[:3])]
    for refused in ([b"short"], names[:4]):
        with pytest.raises(grpc.RpcError) as refusal:
            await fetch(identities=refused)
        assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    await channels.close()


# ---------------------------------------------------------------- health


class AheadClock:
    """The machine's clock, set forward at will."""

    ahead_s = 0.0

    def now_s(self):
        return time.monotonic() + self.ahead_s


async def test_health_follows_the_step_loop(start_worker):
    clock = AheadClock()
    worker = await start_worker(Role.COMBINED, clock=clock)
    async with grpc.aio.insecure_channel(worker.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)

        async def check(service=""):
            return (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status

        async def until(status):
            async with asyncio.timeout(60):
                while await check() != status:
                    await asyncio.sleep(0.01)

        await until(health_pb2.HealthCheckResponse.SERVING)
        assert await check("twostroke.v1.Worker") == health_pb2.HealthCheckResponse.SERVING
        clock.ahead_s += 10.0
        assert worker.health.is_serving()  # an old beat without work is no hang
        worker.dispatcher.own(("a hung request", 0), lambda event: None)
        clock.ahead_s += 10.0  # no beat is heard before the next await
        assert not worker.health.is_serving()
        worker.dispatcher._owner_by_key.clear()
        await worker.drain(0.0)
        await until(health_pb2.HealthCheckResponse.NOT_SERVING)


async def test_reflection_lists_the_services(start_worker):
    worker = await start_worker(Role.COMBINED)
    async with InsideChannel(worker.address, KEY) as channel:
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        answer = await call.read()
        await call.done_writing()
    names = {service.name for service in answer.list_services_response.service}
    assert {"twostroke.v1.Worker", "grpc.health.v1.Health"} <= names


# ---------------------------------------------------------------- announce


async def test_a_worker_announces_itself_changes_and_leaves(start_worker):
    ear = Ear()
    server, address = await ear.listen()
    worker = await start_worker(Role.DECODE, routers=(address, "127.0.0.1:1"))
    await ear.until(lambda heard: len(heard) >= 2)
    assert ear.heard[0].worker == worker.info()
    assert not ear.heard[1].HasField("worker")  # a beat
    worker.set_role(Role.COMBINED)
    await ear.until(lambda heard: any(m.worker.role == common_pb2.ROLE_COMBINED for m in heard))
    await worker.stop(0.0)
    assert ear.heard[-1].leaving
    assert [m.sequence for m in ear.heard] == list(range(1, len(ear.heard) + 1))
    await server.stop(0)


async def test_a_router_at_every_address_of_a_name_is_told_and_one_that_the_name_loses_is_forgotten(monkeypatch):
    first, second = Ear(), Ear()
    one, address = await first.listen()
    port = address.rpartition(":")[2]
    two, _ = await second.listen(f"127.0.0.2:{port}")
    found = ["127.0.0.1"]

    def look_up(name, port, **_):
        assert name == "routers.test.svc"
        if not found:
            raise OSError("no such name")
        return [(0, 0, 0, "", (host, port)) for host in found]

    monkeypatch.setattr("socket.getaddrinfo", look_up)
    name = Names(f"routers.test.svc:{port}", interval_s=0.02)
    announcer = Announcer([], common_pb2.WorkerInfo(worker_id="w"), KEY, Retry(first_s=0.02, longest_s=0.02), [name])
    announcer.start()
    await first.until(bool)
    assert not second.heard
    found.append("127.0.0.2")
    await second.until(bool)
    await until(lambda: announcer.num_answering == 2)
    found.clear()  # no answer of the name service: the routers stay
    first.heard.clear()
    await first.until(bool)
    found.append("127.0.0.2")
    await one.stop(0)
    await until(lambda: announcer.num_answering == 1)
    await until(lambda: announcer._tasks.keys() == {f"127.0.0.2:{port}"})
    await announcer.leave()
    assert second.heard[-1].leaving
    await two.stop(0)


async def test_a_change_of_role_is_answered_told_at_once_and_is_the_engine_s(start_worker, monkeypatch):
    """Without the next beat, which comes in an hour here."""
    monkeypatch.setattr(announcer_module, "WORKER_LEASE", replace(WORKER_LEASE, beat_s=3600.0, silence_s=7200.0))
    ear = Ear()
    server, address = await ear.listen()
    worker = await start_worker(Role.DECODE, routers=(address,))
    await ear.until(lambda heard: heard)
    async with InsideChannel(worker.address, KEY) as channel:
        stub = worker_pb2_grpc.WorkerStub(channel)
        for role, share in ((Role.COMBINED, 0.5), (Role.PREFILL, 1.0), (Role.DECODE, 0.25)):
            wire = role_to_wire(role)
            answer = await stub.SetRole(worker_pb2.SetRoleRequest(role=wire))
            assert answer == worker.info()
            assert answer.role == wire
            await ear.until(lambda heard, wire=wire: heard[-1].worker.role == wire)
            async with asyncio.timeout(240):
                while worker.room.engine.core.policy.prefill_share != share:
                    await asyncio.sleep(0.01)
        for unknown in (0, 99):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.SetRole(worker_pb2.SetRoleRequest(role=unknown))
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert worker.role is Role.DECODE
    await worker.stop(0.0)
    await server.stop(0)


async def test_a_router_that_comes_back_is_told_again():
    ear = Ear()
    server, address = await ear.listen()
    announcer = Announcer([address], common_pb2.WorkerInfo(worker_id="w"), KEY, Retry(first_s=0.02, longest_s=0.1))
    announcer.start()
    await ear.until(bool)
    await server.stop(0)
    ear.heard.clear()
    await asyncio.sleep(0.2)
    server, _ = await ear.listen(address)
    await ear.until(bool)
    assert ear.heard[0].worker.worker_id == "w"
    await announcer.leave()
    with contextlib.suppress(grpc.RpcError):
        await server.stop(0)
