"""Doors inside with certificates: each is tried with every role, with none, and with certificates that are no good."""

import asyncio
import importlib.util
import sys
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import psutil
import pytest
import yaml
from support.clusters.certificates import DEPLOYMENT, Shown, issued, made
from support.clusters.sockets import check_listeners, declared_by, listeners, speaks_tls
from support.engines.workers import CLUSTER_KEY

from twostroke.cluster.authority import Authority, _loaded, renew, renew_authority
from twostroke.cluster.certificates import certificates_of
from twostroke.cluster.config import load_config
from twostroke.cluster.launch.launcher import Site
from twostroke.cluster.launch.process import ProcessLauncher, _config_text
from twostroke.cluster.placement import ProcessPlan
from twostroke.core.errors import ConfigError
from twostroke.core.inside import InsideChannel
from twostroke.core.ports import free_ports
from twostroke.core.request import Role
from twostroke.core.tls.callers import ALLOWED, Caller
from twostroke.core.tls.identity import HandshakeRefused, TlsIdentity
from twostroke.kv.config import CacheConfig
from twostroke.kv.handover.transports.grpc import FETCH, PAIR, TRANSFER
from twostroke.kv.keys import proof_key
from twostroke.protos import common_pb2
from twostroke.router.config import RouterConfig
from twostroke.router.process import RouterProcess

KEY = proof_key(CLUSTER_KEY)
ANNOUNCE = "/twostroke.v1.Announce/Announce"
STREAMS = {TRANSFER, PAIR, ANNOUNCE, "/twostroke.v1.Worker/Session"}
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
ROUTERS = [path for path in ALLOWED if path.startswith(("/twostroke.v1.Announce/", "/twostroke.v1.Peers/"))]
WORKERS = [path for path in ALLOWED if path not in ROUTERS and "/grpc." not in path]


async def code_of(channel: grpc.aio.Channel, path: str) -> tuple[grpc.StatusCode | None, str]:
    """How a call ends that says nothing; None: it is served."""
    try:
        if path in STREAMS or path == REFLECTION:
            call: Any = channel.stream_stream(path)()
            served = asyncio.ensure_future(call.read())
        elif path in (FETCH, "/twostroke.v1.Worker/Watch"):
            call = channel.unary_stream(path)(b"")
            served = asyncio.ensure_future(call.read())
        else:
            call = channel.unary_unary(path)(b"", timeout=10)
            served = asyncio.ensure_future(_answer(call))
        done, _ = await asyncio.wait([served], timeout=0.5)
        if not done:  # it waits for a message: it was let in
            call.cancel()
            served.cancel()
            await asyncio.gather(served, return_exceptions=True)
            return None, ""
        served.result()
        call.cancel()
    except grpc.aio.AioRpcError as error:
        return error.code(), str(error.details())
    return None, ""


async def _answer(call: Any) -> Any:
    return await call


async def try_every_role(address: str, authority: Authority, callee: Caller, paths: list[str]) -> None:
    for caller in Caller:
        tls = Shown(issued(authority, caller))
        async with InsideChannel(address, KEY, [("grpc.use_local_subchannel_pool", 1)], tls, callee) as channel:
            for path in paths:
                if path.endswith("/Drain") and caller is Caller.OPERATOR:
                    continue  # it would end the others
                code, details = await code_of(channel, path)
                assert (code is grpc.StatusCode.PERMISSION_DENIED) == (caller not in ALLOWED[path]), (caller, path)
                if code is grpc.StatusCode.PERMISSION_DENIED:
                    assert f"{path} is not for a {caller}" in details


async def try_bad_certificates(address: str, authority: Authority, callee: Caller, path: str) -> None:
    other = Authority.new(DEPLOYMENT)
    good = next(iter(ALLOWED[path]))
    bad = {
        "expired": Shown(issued(authority, good, 1, ago_days=3)),
        "of another authority": Shown(issued(other, good, trusting=authority)),
        "signed by itself": Shown(issued(other, good)),
        "none": None,
    }
    for what, tls in bad.items():
        async with InsideChannel(address, KEY, [("grpc.use_local_subchannel_pool", 1)], tls, callee) as channel:
            with pytest.raises(HandshakeRefused) as caught:
                await channel.stream_stream(path)().read()
            assert address in caught.value.details(), what
    options = [
        ("grpc.ssl_target_name_override", f"{callee}.{DEPLOYMENT}.twostroke.internal"),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    credentials = grpc.ssl_channel_credentials(authority.pem)  # TLS, but no certificate
    async with grpc.aio.secure_channel(address, credentials, options=options) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await channel.stream_stream(path)().read()
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_worker_lets_each_role_do_its_own(start_worker, tmp_path):
    worker = await start_worker(Role.DECODE, tls=made(tmp_path))
    authority = _loaded(tmp_path)
    await try_every_role(worker.address, authority, Caller.WORKER, [*WORKERS, REFLECTION])
    assert worker.counters["calls_refused"] > 0
    await try_bad_certificates(worker.address, authority, Caller.WORKER, TRANSFER)
    assert not worker.is_draining


async def test_every_socket_of_a_worker_with_certificates_speaks_tls(start_worker, tmp_path):
    before = {each.port for each in listeners([psutil.Process()])}
    worker = await start_worker(Role.DECODE, tls=made(tmp_path))
    found = [each for each in listeners([psutil.Process()]) if each.port not in before]
    addresses = {"address": worker.address, "metrics_address": worker.metrics_address}
    assert check_listeners(found, declared_by({"workers": [{"worker_id": "decode-0"} | addresses]})) == []
    assert {each.port for each in found if await asyncio.to_thread(speaks_tls, each.port)} == {e.port for e in found}
    plain = await start_worker(Role.PREFILL)
    assert not await asyncio.to_thread(speaks_tls, int(plain.metrics_address.rpartition(":")[2]))


async def test_the_routers_internal_port_lets_each_role_do_its_own(tmp_path):
    http, grpc_port, internal = free_ports("127.0.0.1", 3)
    settings = RouterConfig(port=http, grpc_port=grpc_port, internal_port=internal)
    router = RouterProcess(settings, CLUSTER_KEY, tls=made(tmp_path))
    await router.start()
    try:
        authority = _loaded(tmp_path)
        address = f"127.0.0.1:{internal}"
        await try_every_role(address, authority, Caller.ROUTER, ROUTERS)
        await try_bad_certificates(address, authority, Caller.ROUTER, ANNOUNCE)
        exported = router._flow.metrics.render("")[0].decode()
        num_refused = sum(len(Caller) - len(ALLOWED[path]) for path in ROUTERS)
        assert f"twostroke_inside_calls_refused {num_refused:.1f}" in exported
    finally:
        await router.stop(0.0)


async def test_no_request_fails_while_authority_and_certificates_change(start_worker, router_of, make_prompt, tmp_path):
    tls = made(tmp_path)
    grpc_only = CacheConfig(tokens=8192, frame_bytes=8192, transport="grpc")
    prefill = await start_worker(Role.PREFILL, tls=tls, cache=grpc_only)
    decode = await start_worker(Role.DECODE, tls=tls, cache=grpc_only)
    hand = await router_of(decode)
    answers = []
    for turn in range(12):
        name = f"r{turn}"
        answers.append(await hand.submit(name, make_prompt(40, turn), peers=[prefill], sampling={"max_tokens": 16}))
        if turn % 4 == 1:
            renew_authority(tmp_path)
        if turn % 4 == 3:
            renew(tmp_path, 10)
        if turn % 2:
            await answers[-1].ended()
    for answer in answers:
        await answer.ended()
        assert answer.end.reason == common_pb2.FINISH_REASON_LENGTH
        assert not answer.end.handover.local_reason  # each prompt was handed over
    assert decode._tls.num_failed == prefill._tls.num_failed == 0
    assert decode.counters["calls_refused"] == prefill.counters["calls_refused"] == 0


# ---------------------------------------------------------------- which certificates a cluster gets


def test_a_cluster_on_loopback_has_no_certificates_and_says_so():
    found = certificates_of(load_config())
    assert found.by_role is None
    assert "loopback only" in found.remark


@pytest.mark.parametrize(
    "flags", [{"router.host": "0.0.0.0", "router.insecure": True}, {"cluster.ray_address": "10.0.0.1:6379"}]
)
def test_what_may_leave_this_machine_gets_certificates_for_this_run(flags):
    config = load_config(flags=flags)
    found, again = certificates_of(config), certificates_of(config)
    assert found.by_role is not None
    assert again.by_role is not None
    assert found.by_role[Caller.WORKER].ca != again.by_role[Caller.WORKER].ca
    for caller in Caller:
        assert TlsIdentity(found.by_role[caller], caller).own is caller
        assert "PRIVATE KEY" not in repr(found.by_role[caller])


def test_without_the_library_a_cluster_that_needs_certificates_does_not_start(monkeypatch):
    monkeypatch.setitem(sys.modules, "cryptography", None)
    monkeypatch.delitem(sys.modules, "twostroke.cluster.authority")
    with pytest.raises(ConfigError, match=r"twostroke\[certs\]"):
        certificates_of(load_config(flags={"cluster.ray_address": "10.0.0.1:6379"}))
    public = load_config(flags={"router.host": "0.0.0.0", "router.insecure": True})
    assert "not encrypted" in certificates_of(public).remark


def test_a_child_process_gets_the_certificate_of_its_role_by_its_standard_input_alone():
    config = load_config(flags={"router.host": "0.0.0.0", "router.insecure": True})
    certificates = certificates_of(config)
    site = Site(config, "", "", (1,), certificates.by_role)
    launcher = ProcessLauncher(site)
    try:
        for member, caller in (
            (ProcessPlan("r", "router"), Caller.ROUTER),
            (ProcessPlan("w", "worker"), Caller.WORKER),
        ):
            given = yaml.safe_load(_config_text(site, member))["cluster"]["tls"]
            assert given["cert"] == certificates.by_role[caller].cert
        written = [path.read_text() for path in Path(launcher._directory).rglob("*") if path.is_file()]
        assert not any("PRIVATE KEY" in text for text in written)
    finally:
        launcher._scratch.remove()


def test_the_sdk_needs_no_library_for_certificates():
    assert importlib.util.find_spec("twostroke.client") is not None
    code = "import sys; sys.modules['cryptography'] = None; import twostroke.client.client"
    assert __import__("subprocess").run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
