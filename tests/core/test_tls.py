"""Certificates inside the cluster: who may call what, files that change, and reasons in words."""

import importlib
import os
from pathlib import Path

import grpc
import grpc.aio
import pytest
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from support.clusters.certificates import DEPLOYMENT, Shown, folder_settings, issued, made

from twostroke.cluster.authority import Authority, of_one_run, renew, renew_authority
from twostroke.core.errors import ConfigError
from twostroke.core.guard import Guard
from twostroke.core.inside import InsideChannel
from twostroke.core.tls import identity
from twostroke.core.tls.callers import ALLOWED, Caller, caller_in, may_call, uri_of
from twostroke.core.tls.identity import HandshakeRefused, TlsIdentity, add_port
from twostroke.kv.handover.transports.grpc import FETCH, KEEP, PAIR, TRANSFER
from twostroke.protos import common_pb2

KEY = b"k" * 32


def services() -> list[ServiceDescriptor]:
    ours = [
        importlib.import_module(f"twostroke.protos.{file.stem}")
        for file in sorted(Path(common_pb2.__file__).parent.glob("*_pb2.py"))
    ]
    found = [
        service
        for module in (*ours, health_pb2, reflection_pb2)
        for service in module.DESCRIPTOR.services_by_name.values()
    ]
    return [service for service in found if service.full_name != "twostroke.v1.Inference"]  # clients', with API keys


def test_every_method_inside_has_its_callers_and_no_other_has_any():
    declared = {f"/{service.full_name}/{method.name}" for service in services() for method in service.methods}
    assert set(ALLOWED) == declared | {TRANSFER, PAIR, FETCH, KEEP}
    for caller in Caller:
        assert not may_call(caller, "/twostroke.v1.Worker/Nothing")
    assert not any(may_call(None, method) for method in ALLOWED)


def test_a_worker_cannot_command_a_worker_and_a_router_cannot_read_blocks():
    assert not may_call(Caller.WORKER, "/twostroke.v1.Worker/Session")
    assert not may_call(Caller.WORKER, "/twostroke.v1.Worker/Drain")
    assert not may_call(Caller.ROUTER, "/twostroke.v1.Worker/SetRole")
    assert not may_call(Caller.ROUTER, FETCH)
    assert not may_call(Caller.OPERATOR, "/twostroke.v1.Announce/Announce")
    assert may_call(Caller.OPERATOR, "/twostroke.v1.Worker/SetRole")


def test_a_certificate_gives_one_role_of_one_deployment_or_none():
    router = uri_of("a", Caller.ROUTER)
    assert caller_in([router, "a.example.com"], "a") is Caller.ROUTER
    assert caller_in([router], "b") is None
    assert caller_in([router, uri_of("a", Caller.WORKER)], "a") is None
    assert caller_in([router + "/more", "router"], "a") is None


# ---------------------------------------------------------------- files


def test_certificates_are_read_again_when_their_files_change(tmp_path):
    tls = TlsIdentity(made(tmp_path), Caller.ROUTER)
    first = tls.current()
    assert tls.current() is first
    renew(tmp_path, 10)
    second = tls.current()
    assert second.chain != first.chain
    assert second.ca == first.ca
    assert tls.current() is second


def test_a_certificate_without_its_key_and_a_missing_file_change_nothing(tmp_path, caplog):
    tls = TlsIdentity(made(tmp_path / "a"), Caller.WORKER)
    first = tls.current()
    made(tmp_path / "b")
    (tmp_path / "a" / "worker.pem").write_bytes((tmp_path / "b" / "worker.pem").read_bytes())
    assert tls.current() is first
    assert "belong together" in caplog.text
    (tmp_path / "a" / "worker.key").unlink()
    assert tls.current() is first
    for name in ("worker.key", "ca.pem"):
        (tmp_path / "a" / name).write_bytes((tmp_path / "b" / name).read_bytes())
    assert tls.current().chain == (tmp_path / "b" / "worker.pem").read_bytes()


def test_a_process_does_not_start_with_certificates_that_no_peer_would_take(tmp_path):
    settings = made(tmp_path)
    authority, other = Authority.new(DEPLOYMENT), Authority.new(DEPLOYMENT)
    cases = [
        (issued(authority, Caller.WORKER, 1, ago_days=3), "expired"),
        (issued(authority, Caller.WORKER, trusting=other), "unable to get local issuer"),
        (issued(authority, Caller.ROUTER), "spiffe://twostroke/twostroke/worker"),
        (issued(Authority.new("another"), Caller.WORKER), "spiffe://twostroke/another/worker"),
    ]
    for pem, words in cases:
        config = settings.model_copy(
            update={"ca": pem.ca.decode(), "cert": pem.chain.decode(), "key": pem.key.decode()}
        )
        with pytest.raises(ConfigError, match=words) as caught:
            TlsIdentity(config, Caller.WORKER)
        assert "PRIVATE" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"cluster\.tls\.cert .*missing\.pem.*twostroke certs"):
        TlsIdentity(settings.model_copy(update={"cert": "missing.pem"}), Caller.WORKER)


def test_a_key_that_everybody_can_read_is_named(tmp_path, caplog):
    settings = made(tmp_path)
    os.chmod(tmp_path / "router.key", 0o644)
    TlsIdentity(settings, Caller.ROUTER)
    assert "chmod 600" in caplog.text


# ---------------------------------------------------------------- connections


async def serve(tls: TlsIdentity, key: bytes = KEY) -> tuple[grpc.aio.Server, str, Guard]:
    """A worker's server that answers `Describe` with the caller's bytes, and `Transfer` with every message."""
    guard = Guard(key, "a worker", tls=tls)
    server = grpc.aio.server(interceptors=[guard])

    async def echo(request: bytes, _: object) -> bytes:
        return request

    async def echo_all(_: object, context: grpc.aio.ServicerContext) -> None:
        while isinstance(message := await context.read(), bytes):
            await context.write(message)

    worker = {"Describe": grpc.unary_unary_rpc_method_handler(echo)}
    handover = {"Transfer": grpc.stream_stream_rpc_method_handler(echo_all)}
    server.add_generic_rpc_handlers(
        (
            grpc.method_handlers_generic_handler("twostroke.v1.Worker", worker),
            grpc.method_handlers_generic_handler("twostroke.v1.Handover", handover),
        )
    )
    address = f"127.0.0.1:{add_port(server, '127.0.0.1:0', tls.server_credentials())}"
    guard.audience = address
    await server.start()
    return server, address, guard


async def describe(address: str, tls: TlsIdentity | None, callee: Caller = Caller.WORKER) -> bytes:
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with InsideChannel(address, KEY, options, tls, callee) as channel:
        return await channel.unary_unary("/twostroke.v1.Worker/Describe")(b"hello", timeout=10)


async def test_why_a_peer_refuses_is_said(monkeypatch):
    monkeypatch.setattr(identity, "DIAGNOSE_EVERY_S", 0.0)
    ours, other = Authority.new(DEPLOYMENT), Authority.new(DEPLOYMENT)
    server, address, guard = await serve(Shown(issued(ours, Caller.WORKER), Caller.WORKER))
    good = Shown(issued(ours, Caller.ROUTER))
    try:
        assert await describe(address, good) == b"hello"
        expired = Shown(issued(ours, Caller.ROUTER, 1, ago_days=3))
        stranger = Shown(issued(other, Caller.ROUTER, trusting=ours))
        distrustful = Shown(issued(ours, Caller.ROUTER, trusting=other))
        for tls, words in (
            (expired, "refuses our certificate: certificate has expired"),
            (stranger, "refuses our certificate: unable to get local issuer"),
            (distrustful, "its certificate is not valid for us"),
            (None, "may want one"),
        ):
            with pytest.raises(HandshakeRefused, match=words) as caught:
                await describe(address, tls)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert address in caught.value.details()
            assert tls is None or tls.num_failed == 1
        with pytest.raises(HandshakeRefused, match="certificate is not valid for"):
            await describe(address, good, Caller.ROUTER)  # a worker answers where a router should
        with pytest.raises(grpc.aio.AioRpcError, match="is not for a worker") as refused:
            await describe(address, Shown(issued(ours, Caller.WORKER)))
        assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
        elsewhere = Authority("elsewhere", ours.certificate, ours._key)
        with pytest.raises(grpc.aio.AioRpcError, match="nobody of the deployment"):
            await describe(address, Shown(issued(elsewhere, Caller.ROUTER)))
        assert guard.refusals.total() == 2
    finally:
        await server.stop(None)


async def test_a_server_that_is_gone_is_not_called_a_refusal():
    tls = Shown(issued(Authority.new(DEPLOYMENT), Caller.ROUTER))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await describe("127.0.0.1:1", tls)
    assert not isinstance(caught.value, HandshakeRefused)
    assert tls.num_failed == 0


async def test_streams_run_on_while_authority_and_certificates_change(tmp_path):
    settings = made(tmp_path)
    server, address, guard = await serve(TlsIdentity(settings, Caller.WORKER))
    caller = TlsIdentity(settings, Caller.WORKER)
    first = caller.current()
    try:
        async with InsideChannel(address, KEY, None, caller) as channel:
            transfer = channel.stream_stream("/twostroke.v1.Handover/Transfer")
            before = channel._channel
            old = transfer()
            await old.write(b"0")
            assert await old.read() == b"0"
            for round_ in range(3):
                renew_authority(tmp_path)
                new = transfer()
                await new.write(b"new authority")
                assert await new.read() == b"new authority"
                renew(tmp_path, 10)
                other = transfer()
                for message in (b"%d" % round_, b"more"):
                    for call in (old, new, other):
                        await call.write(message)
                        assert await call.read() == message
                for call in (new, other):
                    await call.done_writing()
                    assert await call.read() is grpc.aio.EOF
            assert first.ca.split(b"\n\n")[0] not in caller.current().ca  # the first authority is trusted no more
            assert before in channel._num_calls
            await old.done_writing()
            assert await old.read() is grpc.aio.EOF
            await old.code()
            assert before not in channel._num_calls  # and its connection is closed
        with pytest.raises(HandshakeRefused):
            await describe(address, Shown(first))  # what was good in the beginning is not now
        assert guard.refusals.total() == 0
    finally:
        await server.stop(None)


async def test_certificates_of_one_run_are_texts_and_fit_together():
    run = of_one_run("a-run")
    worker, router = (TlsIdentity(run[caller], caller) for caller in (Caller.WORKER, Caller.ROUTER))
    assert "PRIVATE" not in repr(run)
    server, address, _ = await serve(worker)
    try:
        assert await describe(address, router) == b"hello"
    finally:
        await server.stop(None)


def test_settings_name_a_file_by_role(tmp_path):
    settings = made(tmp_path)
    assert settings.of(Caller.WORKER).cert.endswith("worker.pem")
    assert folder_settings(tmp_path).of(Caller.ROUTER).key.endswith("router.key")
