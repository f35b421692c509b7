"""All workers of a cluster restart under load, with room for a second one of each and without."""

import pytest
from support.clusters.asking import Asking
from support.clusters.supervised import BUSY_MACHINE_S, supervised

from twostroke.client.async_client import AsyncClient
from twostroke.core.errors import ConfigError, Unavailable
from twostroke.worker.machine import MachineFacts


@pytest.mark.campaign
@pytest.mark.timeout(600)
async def test_all_workers_restart_under_load_and_no_stream_notices(tiny_checkpoint):
    said: list[str] = []
    async with (
        supervised(tiny_checkpoint) as supervisor,
        AsyncClient(supervisor.grpc_address, timeout_s=BUSY_MACHINE_S) as client,
    ):
        before = {w["worker_id"]: w["pid"] for w in (await client.cluster())["workers"]}
        async with Asking(client, 3) as asking:
            await asking.more(3)
            await supervisor.changes.restart_all(said.append)
            await asking.more(3)
        after = {w["worker_id"]: w["pid"] for w in (await client.cluster())["workers"] if w["state"] == "live"}
        assert set(after) == {"prefill-1", "decode-1"}
        assert not set(after.values()) & set(before.values())
        assert set(supervisor.members) == {"router-0", "prefill-1", "decode-1"}
        counters = (await client.cluster())["counters"]
        assert counters["rejected"] == 0  # `workers_lost` may not be: a starved machine loses one for a moment
    assert [line.partition(",")[0] for line in said if "starts" in line] == [
        "[1/2] prefill-1 starts",
        "[2/2] decode-1 starts",
    ]


@pytest.mark.campaign
@pytest.mark.timeout(600)
async def test_routers_restart_after_the_workers_and_requests_go_on(tiny_checkpoint):
    said: list[str] = []
    async with supervised(tiny_checkpoint, **{"cluster.prefill": 0, "cluster.routers": 2}) as supervisor:
        async with AsyncClient(supervisor.grpc_address, timeout_s=BUSY_MACHINE_S) as client:
            before = {router["name"]: router["pid"] for router in (await client.cluster())["routers"]}
        async with (
            AsyncClient(supervisor.grpc_address, timeout_s=BUSY_MACHINE_S) as client,
            Asking(client, 3) as asking,
        ):
            await supervisor.changes.restart_all(said.append)
            await asking.more(3)
        async with AsyncClient(supervisor.grpc_address, timeout_s=BUSY_MACHINE_S) as client:
            after = {router["name"]: router["pid"] for router in (await client.cluster())["routers"]}
        assert set(after) == set(before) == {"router-0", "router-1"}
        assert not set(after.values()) & set(before.values())
    assert [line for line in said if "router" in line] == [
        "[2/3] router-0 drains; the other routers take new connections",
        "[2/3] router-0 serves again",
        "[3/3] router-1 drains; the other routers take new connections",
        "[3/3] router-1 serves again",
    ]


@pytest.mark.timeout(600)
async def test_without_room_workers_restart_in_their_places(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr("twostroke.cluster.operations.changes.machine_facts", lambda: MachineFacts(1, 1 << 20))
    said: list[str] = []
    flags = {"cluster.launcher": "inprocess", "cluster.decode": 2}
    async with (
        supervised(tiny_checkpoint, **flags) as supervisor,
        AsyncClient(supervisor.grpc_address, timeout_s=BUSY_MACHINE_S) as client,
    ):
        before = {w["worker_id"]: w["incarnation"] for w in (await client.cluster())["workers"]}
        async with Asking(client, 2) as asking:
            await supervisor.changes.restart_all(said.append)
            await asking.more(2)
        after = {w["worker_id"]: w["incarnation"] for w in (await client.cluster())["workers"]}
        assert set(after) == set(before) == {"prefill-0", "decode-0", "decode-1"}
        assert all(after[name] != before[name] for name in before)
        assert sum("restarts in its place: the machine has 1 MiB free" in line for line in said) == 3
        assert [supervisor._members.book.restarts(name) for name in before] == [0, 0, 0]  # wanted, so no back-off


@pytest.mark.timeout(600)
async def test_where_nobody_else_would_answer_it_is_refused_and_all_stays(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr("twostroke.cluster.operations.changes.machine_facts", lambda: MachineFacts(1, 1 << 20))
    async with supervised(tiny_checkpoint, **{"cluster.launcher": "inprocess", "cluster.prefill": 0}) as supervisor:
        with pytest.raises(ConfigError, match="combined-0 alone decodes"):
            await supervisor.changes.restart_all(lambda _: None)
        assert not supervisor.changes.rolling
        async with AsyncClient(supervisor.grpc_address) as client:
            assert (await client.generate("hello", max_tokens=3, ignore_eos=True)).usage.completion_tokens == 3


@pytest.mark.timeout(600)
async def test_a_new_worker_that_does_not_serve_goes_and_the_old_one_stays(tiny_checkpoint, monkeypatch):
    flags = {"cluster.launcher": "inprocess", "cluster.prefill": 0, "cluster.ready_timeout_s": 60.0}
    async with supervised(tiny_checkpoint, **flags) as supervisor:

        async def never(*_: object) -> None:
            """A process that exists and never serves."""

        monkeypatch.setattr(supervisor._launcher, "start", never)
        cluster = supervisor.config.cluster.model_copy(update={"ready_timeout_s": 0.5})
        supervisor.config = supervisor.config.model_copy(update={"cluster": cluster})
        with pytest.raises(Unavailable, match=r"combined-1 does not serve after 0.5 s"):
            await supervisor.changes.restart_all(lambda _: None)
        assert set(supervisor.members) == {"router-0", "combined-0"}
        async with AsyncClient(supervisor.grpc_address) as client:
            assert (await client.generate("hello", max_tokens=3, ignore_eos=True)).usage.completion_tokens == 3
