"""Resumable requests in Redis: adopted by another router, and unharmed by a Redis that is dead, frozen, full or mad."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import redis
from support.clusters.several_routers import KEY, KEYS
from support.clusters.steady_routers import Quick, body, events, ids_of, pair
from support.session.redis_server import redis_server

from twostroke.core.errors import InternalError
from twostroke.kv.keys import journal_key
from twostroke.router.journal.journal import Entry
from twostroke.router.journal.redis_store import RedisStore
from twostroke.router.journal.sealed import Sealer

RESUMABLE = {"x_twostroke_resumable": "1"}


def gauge(routers: Quick, name: str, index: int) -> float:
    lines = routers.processes[index]._front.metrics_here().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


async def until(there: Any, timeout_s: float = 60.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not there():
            await asyncio.sleep(0.02)


def owner_of(routers: Quick) -> int:
    """Index of the router that runs the one resumable request."""
    (index,) = [n for n, process in enumerate(routers.processes) if len(process._front.streams.journal)]
    return index


async def test_a_stream_whose_router_ended_goes_on_at_the_other_as_it_would_have():
    with redis_server() as server:
        async with pair(journal_url=server.url) as both:
            whole = await events(both, body(request_id="whole", seed=1), **RESUMABLE)
            both.worker.submits.clear()
            for process in both.processes:
                journal = process._front.streams.journal
                for entry in journal.entries():
                    journal.forget(entry)
            had = await events(both, body(seed=1), most=9, **RESUMABLE)
            gone = owner_of(both)
            await both.processes[gone].stop(0.0)
            more = await events(both, {}, last_event_id=ids_of(had)[-1])
            assert more[-1] == "data: [DONE]"
            texts = dict.fromkeys(range(2), "")
            expected = dict(texts)
            for said, stream in ((texts, had + more), (expected, whole)):
                for value in map(value_of, stream[:-2]):
                    choice = value["choices"][0]
                    said[choice["index"]] += choice["text"]
            assert texts == expected
            assert value_of(more[-2])["usage"] == value_of(whole[-2])["usage"]
            assert gauge(both, "twostroke_streams_adopted", 1 - gone) == 1
            resumed = [order for order in both.worker.submits if order.emitted_tokens]
            assert resumed, "it went on after the tokens that were there"


def value_of(event: str) -> Any:
    return json.loads(event.split("data: ")[1])


async def test_a_router_that_was_thought_dead_gives_its_stream_up():
    with redis_server() as server:
        async with pair(journal_url=server.url) as both:
            both.worker.behaviour.token_s = 0.1
            had = await events(both, body(), most=6, **RESUMABLE)
            owner = owner_of(both)
            adopter = both.processes[1 - owner]
            both.processes[owner]._front.streams.is_leaving = True  # as if it were frozen: it does not answer
            await until(lambda: gauge(both, "twostroke_journal_store_up", owner) == 1)
            started = await adopter._front.resumables.resume(
                await tenant(adopter), "r1", ids_of(had)[-1].removeprefix("r1:")
            )
            await started.rest.aclose()
            await until(lambda: gauge(both, "twostroke_streams_fenced_total", owner) == 1)
            assert len(both.processes[owner]._front.streams.journal) == 0
            await until(lambda: all(entry.is_over for entry in adopter._front.streams.journal.entries()), 60.0)


async def tenant(process: Any) -> str:
    return str(process._front.authenticate(KEYS[0]))


@pytest.mark.parametrize("how", ["killed", "frozen", "full", "mad"])
async def test_no_request_fails_for_a_broken_redis(how: str):
    options = ("--maxmemory", "1mb", "--maxmemory-policy", "noeviction") if how == "full" else ()
    with redis_server(*options) as server:
        async with madness() as mad, pair(1, journal_url=mad if how == "mad" else server.url) as one:
            first = await events(one, body(request_id="first"), **RESUMABLE)
            if how == "killed":
                server.process.kill()
            if how == "frozen":
                os.kill(server.process.pid, signal.SIGSTOP)
            told = await asyncio.gather(*(events(one, body(request_id=f"r{n}"), **RESUMABLE) for n in range(8)))
            assert {stream[-1] for stream in (first, *told)} == {"data: [DONE]"}
            assert all(len(stream) == len(first) for stream in told)
            await until(lambda: gauge(one, "twostroke_journal_store_up", 0) == 0)
            assert (await events(one, {}, last_event_id="r3:"))[-1] == "data: [DONE]", "memory still has it"
            if how == "frozen":
                os.kill(server.process.pid, signal.SIGCONT)
                await events(one, body(request_id="later"), **RESUMABLE)
                await until(lambda: gauge(one, "twostroke_journal_store_up", 0) == 1, 60.0)


@asynccontextmanager
async def madness() -> AsyncIterator[str]:
    """Something that is no Redis and answers all the same."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(4096):
            writer.write(b"*1000000\r\n$-7\r\n:one\r\n" + os.urandom(200))
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    try:
        yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


async def test_values_that_others_put_into_redis_are_not_believed():
    with redis_server() as server:
        async with pair(journal_url=server.url) as both:
            had = await events(both, body(), most=9, **RESUMABLE)
            await asyncio.sleep(0.3)
            raw = redis.Redis(port=server.port)
            place = Sealer(journal_key(KEY)).place(await tenant(both.processes[0]), "r1")
            assert raw.xlen(f"ts:j:{place}") > 0
            everything = b"".join(v for _, fields in raw.xrange(f"ts:j:{place}") for v in fields.values())
            assert b"hello" not in everything
            assert b"r1" not in b"".join(raw.keys("*"))
            gone = owner_of(both)
            await both.processes[gone].stop(0.0)
            values = raw.xrange(f"ts:j:{place}")
            raw.delete(f"ts:j:{place}")
            raw.xadd(f"ts:j:{place}", {"w": b"no"})
            assert await events(both, {}, last_event_id=ids_of(had)[-1]) == ["404 request_not_found"]
            raw.delete(f"ts:j:{place}")
            raw.xadd(f"ts:j:{place}", {"v": b"x" * 100})
            assert await events(both, {}, last_event_id=ids_of(had)[-1]) == ["404 request_not_found"]
            raw.delete(f"ts:j:{place}")
            raw.xadd(f"ts:j:{place}", values[0][1])  # the first value alone: the rest is computed
            raw.xadd(f"ts:j:{place}", {"v": os.urandom(300)})
            more = await events(both, {}, last_event_id=ids_of(had)[-1])
            assert more[-1] == "data: [DONE]"


async def test_two_routers_cannot_take_the_same_request():
    with redis_server() as server:
        async with pair(journal_url=server.url) as both:
            await events(both, body(), most=6, **RESUMABLE)
            await asyncio.sleep(0.3)
            key = journal_key(KEY)
            stores = [RedisStore(server.url, key, f"x{n}", lambda _: 60.0, _never) for n in (0, 1)]
            claims = [await store.find(await tenant(both.processes[0]), "r1") for store in stores]
            took = await asyncio.gather(*(claim.take() for claim in claims if claim is not None))
            assert sorted(took) == [False, True]
            for store in stores:
                await store.close()


def _never(entry: Entry) -> None:
    raise InternalError(f"{entry} was taken")
