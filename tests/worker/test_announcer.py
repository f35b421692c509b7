"""How long an announcer waits between its attempts to reach a router."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest

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
