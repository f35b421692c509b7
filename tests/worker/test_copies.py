"""Blocks.Keep: who leaves is kept nothing for, a worker that drains keeps nothing, and copies are in nobody's way."""

import asyncio
from types import SimpleNamespace

import pytest

from twostroke.core.request import CacheScope, Role, SequenceKey
from twostroke.engine.link.messages import Source
from twostroke.kv.keys import PromptNames
from twostroke.protos import handover_pb2
from twostroke.worker.blocks.copies import KEEP_S, LOWEST, Copied, CopyTools, KeepTask
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


def test_a_copy_goes_behind_all_else_and_ends_in_time():
    sent = []
    dispatcher = SimpleNamespace(own=lambda key, owner: None, send=sent.append)
    tools = SimpleNamespace(dispatcher=dispatcher, clock=SimpleNamespace(now_s=lambda: 100.0))
    copied = Copied(SequenceKey("keep/1", 0), CacheScope("tests", b""), PromptNames(b"root", ()), (1,) * 16, "a:1")
    KeepTask(copied, CopyTools(None, tools, None), None).start()
    (submit,) = sent
    assert (submit.priority, submit.deadline_s, submit.source) == (LOWEST, 100.0 + KEEP_S, Source.PEER)


async def test_a_draining_worker_keeps_nothing(start_worker, make_prompt):
    buddy = await start_worker(Role.DECODE)
    buddy.faces.decode.draining.is_on = True
    reply = await buddy._channels.keep(buddy.address, request(buddy, make_prompt(32), "127.0.0.1:1"), 10.0)
    assert handover_pb2.KeepReply.FromString(reply).reason == "the worker is draining"
    with pytest.raises(Exception, match="INVALID_ARGUMENT"):
        await buddy._channels.keep(buddy.address, b"\xff\xff", 10.0)
