"""The doors inside: who does not prove the cluster's key gets nothing from workers and the router's internal port."""

import asyncio
import contextlib
import importlib
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from support.clusters.sockets import listeners

from twostroke.core import inside, probes
from twostroke.core.errors import ConfigError
from twostroke.core.guard import HEALTH_CHECK, HEALTH_WATCH, MAX_HEALTH_WATCHES, Guard
from twostroke.core.inside import InsideChannel
from twostroke.core.ports import free_ports
from twostroke.core.proof import ANSWER_HEADER, CALL_HEADER, Claim, call_header
from twostroke.core.request import Role
from twostroke.kv.handover.transports.grpc import FETCH, PAIR, TRANSFER
from twostroke.kv.keys import proof_key
from twostroke.protos import common_pb2, worker_pb2, worker_pb2_grpc
from twostroke.router.config import RouterConfig
from twostroke.router.process import RouterProcess
from twostroke.worker.announcer import Announcer, Retry

CLUSTER_KEY = "a key of the tests"
KEY, OTHER_KEY = proof_key(CLUSTER_KEY), proof_key("another cluster's key")
OURS = [
    importlib.import_module(f"twostroke.protos.{file.stem}")
    for file in sorted(Path(common_pb2.__file__).parent.glob("*_pb2.py"))
]
FOR_CLIENTS = {"twostroke.v1.Inference"}  # has API keys
# they carry raw bytes, and are in no descriptor
FORMS = {TRANSFER: ("stream", "stream"), PAIR: ("stream", "stream"), FETCH: ("unary", "stream")}
HEALTH_LIST = "/grpc.health.v1.Health/List"
DESCRIBE = "/twostroke.v1.Worker/Describe"


def methods() -> dict[str, str]:
    """Form of every method inside, e.g. "unary_stream", by path: whatever the protos declare."""
    forms = dict(FORMS)
    for module in (*OURS, health_pb2, reflection_pb2):
        for service in module.DESCRIPTOR.services_by_name.values():
            if service.full_name not in FOR_CLIENTS:
                for method in service.methods:
                    streams = (method.client_streaming, method.server_streaming)
                    request, response = ("stream" if is_stream else "unary" for is_stream in streams)
                    forms[f"/{service.full_name}/{method.name}"] = (request, response)
    return {path: "_".join(form) for path, form in forms.items()}


def call(channel: grpc.aio.Channel, path: str, form: str, **options: Any) -> Any:
    """The call, with an empty request where it takes one."""
    method = getattr(channel, form)(path)
    return method(**options) if form.startswith("stream") else method(b"", **options)


async def refusal(channel: grpc.aio.Channel, path: str, form: str, **options: Any) -> grpc.aio.AioRpcError:
    """How the call is refused; nothing of ours is written on its stream."""
    opened = call(channel, path, form, **options)
    with pytest.raises(grpc.RpcError) as caught:
        await asyncio.wait_for(opened if form == "unary_unary" else opened.read(), 60)
    return caught.value


async def refuses_strangers(address: str, paths: dict[str, str]) -> None:
    async with grpc.aio.insecure_channel(address) as plain, InsideChannel(address, OTHER_KEY) as wrong:
        for path, form in paths.items():
            for channel, what in ((plain, "no proof"), (wrong, "key differs")):
                if path in (HEALTH_CHECK, HEALTH_WATCH) and channel is plain:
                    continue
                error = await refusal(channel, path, form)
                assert error.code() is grpc.StatusCode.UNAUTHENTICATED, path
                assert what in error.details(), path
                assert "TWOSTROKE__CLUSTER__KEY" in error.details(), path


async def test_the_protos_declare_the_services_that_we_know():
    """A new one is tried by the tests below, unless it is for clients and named so here."""
    ours = {path.split("/")[1].removeprefix("twostroke.v1.") for path in methods() if "twostroke" in path}
    assert ours == {"Worker", "Announce", "Peers", "Handover", "Blocks"}
    assert len(methods()) >= 10


async def test_a_worker_answers_the_clusters_key_alone(start_worker, caplog):
    worker = await start_worker(Role.DECODE)
    of_routers = ("/twostroke.v1.Announce/", "/twostroke.v1.Peers/")
    served = {path: form for path, form in methods().items() if not path.startswith(of_routers)}
    await refuses_strangers(worker.address, served)
    assert worker.counters["calls_refused"] == 2 * len(served) - 2
    said = [record.message for record in caplog.records if "refuses" in record.message]
    assert len(said) == 2, "each reason is said once, not for each call"
    assert "decode-0 refuses" in said[0]
    assert "127.0.0.1" in said[0]
    assert CLUSTER_KEY not in caplog.text
    assert not worker.is_draining
    drained = list[bool]()
    async with InsideChannel(worker.address, KEY) as channel:
        for path, form in served.items():
            opened = call(channel, path, form)
            if path == HEALTH_LIST:
                opened.cancel()  # grpc_health does not implement it
            elif path.endswith("/SetRole"):
                with pytest.raises(grpc.aio.AioRpcError, match="worker role 0 is unknown"):
                    await opened
            elif path.endswith("Adapter"):
                with pytest.raises(grpc.aio.AioRpcError, match=r"must be an absolute path|no adapter '' is loaded"):
                    await opened
            elif form == "unary_unary":
                await opened
                drained.append(worker.is_draining)
            else:
                metadata = await opened.initial_metadata()
                assert any(name == ANSWER_HEADER for name, _ in metadata), path
                opened.cancel()
    assert True in drained, "Drain was among them"
    assert not worker.is_draining, "and Undrain after it"


async def test_the_routers_internal_port_answers_the_clusters_key_alone():
    http, grpc_port, internal = free_ports("127.0.0.1", 3)
    router = RouterProcess(RouterConfig(port=http, grpc_port=grpc_port, internal_port=internal), CLUSTER_KEY)
    await router.start()
    try:
        await refuses_strangers(f"127.0.0.1:{internal}", methods() | {HEALTH_CHECK: "unary_unary"})
        said = router._flow.cluster()["router"]
        assert said["calls_refused"] >= 2 * len(methods()) - 2
        assert "the cluster's key differs" in said["last_refused"]
        async with InsideChannel(f"127.0.0.1:{internal}", KEY) as channel:
            opened = worker_pb2_grpc.AnnounceStub(channel).Announce()
            await opened.write(worker_pb2.Announcement())  # gets in, and is found wanting
            assert await opened.code() is grpc.StatusCode.INVALID_ARGUMENT
    finally:
        await router.stop(0.0)


async def test_the_internal_port_is_on_loopback_unless_another_address_is_given_knowingly():
    found = []
    for settings in ({}, {"internal_host": "0.0.0.0"}, {"internal_host": "0.0.0.0", "insecure": True}):
        ports = dict(zip(("port", "grpc_port", "internal_port"), free_ports("127.0.0.1", 3), strict=True))
        router = RouterProcess(RouterConfig(**ports, **settings), CLUSTER_KEY)
        if "insecure" not in settings and settings:
            with pytest.raises(ConfigError, match=r"router\.internal_host"):
                await router.start()
        else:
            await router.start()
            found += [each for each in listeners([psutil.Process()]) if each.port == ports["internal_port"]]
        await router.stop(0.0)
    assert [each.is_public for each in found] == [False, True]


async def test_a_proof_that_was_seen_before_or_is_meant_for_another_is_refused(start_worker):
    worker = await start_worker(Role.DECODE)
    claim = Claim(DESCRIBE, worker.address, time.time_ns() // 1_000_000, b"n" * 16)
    async with grpc.aio.insecure_channel(worker.address) as plain:

        async def describe(claim: Claim, path: str = DESCRIBE) -> Any:
            return await plain.unary_unary(path)(b"", metadata=((CALL_HEADER, call_header(KEY, claim)),))

        assert await describe(claim)
        for other, path, why in (
            (claim, DESCRIBE, "used before"),
            (replace(claim, nonce=b"m" * 16), "/twostroke.v1.Worker/Drain", "key differs"),
            (replace(claim, nonce=b"m" * 16, audience="127.0.0.1:1"), DESCRIBE, "meant for 127.0.0.1:1"),
            (replace(claim, nonce=b"m" * 16, sent_ms=claim.sent_ms - 400_000), DESCRIBE, "s behind ours"),
        ):
            with pytest.raises(grpc.RpcError, match=why):
                await describe(other, path)
    assert not worker.is_draining


async def test_probes_that_say_nothing_are_ended(start_worker, monkeypatch):
    monkeypatch.setattr(probes, "PROBE_TIMEOUT_S", 0.2)
    worker = await start_worker(Role.COMBINED)
    async with grpc.aio.insecure_channel(worker.address) as plain:
        assert await plain.stream_stream(HEALTH_CHECK)().code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_probes_without_a_key_may_check_health_and_a_few_may_watch_it(start_worker):
    worker = await start_worker(Role.DECODE)
    async with grpc.aio.insecure_channel(worker.address) as plain:
        stub = health_pb2_grpc.HealthStub(plain)
        await asyncio.wait_for(stub.Check(health_pb2.HealthCheckRequest()), 60)
        watches = [stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(MAX_HEALTH_WATCHES)]
        await asyncio.wait_for(asyncio.gather(*(watch.read() for watch in watches)), 60)
        for _ in range(MAX_HEALTH_WATCHES):  # and who is refused counts no more
            assert (await refusal(plain, HEALTH_WATCH, "unary_stream")).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        for watch in watches:
            watch.cancel()
        async with asyncio.timeout(60):  # until the worker has seen that they are gone
            while not await _is_told(plain):
                await asyncio.sleep(0.02)


async def _is_told(channel: grpc.aio.Channel) -> bool:
    watch = call(channel, HEALTH_WATCH, "unary_stream")
    try:
        return bool(await watch.read())
    except grpc.RpcError:
        return False
    finally:
        watch.cancel()


# ---------------------------------------------------------------- impostors


class Impostor(worker_pb2_grpc.WorkerServicer, worker_pb2_grpc.AnnounceServicer):
    """A server that remembers what it is told, and proves as little as it can."""

    def __init__(self, *guards: grpc.aio.ServerInterceptor) -> None:
        self.heard: list[bytes] = []
        self._guards = guards

    async def listen(self) -> tuple[grpc.aio.Server, str]:
        server = grpc.aio.server(interceptors=self._guards)

        async def hear(_: Any, context: Any) -> None:
            while isinstance(message := await context.read(), bytes):
                self.heard.append(message)
                await context.write(message)

        handler = grpc.stream_stream_rpc_method_handler(hear)
        for path in (TRANSFER, "/twostroke.v1.Announce/Announce"):
            service, method = path[1:].split("/")
            server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, {method: handler})])
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        return server, f"127.0.0.1:{port}"


class Parrot(grpc.aio.ServerInterceptor):
    """Answers every proof with the bytes of the proof itself."""

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        handler = await continuation(details)
        header = dict(details.invocation_metadata)[CALL_HEADER]

        async def answer(request: Any, context: Any) -> None:
            await context.send_initial_metadata(((ANSWER_HEADER, header[25:57]),))
            await handler.stream_stream(request, context)

        return grpc.stream_stream_rpc_method_handler(answer)


@pytest.fixture(params=["mute", "parrot", "other"])
def guards(request: Any, monkeypatch: pytest.MonkeyPatch) -> list[grpc.aio.ServerInterceptor]:
    """How an impostor answers proofs: not at all, with what it heard, or by a key of its own."""
    monkeypatch.setattr(inside, "ANSWER_S", 0.2)
    ways: dict[str, list[grpc.aio.ServerInterceptor]]
    ways = {"mute": [], "parrot": [Parrot()], "other": [Guard(OTHER_KEY, "impostor")]}
    return ways[request.param]


async def test_no_prompt_leaves_for_a_prefill_worker_that_does_not_prove_the_key(
    guards, start_worker, router_of, make_prompt
):
    impostor = Impostor(*guards)
    server, address = await impostor.listen()
    try:
        worker = await start_worker(Role.DECODE)
        answer = await (await router_of(worker)).submit("r", make_prompt(40), peers=[address])
        await answer.ended()
    finally:
        await server.stop(None)
    assert answer.end.reason == common_pb2.FINISH_REASON_LENGTH  # it computed the prompt itself
    assert answer.end.handover.local_reason
    assert not impostor.heard


@pytest.mark.parametrize("form", ["unary_unary", "unary_stream", "stream_stream"])
async def test_no_answer_of_an_impostor_is_used(form, monkeypatch):
    monkeypatch.setattr(inside, "ANSWER_S", 0.2)
    server = grpc.aio.server()

    async def lie(_: Any, context: Any) -> None:
        await context.write(b"trust me")

    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("a.B", {"C": grpc.stream_stream_rpc_method_handler(lie)})]
    )
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        async with InsideChannel(address, KEY) as channel:
            error = await refusal(channel, "/a.B/C", form)
            assert isinstance(error, inside.Unproven)
            assert f"{address} gave no proof of the cluster's key" in error.details()
            if form != "unary_unary":
                with pytest.raises(inside.Unproven):
                    await anext(aiter(call(channel, "/a.B/C", form)))
    finally:
        await server.stop(None)


async def test_a_stream_whose_peer_gives_a_wrong_proof_is_ended():
    begun, ended = asyncio.Event(), asyncio.Event()

    async def wait(_: Any, context: Any) -> None:
        begun.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    server = grpc.aio.server(interceptors=[Parrot()])
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("a.B", {"C": grpc.stream_stream_rpc_method_handler(wait)})]
    )
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        async with InsideChannel(address, KEY) as channel:
            held = channel.stream_stream("/a.B/C")()
            with pytest.raises(inside.Unproven):
                await held.read()
            async with asyncio.timeout(60):
                while begun.is_set() and not ended.is_set():  # a call that has not begun yet never will
                    await asyncio.sleep(0.01)
    finally:
        await server.stop(None)


async def test_a_worker_tells_an_impostor_router_nothing_and_says_why_once(guards, caplog):
    impostor = Impostor(*guards)
    server, address = await impostor.listen()
    announcer = Announcer([address], common_pb2.WorkerInfo(worker_id="w"), KEY, Retry(first_s=0.01, longest_s=0.01))
    announcer.start()
    try:
        async with asyncio.timeout(60):
            while "trying again" not in caplog.text:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
    finally:
        await announcer.leave()
        await server.stop(None)
    assert not impostor.heard
    said = [record.message for record in caplog.records if "trying again" in record.message]
    assert len(said) == 1
    assert "set TWOSTROKE__CLUSTER__KEY" in said[0]


async def test_a_relay_gets_nothing_from_either_side(start_worker):
    """It passes every byte on, proofs too: but they name the address that the caller dialled, which is the relay's."""
    worker = await start_worker(Role.DECODE)
    host, port = worker.address.split(":")

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                writer.write(data)
        writer.close()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream_reader, upstream_writer = await asyncio.open_connection(host, int(port))
        await asyncio.gather(pump(reader, upstream_writer), pump(upstream_reader, writer))

    server = await asyncio.start_server(relay, "127.0.0.1", 0)
    address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with InsideChannel(address, KEY) as channel:
        error = await refusal(channel, DESCRIBE, "unary_unary")
    assert error.code() is grpc.StatusCode.UNAUTHENTICATED
    assert "meant for" in error.details()
    server.close()


@pytest.mark.parametrize(
    "address", ["", "unix:/tmp/x", "http://10.0.0.1:80/x", "dns:///a:1", "a:0", "a:65536", "a b:1"]
)
async def test_an_order_with_a_peer_that_is_no_address_is_refused(address, start_worker, router_of, make_prompt):
    worker = await start_worker(Role.DECODE)
    answer = await (await router_of(worker)).submit("r", make_prompt(40), peers=[address])
    await answer.ended()
    assert answer.end.error.code == "invalid_value"
    assert "prefill_peers.address" in answer.end.error.message
    assert "host:port" in answer.end.error.message
