"""What stands before the services of the clients' port, over a real gRPC server: key, room, deadlines both ways."""

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from twostroke.client.status import from_rpc_error
from twostroke.core import errors, probes
from twostroke.protos import inference_pb2, inference_pb2_grpc
from twostroke.router.api.grpc import guard as guard_module
from twostroke.router.api.grpc.guard import Guard
from twostroke.router.api.http import reading
from twostroke.router.api.http.reading import room_of
from twostroke.router.api.validate import Limits, authenticate
from twostroke.router.config import RouterConfig

KEY = "a-key-of-the-tests"
CHECK = "/grpc.health.v1.Health/Check"
SERVING = health_pb2.HealthCheckResponse.SERVING
GOOD = (("authorization", f"Bearer {KEY}"),)
OWN = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
SERVICES = (OWN, health.SERVICE_NAME, reflection.SERVICE_NAME)
LARGE = "x" * 100_000
NARROW = (("grpc.http2.lookahead_bytes", 0), ("grpc.http2.bdp_probe", 0))  # a window that is full at once


class Answers(inference_pb2_grpc.InferenceServicer):
    """Answers "x" texts; `closed` says that a stream was ended by its reader."""

    def __init__(self) -> None:
        self.closed = asyncio.Event()

    async def Generate(self, request: Any, context: Any) -> inference_pb2.GenerateResponse:
        if request.text == "broken":
            raise ZeroDivisionError
        if request.text == "wait":
            await asyncio.sleep(10)
        return inference_pb2.GenerateResponse(model=LARGE)

    async def GenerateStream(self, request: Any, context: Any) -> AsyncIterator[inference_pb2.GenerateChunk]:
        try:
            while True:
                yield inference_pb2.GenerateChunk(text=LARGE)
        finally:
            self.closed.set()


class There:
    def __init__(self, guard: Guard, service: Answers, health_: Any, address: str) -> None:
        self.guard, self.service, self.health, self.address = guard, service, health_, address

    def channel(self, *options: tuple[str, int]) -> grpc.aio.Channel:
        return grpc.aio.insecure_channel(self.address, options=[("grpc.use_local_subchannel_pool", 1), *options])


@asynccontextmanager
async def serving(**settings: Any) -> AsyncIterator[There]:
    config = RouterConfig(**{"api_keys": (KEY,), "slow_client_s": 0.3, **settings})
    limits = Limits.of(config)
    guard = Guard(config, lambda key: authenticate(key, limits), (OWN,), room_of(config))
    server = grpc.aio.server(interceptors=[guard])
    service, health_ = Answers(), health.aio.HealthServicer()
    inference_pb2_grpc.add_InferenceServicer_to_server(service, server)
    health_pb2_grpc.add_HealthServicer_to_server(health_, server)
    reflection.enable_server_reflection(SERVICES, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield There(guard, service, health_, f"127.0.0.1:{port}")
    finally:
        await server.stop(None)
        guard.close()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


async def failure(call: Any) -> grpc.aio.AioRpcError:
    """How a call ends that gets no reply."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asyncio.wait_for(call.read(), 60)
    return caught.value


def raw_call(channel: grpc.aio.Channel, method: str, metadata: Any = GOOD) -> Any:
    return channel.stream_stream(method)(metadata=metadata)


def methods() -> list[str]:
    pool = inference_pb2.DESCRIPTOR.pool
    found = [f"/{name}/{method.name}" for name in SERVICES for method in pool.FindServiceByName(name).methods]
    assert len(found) >= 12
    return [*found, f"/{OWN}/Nothing", "/no.Service/Method"]


@pytest.mark.parametrize("metadata", [(), (("authorization", "Bearer wrong"),), (("authorization", KEY),)], ids=str)
async def test_no_method_but_check_reads_anything_without_a_key(metadata):
    async with serving() as there, there.channel() as channel:
        for method in methods():
            if method == "/grpc.health.v1.Health/Check":
                continue
            assert (await failure(raw_call(channel, method, metadata))).code() is grpc.StatusCode.UNAUTHENTICATED, (
                method
            )
        reply = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert reply.status == health_pb2.HealthCheckResponse.SERVING


async def test_with_a_key_every_method_is_served():
    async with serving() as there, there.channel() as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        assert (await stub.Generate(inference_pb2.GenerateRequest(text="x"), metadata=GOOD)).model == LARGE
        stream = stub.GenerateStream(inference_pb2.GenerateRequest(text="x"), metadata=GOOD)
        assert (await stream.read()).text == LARGE
        stream.cancel()
        await there.service.closed.wait()
        nothing = await failure(raw_call(channel, f"/{OWN}/Nothing"))
        assert nothing.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_message_that_never_comes_ends_its_call(monkeypatch):
    monkeypatch.setattr(reading, "READ_S", 0.05)
    async with serving() as there, there.channel() as channel:
        free = there.guard._room.free_bytes
        for method in (
            f"/{OWN}/Chat",
            "/grpc.health.v1.Health/Watch",
            f"/{reflection.SERVICE_NAME}/ServerReflectionInfo",
        ):
            error = await failure(raw_call(channel, method))
            assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED, method
        assert there.guard._room.free_bytes == free


async def test_a_call_that_ends_without_its_message_is_refused():
    async with serving() as there, there.channel() as channel:
        call = raw_call(channel, f"/{OWN}/Generate")
        await call.done_writing()
        assert (await failure(call)).code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_whoever_waits_for_room_gets_it_from_those_that_do_not_send(monkeypatch):
    monkeypatch.setattr(reading, "CONTENDED_READ_S", 0.1)
    async with serving(max_body_bytes=32 << 20) as there, there.channel() as channel:  # room for two
        calls = [raw_call(channel, f"/{OWN}/Generate") for _ in range(2)]
        await until(lambda: there.guard._room.free_bytes == 32 << 20)  # of one tenant one: the other half is others'
        generate = inference_pb2_grpc.InferenceStub(channel).Generate
        await generate(inference_pb2.GenerateRequest(text="x"), metadata=GOOD, timeout=10)
        for call in calls:
            assert (await failure(call)).code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert there.guard._room.free_bytes == 64 << 20


async def test_bytes_are_looked_at_before_they_become_a_message():
    async with serving() as there, there.channel() as channel:
        call = raw_call(channel, f"/{OWN}/Generate")
        await call.write(b"\x12\x01x" + b"\x22\x02\x32\x00" * 17)
        error = from_rpc_error(await failure(call))
        assert (error.code, error.param) == ("invalid_value", "stop")
        call = raw_call(channel, f"/{OWN}/Generate")
        await call.write(b"\x12\x02\xff\xff")
        assert (await failure(call)).code() is grpc.StatusCode.INVALID_ARGUMENT
        call = raw_call(channel, "/grpc.health.v1.Health/Watch")
        await call.write(b"\x0a\xff\x7f" + b"s" * 16383)
        assert (await failure(call)).code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_calls_beyond_the_bound_are_refused_with_advice(monkeypatch):
    monkeypatch.setattr(guard_module, "SPARE_CALLS", 0)
    monkeypatch.setattr(guard_module, "MAX_STANDING", 1)
    async with serving(max_running=2) as there, there.channel() as channel:
        generate = inference_pb2_grpc.InferenceStub(channel).Generate
        waiting = [generate(inference_pb2.GenerateRequest(text="wait"), metadata=GOOD) for _ in range(2)]
        watching = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), metadata=GOOD)
        await watching.read()
        await until(lambda: there.guard._num_calls == {True: 2, False: 1})
        for method in (f"/{OWN}/Generate", "/grpc.health.v1.Health/Watch"):
            error = from_rpc_error(await failure(raw_call(channel, method)))
            assert isinstance(error, errors.Overloaded), method
            assert error.retry_after_s
        for call in (*waiting, watching):
            call.cancel()
        await until(lambda: there.guard._num_calls == {True: 0, False: 0})


async def test_probes_that_say_nothing_are_ended_and_keep_nobody_out(monkeypatch):
    monkeypatch.setattr(probes, "PROBE_TIMEOUT_S", 0.3)
    async with serving() as there, there.channel() as silent, there.channel() as channel:
        calls = [silent.stream_stream(CHECK)() for _ in range(3 * probes.MAX_WAITING)]
        await until(lambda: there.guard.num_waiting_probes)
        check = health_pb2_grpc.HealthStub(channel).Check
        for _ in range(3):
            assert (await check(health_pb2.HealthCheckRequest(), timeout=10)).status == SERVING
            assert there.guard.num_waiting_probes <= probes.MAX_WAITING
        for call in calls:
            assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert there.guard.num_waiting_probes == 0


async def test_a_probe_may_come_just_when_the_oldest_expires(monkeypatch):
    class Silent:
        async def read(self):
            await asyncio.Event().wait()

    monkeypatch.setattr(probes, "PROBE_TIMEOUT_S", 0.05)
    found, loop = probes.Probes(), asyncio.get_running_loop()
    waiting = [loop.create_task(found._message(Silent())) for _ in range(probes.MAX_WAITING)]
    await until(lambda: found.num_waiting == probes.MAX_WAITING)
    time.sleep(0.1)  # the loop was held: all expire in its next turn, and the new one comes before they have run
    loop.call_soon(lambda: waiting.append(loop.create_task(found._message(Silent()))))
    await asyncio.sleep(0.01)
    assert await asyncio.gather(*waiting) == [None] * (probes.MAX_WAITING + 1)
    assert found.num_waiting == 0


async def test_one_more_silent_probe_ends_the_oldest(monkeypatch):
    monkeypatch.setattr(probes, "PROBE_TIMEOUT_S", 60.0)
    monkeypatch.setattr(probes, "MAX_WAITING", 2)
    async with serving() as there, there.channel() as channel:
        calls = []
        for number in range(3):
            calls.append(channel.stream_stream(CHECK)())
            await until(lambda number=number: there.guard.num_waiting_probes == min(number + 1, 2))
        assert await calls[0].code() is grpc.StatusCode.INVALID_ARGUMENT
        assert not calls[1].done()
        for call in calls:
            call.cancel()


@pytest.mark.parametrize("data", [b"\x0a\xff\x7f", b"\xff"])
async def test_a_probe_of_anything_else_is_refused(data: bytes):
    async with serving() as there, there.channel() as channel:
        call = channel.stream_stream(CHECK)()
        await call.write(data)
        assert (await failure(call)).code() is grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service="other"))
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND


async def test_calls_of_one_key_leave_room_for_anothers(monkeypatch):
    monkeypatch.setattr(guard_module, "SPARE_CALLS", 0)
    async with serving(max_running=4, api_keys=(KEY, "another-key")) as there, there.channel() as channel:
        silent = [raw_call(channel, f"/{OWN}/ListModels") for _ in range(2)]
        await until(lambda: there.guard._num_calls[True] == 2)
        error = from_rpc_error(await failure(raw_call(channel, f"/{OWN}/ListModels")))
        assert isinstance(error, errors.Overloaded)
        assert "of this key" in str(error)
        generate = inference_pb2_grpc.InferenceStub(channel).Generate
        other = (("authorization", "Bearer another-key"),)
        assert (await generate(inference_pb2.GenerateRequest(text="x"), metadata=other, timeout=10)).model
        for call in silent:
            call.cancel()
        await until(lambda: there.guard._num_calls[True] == 0)
        assert not there.guard._tenant_calls


async def test_a_small_message_that_never_comes_ends_its_call_soon(monkeypatch):
    monkeypatch.setattr(guard_module, "SMALL_READ_S", 0.05)
    async with serving() as there, there.channel() as channel:
        call = raw_call(channel, f"/{OWN}/ListModels")
        assert (await failure(call)).code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_client_that_leaves_in_the_midst_of_a_reply_is_no_failure_of_ours(caplog):
    class Left:
        async def write(self, _: Any) -> None:
            raise grpc.aio.UsageError("RPC already finished.")

    async with serving() as there:
        with pytest.raises(guard_module.Gone):
            await there.guard._write(Left(), lambda message: message, b"")


async def test_an_unexpected_failure_is_a_typed_one():
    async with serving() as there, there.channel() as channel:
        call = inference_pb2_grpc.InferenceStub(channel).Generate(
            inference_pb2.GenerateRequest(text="broken"), metadata=GOOD
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert isinstance(from_rpc_error(caught.value), errors.InternalError)


@pytest.mark.parametrize("method", ["GenerateStream", "Generate"])
async def test_a_reader_that_stops_is_let_go_of(method):
    async with serving() as there, there.channel(*NARROW) as channel, there.channel() as other:
        call = raw_call(channel, f"/{OWN}/{method}")
        await call.write(inference_pb2.GenerateRequest(text="x").SerializeToString())
        await until(lambda: there.guard._num_calls[True] == 1)
        await until(lambda: there.guard._num_calls[True] == 0)
        if method == "GenerateStream":
            assert there.service.closed.is_set()
        for _ in range(2):  # grpc.aio holds the call that came last until the next comes
            await health_pb2_grpc.HealthStub(other).Check(health_pb2.HealthCheckRequest())
        gc.collect()
        async with asyncio.timeout(60):
            assert await call.code() is grpc.StatusCode.CANCELLED


async def test_a_watcher_that_stops_reading_holds_up_no_shutdown():
    async with serving() as there, there.channel(*NARROW) as channel:
        call = raw_call(channel, "/grpc.health.v1.Health/Watch")
        await call.write(b"")
        await until(lambda: there.health._server_watchers)
        async with asyncio.timeout(60):
            await there.health.enter_graceful_shutdown()


async def test_a_message_that_is_here_takes_no_more_room_than_it_has_bytes():
    async with serving() as there, there.channel() as channel:
        free = there.guard._room.free_bytes
        stub = inference_pb2_grpc.InferenceStub(channel)
        call = stub.Generate(inference_pb2.GenerateRequest(text="wait"), metadata=GOOD)
        await until(lambda: 0 < free - there.guard._room.free_bytes < 100)
        call.cancel()
        await until(lambda: there.guard._room.free_bytes == free)


async def test_what_looks_after_the_router_is_served_however_many_prompts_are_being_read():
    async with serving() as there:
        room = there.guard._room
        while True:  # everything that tenants of prompts may have
            try:
                async with asyncio.timeout(0.05):
                    await room.take("tenant", 4 << 20)
            except TimeoutError:
                break
        async with there.channel() as channel:
            call = raw_call(channel, f"/{OWN}/ListModels")
            await call.write(b"")
            assert (await failure(call)).code() is grpc.StatusCode.INTERNAL  # it was read: `Answers` has none
            check = health_pb2_grpc.HealthStub(channel).Check
            await check(health_pb2.HealthCheckRequest(), timeout=5)
