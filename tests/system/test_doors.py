"""A cluster with API keys on a public address: it becomes ready, lets in who has a key, and keeps tenants apart."""

import importlib.util
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import grpc
import httpx
import psutil
import pytest
from google.protobuf import descriptor_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from support.clusters.sockets import check_listeners, declared_by, listeners

from twostroke import Cancelled, Client, ConfigError, RequestNotFound, Unauthenticated
from twostroke.client.status import from_rpc_error
from twostroke.core.errors import InternalError
from twostroke.protos import common_pb2, inference_pb2
from twostroke.router.api.grpc.guard import OPEN
from twostroke.router.api.kserve.service import SERVICE as KSERVE

KEY = "first-secret"
GOOD = (("authorization", f"Bearer {KEY}"),)
HOSTILE = Path(__file__).resolve().parents[2] / "bench" / "hostile" / "grpc_inputs.py"


@pytest.fixture(scope="module")
def guarded(run_cluster):
    before = {each.port for each in listeners([psutil.Process()])}
    with run_cluster(
        cluster__launcher="inprocess",
        cluster__prefill=0,
        cache__tokens=8192,
        step__num_threads=1,
        router__host="0.0.0.0",
        router__insecure=True,
        router__max_body_bytes=32 * 1024,
        router__slow_client_s=1.0,
        router__api_keys=[KEY, "second-secret"],
    ) as running:
        running.listening_before = before
        yield running


def test_on_a_public_address_only_what_clients_use_is_public(guarded):
    with Client(guarded.grpc, api_key="first-secret") as client:
        cluster = client.cluster()
    ports = {"port": urlsplit(guarded.url).port, "grpc_port": int(guarded.grpc.rpartition(":")[2])}
    ports["internal_port"] = guarded.supervisor.config.router.internal_port
    found = [each for each in listeners([psutil.Process()]) if each.port not in guarded.listening_before]
    assert check_listeners(found, declared_by(cluster, is_public=True, **ports)) == []


def test_without_a_key_every_door_is_shut_but_liveness(guarded):
    for path in ("/v1/models", "/v1/cluster", "/v1/requests/x/explain", "/metrics"):
        reply = httpx.get(guarded.url + path)
        assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key"), path
    assert httpx.post(guarded.url + "/v1/completions", json={"prompt": "x"}).status_code == 401
    assert httpx.get(guarded.url + "/health").status_code == 200
    with Client(guarded.grpc, api_key="wrong") as client, pytest.raises(Unauthenticated):
        client.generate("x", max_tokens=1)


def test_one_tenant_sees_nothing_of_another(guarded):
    first, second = (Client(guarded.grpc, api_key=key) for key in ("first-secret", "second-secret"))
    prompt = "def " * 200
    with first, second:
        mine = first.generate(prompt, max_tokens=1, temperature=0)
        assert first.generate(prompt, max_tokens=1, temperature=0).usage.cached_tokens > 0
        assert second.generate(prompt, max_tokens=1, temperature=0).usage.cached_tokens == 0
        assert first.explain(mine.request_id)["request_id"] == mine.request_id
        with pytest.raises(RequestNotFound):
            second.explain(mine.request_id)


def test_a_public_host_needs_a_word(run_cluster):
    with pytest.raises(ConfigError, match="--insecure"), run_cluster(router__host="0.0.0.0"):
        pass


# ---------------------------------------------------------------- the gRPC door


def hostile(most_bytes: int):
    """The campaign's list, under a name of its own: its folder stays out of the path."""
    spec = importlib.util.spec_from_file_location("bench_hostile_grpc_inputs", HOSTILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return list(module.hostile_messages(most_bytes))


def registered(channel: grpc.Channel) -> list[str]:
    """Every method of every service, as the router's own reflection has them."""
    ask = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
    request = reflection_pb2.ServerReflectionRequest
    (listed,) = ask(iter([request(list_services="")]), metadata=GOOD)
    found = []
    for service in listed.list_services_response.service:
        (reply,) = ask(iter([request(file_containing_symbol=service.name)]), metadata=GOOD)
        for raw in reply.file_descriptor_response.file_descriptor_proto:
            file = descriptor_pb2.FileDescriptorProto.FromString(raw)
            for one in file.service:
                if f"{file.package}.{one.name}" == service.name:
                    found += [f"/{service.name}/{method.name}" for method in one.method]
    return found


def ended(call) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        next(call)
    return caught.value


def test_every_registered_method_asks_for_the_key_before_it_reads(guarded):
    never = threading.Event()

    def nothing_yet():
        never.wait(20)
        yield b""

    with grpc.insecure_channel(guarded.grpc) as channel:
        methods = registered(channel)
        assert len(methods) >= 12
        assert set(methods) >= OPEN
        kserve = [f"/{KSERVE}/{name}" for name in ("ServerLive", "ModelInfer", "ModelStreamInfer", "Nothing")]
        for method in {*methods, *kserve, "/twostroke.v1.Inference/Nothing"} - OPEN:
            error = ended(channel.stream_stream(method)(nothing_yet(), timeout=10))
            assert error.code() is grpc.StatusCode.UNAUTHENTICATED, method
        never.set()
        (reply,) = channel.stream_stream(next(iter(OPEN)))(iter([b""]), timeout=10)
        assert reply == b"\x08\x01"


def test_hostile_messages_get_typed_errors_and_the_cluster_goes_on(guarded):
    with grpc.insecure_channel(guarded.grpc) as channel:
        for message in hostile(16 * 1024):
            if message.method.endswith("Stream"):
                continue  # as the method without
            call = channel.stream_stream(message.method)(iter([message.raw()]), metadata=GOOD)
            threading.Timer(0.2, call.cancel).start()  # what is served is not waited for
            code = call.code()
            assert code is not grpc.StatusCode.UNKNOWN, message.name
            if code not in (grpc.StatusCode.OK, grpc.StatusCode.CANCELLED):
                assert not isinstance(from_rpc_error(call), InternalError), (message.name, call.details())
    with Client(guarded.grpc, api_key=KEY, timeout_s=60) as client:
        assert client.generate("x", max_tokens=1).text is not None
        workers = client.cluster()["workers"]
        assert {worker["state"] for worker in workers} == {"live"}


def state(client: Client, name: str) -> str | None:
    try:
        return client.explain(name)["state"]
    except RequestNotFound:
        return None
    except Cancelled:  # this process stood still for slow_client_s, so its own answer was dropped
        return "asked again"


def until(condition) -> None:
    end_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end_s, "it did not become true in time"
        time.sleep(0.02)


def test_a_client_that_stops_reading_gives_its_request_and_its_name_back(guarded):
    narrow = [("grpc.http2.lookahead_bytes", 0), ("grpc.http2.bdp_probe", 0), ("grpc.use_local_subchannel_pool", 1)]
    sampling = common_pb2.SamplingParams(max_tokens=2000, ignore_eos=True)
    raw = inference_pb2.GenerateRequest(text="x", request_id="stalled", sampling=sampling).SerializeToString()
    with grpc.insecure_channel(guarded.grpc, options=narrow) as channel, Client(guarded.grpc, api_key=KEY) as client:
        call = channel.stream_stream("/twostroke.v1.Inference/GenerateStream")(iter([raw]), metadata=GOOD)
        until(lambda: state(client, "stalled") == "running")
        until(lambda: state(client, "stalled") == "cancelled")
        until(lambda: client.cluster()["router"]["in_flight_requests"] == 0)  # of earlier tests too
        client.generate("x", max_tokens=1, request_id="stalled")
        with pytest.raises(grpc.RpcError) as caught:  # it may still read what had been sent
            for _ in call:
                pass
        assert caught.value.code() is grpc.StatusCode.CANCELLED
