"""How long an announcer waits between its attempts to reach a router."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace

import pytest
from support.clusters.flow_cluster import until
from support.fakes.ear import KEY, Ear
from support.fakes.found import Found

from twostroke.core.lease import WORKER_LEASE
from twostroke.protos import common_pb2
from twostroke.worker.announcer import Announcer, Retry


@dataclass(frozen=True, slots=True)
class NoWait(Retry):
    """Remembers what it was asked."""

    attempts: list[int] = field(default_factory=list)

    def wait_s(self, attempt: int) -> float:
        self.attempts.append(attempt)
        return 0.0


@pytest.mark.parametrize(("attempt", "wait_s"), [(1, 0.1), (2, 0.2), (3, 0.4), (5, 1.6), (6, 2.0), (10**6, 2.0)])
def test_waits_double_up_to_a_bound(attempt: int, wait_s: float) -> None:
    assert Retry(first_s=0.1, longest_s=2.0).wait_s(attempt) == pytest.approx(wait_s)


async def test_a_router_that_answered_is_tried_again_as_soon_as_a_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = [False, False, False, True, False, False, True, True]
    retry, over = NoWait(), asyncio.Event()

    async def announce(*_: object) -> bool:
        if len(outcomes) == 1:
            over.set()
        return outcomes.pop(0) if outcomes else True

    announcer = Announcer(["127.0.0.1:1"], common_pb2.WorkerInfo(worker_id="w"), b"k" * 32, retry)
    monkeypatch.setattr(announcer, "_announce", announce)
    announcer.start()
    async with asyncio.timeout(30):
        await over.wait()
    await announcer.leave()
    assert retry.attempts[:8] == [1, 2, 3, 1, 1, 2, 1, 1]


async def test_what_is_told_is_known_to_every_router_that_answers() -> None:
    ears = [Ear(), Ear()]
    servers = [await ear.listen() for ear in ears]
    told = common_pb2.WorkerInfo(worker_id="w")
    announcer = Announcer(["127.0.0.1:1", *(address for _, address in servers)], told, KEY)
    announcer.start()
    try:
        await until(lambda: announcer.num_answering == 2)
        await announcer.tell(common_pb2.WorkerInfo(worker_id="w", changes_codec_to="bfloat16"), 60.0)
        for ear in ears:
            assert ear.heard[-1].worker.changes_codec_to == "bfloat16"
            assert not ear.heard[-1].leaving
        await announcer.end()
        assert not any(message.leaving for ear in ears for message in ear.heard)
    finally:
        await announcer.leave()
        for server, _ in servers:
            await server.stop(None)


class Deaf(Ear):
    """Answers once, and then no more: its machine is gone, and no packet says so."""

    async def Announce(self, requests, context):
        async for message in requests:
            self.heard.append(message)
            self.changed.set()
            if len(self.heard) == 1:
                async for reply in super().Announce(_once(message), context):
                    yield reply


async def _once(message):
    yield message


async def test_a_silent_router_that_no_source_has_any_more_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twostroke.worker.announcer.WORKER_LEASE", replace(WORKER_LEASE, beat_s=0.05, silence_s=0.3))
    deaf = Deaf()
    server, address = await deaf.listen()
    source = Found(address)
    announcer = Announcer([], common_pb2.WorkerInfo(worker_id="w"), KEY, Retry(0.02, 0.02), [source])
    announcer.start()
    await until(lambda: announcer.num_answering == 1)
    heard = len(deaf.heard)
    await until(lambda: len(deaf.heard) > heard + 8)  # silent for longer than that; a source has it, so it may be slow
    assert announcer.num_answering == 1
    source.tell()
    await until(lambda: announcer.num_answering == 0)
    await until(lambda: not announcer._tasks)
    await announcer.leave()
    await server.stop(0)


async def test_a_router_that_never_answered_is_given_up_when_its_source_loses_it() -> None:
    source = Found("127.0.0.1:1")
    announcer = Announcer([], common_pb2.WorkerInfo(worker_id="w"), KEY, Retry(3600.0, 3600.0), [source])
    announcer.start()
    await until(lambda: announcer._tasks.keys() == {"127.0.0.1:1"})
    source.tell("127.0.0.1:2")
    await until(lambda: announcer._tasks.keys() == {"127.0.0.1:2"})
    await announcer.leave()
