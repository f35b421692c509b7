"""Blocks.Keep: who leaves is kept nothing for, and a worker that drains keeps nothing."""

import asyncio

import pytest

from twostroke.core.request import CacheScope, Role
from twostroke.protos import handover_pb2
from twostroke.worker.blocks.fetch import FetchService


def request(worker, prompt, address):
    root = worker.room.facts.namer.root(CacheScope("tests", b""))
    return handover_pb2.KeepRequest(
        token_ids=prompt, isolation_domain="tests", identity_root=root, address=address
    ).SerializeToString()


async def test_a_copy_ends_when_its_caller_leaves(start_worker, make_prompt, all_free, monkeypatch):
    source, buddy = [await start_worker(Role.DECODE) for _ in range(2)]
    began = asyncio.Event()

    async def silent(service, wanted):
        began.set()
        await asyncio.Event().wait()
        yield b""

    monkeypatch.setattr(FetchService, "_frames", silent)
    asked = request(buddy, make_prompt(64), source.address)
    call = asyncio.create_task(source._channels.keep(buddy.address, asked, 60.0))
    async with asyncio.timeout(60):
        await began.wait()
        assert buddy.dispatcher.num_owned == 1
        call.cancel()
        while buddy.dispatcher.num_owned:
            await asyncio.sleep(0.01)
    assert buddy.counters["fetch_silent"] == 0, "it ended before the source was given up"
    assert buddy.counters["keeps_failed"] == 1
    await all_free(source, buddy)


async def test_a_draining_worker_keeps_nothing(start_worker, make_prompt):
    buddy = await start_worker(Role.DECODE)
    buddy.decode.draining.is_on = True
    reply = await buddy._channels.keep(buddy.address, request(buddy, make_prompt(32), "127.0.0.1:1"), 10.0)
    assert handover_pb2.KeepReply.FromString(reply).reason == "the worker is draining"
    with pytest.raises(Exception, match="INVALID_ARGUMENT"):
        await buddy._channels.keep(buddy.address, b"\xff\xff", 10.0)
