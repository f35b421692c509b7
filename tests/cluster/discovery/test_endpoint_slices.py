"""Discovery by EndpointSlices: the official client against a stand-in API server that fails in every way."""

import asyncio
import contextlib
import json
import logging
import threading
import time
from pathlib import Path

import pytest
from support.clusters.flow_cluster import until
from support.deploy.kube.access import token_of
from support.deploy.kube.api_server import ApiServer
from support.deploy.kube.slices import endpoint, endpoint_slice
from support.deploy.kube.store import Store
from support.fakes.ear import KEY, Ear

from twostroke.cluster.discovery import endpoint_slices
from twostroke.cluster.discovery.endpoint_slices import EndpointSlices, ServiceAt, Timing
from twostroke.cluster.discovery.slices import Wanted
from twostroke.cluster.discovery.watching import Waits
from twostroke.cluster.kubernetes import connection
from twostroke.protos import common_pb2
from twostroke.worker.announcer import Announcer, Retry

pytest.importorskip("kubernetes", reason="pip install kubernetes")

QUICK = Timing(watch_s=60.0, waits=Waits(first_s=0.02, longest_s=0.1))
SHORT = Timing(watch_s=1.0, margin_s=0.3, waits=Waits(first_s=0.02, longest_s=0.1))
RIGHTS = {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["get", "list", "watch"]}


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    server = ApiServer(Store())
    file = tmp_path / "kubeconfig"
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(file))

    def be(account: str) -> None:
        file.write_text(server.kubeconfig(token_of("default", account) if account else ""))

    server.be = be  # type: ignore[attr-defined]
    be("")
    yield server
    server.close()


def tell(api: ApiServer, name: str, *hosts: str, service: str = "routers", **more) -> None:
    """Make or change a slice."""
    api.store.put("endpointslices", endpoint_slice(name, service, [endpoint(f"p-{h}", h) for h in hosts], **more))


@contextlib.asynccontextmanager
async def following(timing: Timing = QUICK, port: int | str = 8002, **wanted):
    """A source that is followed, with every set that it told."""
    at = ServiceAt("k8s://routers.default:8002", "routers", "default", Wanted(port, **wanted))
    source, told = EndpointSlices(at, timing), list[frozenset[str]]()

    async def follow() -> None:
        async for found in source.follow():
            told.append(found)

    task = asyncio.create_task(follow())
    try:
        yield source, told
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_change_comes_by_the_watch_without_another_list(api: ApiServer):
    tell(api, "a", "10.0.0.1")
    tell(api, "x", "10.9.9.9", service="others")
    tell(api, "x", "10.9.9.8", namespace="elsewhere")
    async with following() as (source, told):
        await until(lambda: told == [{"10.0.0.1:8002"}])
        await until(lambda: api.calls["watch", "endpointslices"] == 1)
        tell(api, "b", "10.0.0.2")
        await until(lambda: source.addresses == {"10.0.0.1:8002", "10.0.0.2:8002"})
        tell(api, "a")
        await until(lambda: told[-1] == {"10.0.0.2:8002"})
        api.store.remove("endpointslices", "default", "b")
        await until(lambda: told[-1] == frozenset())
        assert "no endpoint" in source.problem
        tell(api, "a", "10.0.0.7")
        await until(lambda: told[-1] == {"10.0.0.7:8002"})
        assert not source.problem
    assert api.calls == {("list", "endpointslices"): 1, ("watch", "endpointslices"): 1}


async def test_the_servers_end_of_a_watch_loses_nothing_and_needs_no_list(api: ApiServer):
    tell(api, "a", "10.0.0.1")
    async with following(SHORT) as (_, told):
        await until(lambda: api.calls["watch", "endpointslices"] >= 3)
        tell(api, "a", "10.0.0.2")
        await until(lambda: told[-1] == {"10.0.0.2:8002"})
    assert api.calls["list", "endpointslices"] == 1


async def test_a_forgotten_version_is_answered_with_another_list(api: ApiServer):
    tell(api, "a", "10.0.0.1")
    async with following(SHORT) as (source, told):
        await until(lambda: api.calls["watch", "endpointslices"] == 1)
        api.silent.set()  # the open watch does not tell the change
        tell(api, "a", "10.0.0.2")
        api.horizon = api.store.version
        api.silent.clear()
        await until(lambda: told[-1] == {"10.0.0.2:8002"})
        assert api.calls["list", "endpointslices"] >= 1
        api.refusals.append(("watch", 410))  # some servers refuse the call itself
        lists = api.calls["list", "endpointslices"]
        await until(lambda: api.calls["list", "endpointslices"] > lists)
        assert not source.problem


async def test_a_watch_that_hangs_is_ended_by_our_own_clock(api: ApiServer):
    tell(api, "a", "10.0.0.1")
    async with following(SHORT) as (source, told):
        await until(lambda: api.calls["watch", "endpointslices"] == 1)
        api.silent.set()
        tell(api, "a", "10.0.0.2")
        await until(lambda: told[-1] == {"10.0.0.2:8002"})  # by the list after it
        assert source.addresses == {"10.0.0.2:8002"}
        assert api.calls["list", "endpointslices"] >= 2


async def test_while_the_api_server_is_away_the_last_addresses_stay(api: ApiServer, caplog: pytest.LogCaptureFixture):
    tell(api, "a", "10.0.0.1")
    async with following() as (source, told):
        await until(lambda: api.calls["watch", "endpointslices"] == 1)
        api.close()
        await until(lambda: "does not answer" in source.problem)
        api.store.remove("endpointslices", "default", "a")
        await asyncio.sleep(0.3)
        assert source.addresses == {"10.0.0.1:8002"}
        tell(api, "a", "10.0.0.1", "10.0.0.2")
        api.start()
        await until(lambda: told[-1] == {"10.0.0.1:8002", "10.0.0.2:8002"})
        await until(lambda: not source.problem)
    assert told == [{"10.0.0.1:8002"}, {"10.0.0.1:8002", "10.0.0.2:8002"}]
    assert not [each for each in caplog.records if each.levelno >= logging.ERROR]


async def test_a_process_that_starts_while_the_api_server_is_away_finds_it_later(api: ApiServer):
    tell(api, "a", "10.0.0.1")
    api.close()
    async with following() as (source, told):
        await until(lambda: "does not answer" in source.problem)
        assert not told
        api.start()
        await until(lambda: told == [{"10.0.0.1:8002"}])


async def test_a_server_that_refuses_is_not_asked_again_before_the_wait_is_over(api: ApiServer):
    api.refusals.append(("list", 503))
    async with following(Timing(waits=Waits(first_s=600.0, longest_s=600.0))) as (source, _):
        await until(lambda: "refuses" in source.problem)
        await asyncio.sleep(0.2)
        assert api.calls["list", "endpointslices"] == 1


async def test_a_missing_right_is_named_once_and_healed_by_a_role(api: ApiServer, caplog: pytest.LogCaptureFixture):
    tell(api, "a", "10.0.0.1")
    api.be("worker")
    async with following() as (source, told):
        await until(lambda: api.calls["list", "endpointslices"] >= 4)
        assert "get, list and watch of endpointslices" in source.problem
        lines = [each.message for each in caplog.records if "endpointslices" in each.message]
        assert len(lines) == 1
        api.store.put("roles", {"metadata": {"name": "find"}, "rules": [RIGHTS]})
        subject = {"kind": "ServiceAccount", "name": "worker", "namespace": "default"}
        binding = {"metadata": {"name": "find"}, "roleRef": {"name": "find"}, "subjects": [subject]}
        api.store.put("rolebindings", binding)
        await until(lambda: told == [{"10.0.0.1:8002"}])
        await until(lambda: not source.problem)


async def test_an_answer_that_is_no_slice_is_a_problem_and_not_the_end(api: ApiServer):
    tell(api, "a", "10.0.0.1")
    async with following() as (source, told):
        await until(lambda: api.calls["watch", "endpointslices"] == 1)
        broken = endpoint_slice("b", "routers", []) | {"endpoints": [{"addresses": 7}]}
        api.store.put("endpointslices", broken)
        await until(lambda: source.problem)
        assert source.addresses == {"10.0.0.1:8002"}
        api.store.remove("endpointslices", "default", "b")
        tell(api, "a", "10.0.0.2")
        await until(lambda: told[-1] == {"10.0.0.2:8002"})


async def test_who_stops_to_follow_leaves_no_thread_and_no_watch(api: ApiServer):
    others = set(threading.enumerate())  # of earlier tests, e.g. of one whose server hung

    def is_there() -> bool:
        return any("k8s://" in thread.name for thread in set(threading.enumerate()) - others)

    tell(api, "a", "10.0.0.1")
    async with following():
        await until(lambda: api.calls["watch", "endpointslices"] == 1)
        assert is_there()
        began_s = time.monotonic()
    assert time.monotonic() - began_s < 20.0  # the watch would have lasted a minute
    await until(lambda: not is_there())


async def test_who_stops_to_follow_while_the_watch_is_asked_for_leaves_no_thread(api: ApiServer, monkeypatch):
    was_asked, may_answer = threading.Event(), threading.Event()

    def slow(*arguments, **named):
        if named.get("watch"):
            was_asked.set()
            may_answer.wait(60.0)
        return connection.opened(*arguments, **named)

    monkeypatch.setattr(endpoint_slices, "opened", slow)
    monkeypatch.setattr(endpoint_slices, "CLOSE_S", 0.01)
    others = set(threading.enumerate())
    tell(api, "a", "10.0.0.1")
    async with following():
        await until(was_asked.is_set)
        (thread,) = (each for each in set(threading.enumerate()) - others if "k8s://" in each.name)
    may_answer.set()
    await asyncio.to_thread(thread.join, 50.0)  # the watch would have lasted a minute or more
    assert not thread.is_alive()


async def test_a_process_without_an_account_says_what_it_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none"))
    async with following() as (source, _):
        await until(lambda: "KUBECONFIG" in source.problem)


def test_an_answer_beyond_the_bound_is_refused(api: ApiServer, monkeypatch: pytest.MonkeyPatch):
    from kubernetes.client import DiscoveryV1Api

    tell(api, "a", *(f"10.0.0.{n}" for n in range(100)))
    monkeypatch.setattr(connection, "MAX_ANSWER_BYTES", 1000)
    with pytest.raises(connection.ApiAway, match="1000 bytes"):
        connection.answer_of(DiscoveryV1Api(connection.connect()).list_namespaced_endpoint_slice, "default")


async def test_a_router_pod_that_comes_is_announced_to_by_all_workers_and_one_that_goes_is_dropped(api: ApiServer):
    """Three workers and their announcers; routers at addresses that slices name, the port by its name."""
    ears, servers = [Ear(), Ear()], []
    for number, ear in enumerate(ears):
        server, address = await ear.listen(f"127.0.{number}.1:0")
        servers.append((server, address))
    hosts = [address.rpartition(":")[0] for _, address in servers]
    ports = [int(address.rpartition(":")[2]) for _, address in servers]
    tell(api, "a", hosts[0], ports={"internal": ports[0]})
    at = ServiceAt("k8s://routers.default:internal", "routers", "default", Wanted("internal"))
    retry = Retry(first_s=0.02, longest_s=0.1)
    sources = [EndpointSlices(at, QUICK) for _ in range(3)]
    announcers = [
        Announcer([], common_pb2.WorkerInfo(worker_id=f"w{n}"), KEY, retry, [source])
        for n, source in enumerate(sources)
    ]
    for announcer in announcers:
        announcer.start()

    def know(ear: Ear) -> set[str]:
        return {message.worker.worker_id for message in ear.heard if message.HasField("worker")}

    everybody = {"w0", "w1", "w2"}
    await until(lambda: know(ears[0]) == everybody)
    began_s = time.monotonic()
    tell(api, "b", hosts[1], ports={"internal": ports[1]})
    await until(lambda: know(ears[1]) == everybody)
    logging.getLogger(__name__).info("announced by all after %.3f s", time.monotonic() - began_s)
    await until(lambda: all(announcer.num_answering == 2 for announcer in announcers))

    # It goes: while it answers its stream goes on, because its requests do; then nobody tries it again.
    going = endpoint_slice(
        "a", "routers", [endpoint(f"p-{hosts[0]}", hosts[0], terminating=True)], {"internal": ports[0]}
    )
    api.store.put("endpointslices", going)
    await until(lambda: all(source.addresses == {servers[1][1]} for source in sources))
    heard = len(ears[0].heard)
    await until(lambda: len(ears[0].heard) > heard + 3)
    await servers[0][0].stop(0)
    api.store.remove("endpointslices", "default", "a")
    await until(lambda: all(announcer._tasks.keys() == {servers[1][1]} for announcer in announcers))
    assert all(announcer.num_answering == 1 for announcer in announcers)
    await asyncio.gather(*(announcer.leave() for announcer in announcers))
    assert {message.worker.worker_id for message in ears[1].heard} >= everybody
    await servers[1][0].stop(0)


def test_a_kubeconfig_of_the_stand_in_is_one(api: ApiServer):
    assert json.loads(api.kubeconfig("t"))["users"][0]["user"] == {"token": "t"}
