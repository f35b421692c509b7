"""The router and those who do not know the cluster's key: they join nothing, and are told nothing."""

from __future__ import annotations

import asyncio

import pytest
from support.clusters.flow_cluster import cluster, collect, expected, request, tokens_of, until
from support.fakes.fake_worker import PROOF_KEY, FakeWorker

from twostroke.core import errors, inside
from twostroke.core.guard import Guard
from twostroke.router.workers.links import WorkerLink

OTHER_KEY = b"q" * 32


async def test_a_worker_that_announces_itself_without_the_key_is_never_live() -> None:
    async with cluster(worker_patience_s=0.05) as c:
        impostor = FakeWorker("a", proof_key=OTHER_KEY, load={"prefill_ms_per_token": 1e-6})
        c.workers.append(await impostor.start(c.internal))
        await until(lambda: c.flow.cluster()["router"]["calls_refused"] >= 2)
        assert c.flow.cluster()["workers"] == []
        with pytest.raises(errors.Unavailable):
            await collect(c.flow, request())
        await c.add(FakeWorker("b"))
        assert tokens_of(await collect(c.flow, request("r2"))) == expected(5)
        assert not impostor.submits
        assert not impostor.sessions
        told = c.flow.cluster()["router"]["last_refused"]
        assert "127.0.0.1" in told
        assert "the cluster's key differs" in told


@pytest.mark.parametrize("guards", [[], [Guard(OTHER_KEY, "a")]], ids=["proves nothing", "another key"])
async def test_who_took_a_workers_address_gets_no_order_and_is_not_believed(guards, monkeypatch, caplog) -> None:
    """The announcement is a worker's own; somebody else answers at its address."""
    monkeypatch.setattr(inside, "ANSWER_S", 0.1)
    refused: list[BaseException] = []
    complain = WorkerLink._complain
    monkeypatch.setattr(WorkerLink, "_complain", lambda *said: (refused.append(said[1]), complain(*said)))
    async with cluster(worker_patience_s=0.05) as c:
        impostor = FakeWorker("a", held=[b"i" * 16])
        impostor.guards = guards
        c.workers.append(await impostor.start(c.internal))
        async with asyncio.timeout(60):
            while "a gets no orders" not in caplog.text:
                await asyncio.sleep(0.01)
        with pytest.raises(errors.Unavailable):
            await collect(c.flow, request())
        assert c.state("a") == "joining"
        assert c.flow.cluster()["router"]["prefix_blocks"] == 0
        assert not impostor.submits
        assert not impostor.sessions
        assert "TWOSTROKE__CLUSTER__KEY" in caplog.text
        assert PROOF_KEY.decode() not in caplog.text
        await until(lambda: len(refused) > 3)
        assert caplog.text.count("a gets no orders") == 1


@pytest.mark.parametrize("address", ["unix:/run/x", "http://10.0.0.1:80", "a:0", "a"])
async def test_an_announced_address_that_is_none_is_refused(address, caplog) -> None:
    async with cluster() as c:
        worker = FakeWorker("a")
        honest = worker.info

        def lying():
            info = honest()
            info.address = address
            return info

        worker.info = lying  # type: ignore[method-assign]
        c.workers.append(await worker.start(c.internal))
        await asyncio.sleep(0.1)
        assert c.flow.cluster()["workers"] == []
        # Ours: grpc.aio may still report the closed loop of an earlier test here.
        assert not [told for told in caplog.records if told.exc_info and told.name.startswith("twostroke")]
