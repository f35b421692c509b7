"""Several routers over one set of workers: joined reports and metrics, questions to the others, shared ports."""

from __future__ import annotations

import asyncio
import json
import socket
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from support.clusters.flow_cluster import until
from support.clusters.several_routers import KEY, KEYS, Routers
from support.clusters.steady_routers import pair
from support.fakes.found import Found
from support.fakes.short_worker import MODEL

from twostroke.client.async_client import AsyncClient
from twostroke.core.errors import ConfigError
from twostroke.core.ports import bound_socket, check_port, free_ports
from twostroke.router.peers.joined import joined_metrics, joined_report
from twostroke.router.peers.peers import Peers
from twostroke.router.process import RouterProcess


@asynccontextmanager
async def routers(number: int = 2) -> AsyncIterator[Routers]:
    found = Routers(number)
    async with AsyncExitStack() as stack:
        for index in range(number):
            process = RouterProcess(found.settings(index), KEY)
            await process.start()
            stack.push_async_callback(process.stop, 0.0)
            found.processes.append(process)
        worker = found.worker
        await worker.start(f"127.0.0.1:{found.inside[0]}")
        stack.push_async_callback(worker.die)
        for port in found.inside[1:]:
            await worker.announce_also(f"127.0.0.1:{port}")
        async with asyncio.timeout(60):
            while not all(p._flow.is_ready for p in found.processes):
                await asyncio.sleep(0.01)
        yield found


async def test_whichever_router_answers_a_request_is_explained_and_counted():
    async with routers() as both:
        async with AsyncClient(f"127.0.0.1:{both.grpc_port}", api_key=KEYS[0]) as client:
            await client.generate("hello", model=MODEL, request_id="r1")
        answered = Counter[str]()
        for _ in range(24):
            explained = await both.get("/v1/requests/r1/explain")
            assert explained.json()["state"] == "finished"
            assert (await both.get("/v1/requests/r1/explain", KEYS[1])).status_code == 404, "another tenant's"
            report = (await both.get("/v1/cluster")).json()
            answered[report["router"]["name"]] += 1
            assert {router["name"] for router in report["routers"]} == {"router-0", "router-1"}
            assert all(router["workers"] == {"w0": "live"} for router in report["routers"])
            assert report["counters"]["accepted"] == 1
            lines = (await both.get("/metrics")).text.splitlines()
            finished = [line for line in lines if line.startswith('twostroke_requests_total{outcome="finished"')]
            assert sum(float(line.split()[-1]) for line in finished) == 1
            assert len(finished) == 2
        assert len(answered) == 2, "24 connections reach both"


async def test_names_of_requests_differ_between_routers():
    async with routers(3) as three:
        lives = {(p._flow.router_id, p._flow.cluster()["router"]["incarnation"]) for p in three.processes}
        assert len(lives) == 3
        assert len({life for _, life in lives}) == 3


async def test_while_a_router_drains_the_others_take_all_new_connections():
    async with pair() as both:
        both.worker.behaviour.hold_first = asyncio.Event()
        clients = [AsyncClient(f"127.0.0.1:{both.grpc_port}", api_key=KEYS[0]) for _ in range(8)]
        asking = [asyncio.create_task(client.generate("hello", model=MODEL, max_tokens=2)) for client in clients]
        counts = lambda: [p._flow.cluster()["router"]["in_flight_requests"] for p in both.processes]  # noqa: E731
        await until(lambda: sum(counts()) == len(clients), 60.0)
        drained = both.processes[0 if counts()[0] else 1]
        stopping = asyncio.create_task(drained.stop(20.0))
        await until(lambda: drained._flow.refusing)
        for _ in range(16):
            assert (await both.get("/health")).status_code == 200
            async with AsyncClient(f"127.0.0.1:{both.grpc_port}", api_key=KEYS[0]) as client:
                await client.models()
        assert not stopping.done()
        both.worker.behaviour.hold_first.set()
        assert len(await asyncio.gather(*asking)) == len(clients), "what it had ends there"
        await stopping
        for client in clients:
            await client.close()


async def test_a_router_that_ends_takes_only_its_own_connections():
    async with routers() as both:
        await both.processes[0].stop(0.0)
        for _ in range(12):
            report = (await both.get("/v1/cluster")).json()
            assert [router["name"] for router in report["routers"]] == ["router-1"]
            assert (await both.get("/health")).status_code == 200


async def test_a_router_that_joins_others_hears_their_workers_before_clients_come():
    async with routers() as both:
        await both.processes[0].stop(0.0)
        starting = asyncio.create_task((again := RouterProcess(both.settings(0), KEY)).start())
        await asyncio.sleep(0.5)
        assert not starting.done(), "it waits for the worker that the other router has"
        await both.worker.announce_also(f"127.0.0.1:{both.inside[0]}")  # workers try again and again; this one once
        while not starting.done():
            assert (await both.get("/health")).status_code == 200
        await starting
        assert again._flow.is_ready
        await again.stop(0.0)


async def test_routers_that_come_and_go_are_asked_while_they_are_found_and_scraped_by_themselves():
    async with routers() as both:
        alone = both.settings(0).model_copy(update={"peers": (), "port": 0, "grpc_port": 0, "internal_port": 0})
        source = Found()
        process = RouterProcess(alone, KEY, sources=[source])
        await process.start()
        assert len(process._front.peers) == 0
        assert [router["name"] for router in (await process._front.cluster())["routers"]] == [alone.name]
        source.tell(f"127.0.0.1:{both.inside[1]}")
        async with asyncio.timeout(30):  # one that answers late is left out
            while len((told := await process._front.cluster())["routers"]) < 2:
                await asyncio.sleep(0.05)
        assert [router["name"] for router in told["routers"]] == [alone.name, "router-1"]
        text = (await process._front.metrics(""))[0].decode()
        assert 'twostroke_discovery_addresses{source="found"} 1.0' in text
        assert 'router="router-1"' not in text, "whoever scrapes finds it as well"
        source.tell()
        assert process._front.report()["router"]["num_routers"] == 1
        await process.stop(0.0)


async def test_a_stranger_learns_nothing_from_a_router():
    async with routers(1) as one:
        stranger = Peers([f"127.0.0.1:{one.inside[0]}"], b"another key".ljust(32))
        assert await stranger.reports() == []
        assert await stranger.explain("key-0", "r1") is None
        assert not await stranger.abort("key-0", "r1")
        await stranger.close()


async def test_a_peer_that_is_silent_or_absent_is_left_out():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        (absent,) = free_ports("127.0.0.1", 1)
        peers = Peers([f"127.0.0.1:{silent.getsockname()[1]}", f"127.0.0.1:{absent}"], b"k" * 32)
        async with asyncio.timeout(60):
            assert await peers.reports() == []
            assert await peers.metrics() == []
        await peers.close()


def test_a_shared_port_is_taken_for_those_who_do_not_share_it():
    (port,) = free_ports("127.0.0.1", 1)
    with bound_socket("127.0.0.1", port, "--port", shared=True) as listener:
        listener.listen()
        check_port("127.0.0.1", port, "--port", shared=True)
        with pytest.raises(ConfigError, match=f"port {port} is in use"):
            check_port("127.0.0.1", port, "--port")


REPORT: dict[str, Any] = {
    "router": {"name": "a", "incarnation": "1"},
    "workers": [{"worker_id": "w", "state": "live"}],
    "counters": {"accepted": 2, "workers_lost": 3},
    "prompts": {"count": 1, "tokens": 10},
}


@pytest.mark.parametrize(
    "other",
    [
        {},
        {"router": {}},
        {**REPORT, "workers": [{}]},
        {**REPORT, "counters": []},
        {**REPORT, "prompts": 3},
        {**REPORT, "router": {"name": "b"}},
    ],
)
def test_a_report_of_another_form_is_left_out(other: dict[str, Any]):
    assert json.loads(json.dumps(joined_report(REPORT, [other])))["routers"] == [
        {"name": "a", "incarnation": "1", "workers": {"w": "live"}}
    ]


def test_counts_are_sums_but_those_of_what_every_router_sees():
    other = {**REPORT, "router": {"name": "b", "incarnation": "2"}, "counters": {"accepted": 5, "workers_lost": 1}}
    joined = joined_report(REPORT, [other | {"prompts": {"count": 2, "tokens": 5}}])
    assert joined["counters"] == {"accepted": 7, "workers_lost": 3}
    assert joined["prompts"] == {"count": 3, "tokens": 15}


def test_metrics_of_two_routers_differ_in_one_label():
    text = '# HELP n Some.\n# TYPE n counter\nn_total{x="1"} 4.0\n# EOF\n'
    body, kind = joined_metrics([("a", text), ("b", text)], "")
    assert kind.startswith("text/plain")
    assert body.decode().splitlines()[-2:] == ['n_total{router="a",x="1"} 4.0', 'n_total{router="b",x="1"} 4.0'] or (
        body.decode().splitlines()[-2:] == ['n_total{x="1",router="a"} 4.0', 'n_total{x="1",router="b"} 4.0']
    )
