"""The driver of the journal: runs that end early, and buddies that answer nonsense."""

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from twostroke.core.clock import MonotonicClock
from twostroke.core.request import CacheScope, SequenceKey
from twostroke.decode_worker.buddy_calls import BuddyCalls
from twostroke.decode_worker.journal import Journal, JournalLimits
from twostroke.decode_worker.journaling import Journaling
from twostroke.protos import handover_pb2

KEY = SequenceKey("r", 0)


@dataclass
class Buddy:
    """Answers every offer with these bytes."""

    reply: bytes
    offers: list[int] = field(default_factory=list)

    async def keep(self, address: str, request: bytes, timeout_s: float) -> bytes:
        self.offers.append(len(handover_pb2.KeepRequest.FromString(request).token_ids))
        return self.reply


def order() -> Any:
    buddy = SimpleNamespace(worker_id="b", address="b:1")
    prompt = SimpleNamespace(names=SimpleNamespace(root=b"root"))
    return SimpleNamespace(
        engine_key=KEY, buddy=buddy, peers=(), prompt_ids=tuple(range(64)), scope=CacheScope("t", b""), prompt=prompt
    )


def made(buddy: Buddy, counters: Counter[str]) -> Journaling:
    journal = Journal(JournalLimits(1e9, retry_s=0.01), 1, 16)
    calls = BuddyCalls(buddy)  # type: ignore[arg-type]
    return Journaling(journal, calls, MonotonicClock(), counters, lambda: "me:1")


async def test_a_run_may_end_before_its_offer_is_sent(caplog: pytest.LogCaptureFixture) -> None:
    buddy, counters = Buddy(handover_pb2.KeepReply(kept_tokens=64).SerializeToString()), Counter[str]()
    journaling = made(buddy, counters)
    journaling.begin(order())
    journaling.grew(KEY, [1, 2], has_kv=True)
    journaling.end(KEY)
    async with asyncio.timeout(60):
        while not counters["journal_offers"]:
            await asyncio.sleep(0.001)
    assert buddy.offers == [64]
    assert not caplog.records
    journaling.close()


async def test_a_buddy_that_answers_nonsense_has_kept_nothing_and_is_asked_again() -> None:
    buddy, counters = Buddy(b"\xff\xff\xff"), Counter[str]()
    journaling = made(buddy, counters)
    journaling.begin(order())
    journaling.grew(KEY, [1, 2], has_kv=True)
    async with asyncio.timeout(60):
        while counters["journal_refused"] < 2:
            await asyncio.sleep(0.001)
    assert counters["journal_offers"] == counters["journal_blocks"] == 0
    assert buddy.offers[:2] == [64, 64]
    journaling.close()


async def test_a_buddy_that_says_it_has_more_than_was_offered_is_asked_again() -> None:
    buddy, counters = Buddy(handover_pb2.KeepReply(kept_tokens=2**32 - 1).SerializeToString()), Counter[str]()
    journaling = made(buddy, counters)
    journaling.begin(order())
    journaling.grew(KEY, [1, 2], has_kv=True)
    async with asyncio.timeout(60):
        while counters["journal_refused"] < 2:  # it is asked again
            await asyncio.sleep(0.001)
    assert counters["journal_offers"] == counters["journal_blocks"] == 0
    journaling.close()


async def test_a_call_that_breaks_is_an_answer() -> None:
    class Broken(Buddy):
        async def keep(self, address: str, request: bytes, timeout_s: float) -> bytes:
            raise RuntimeError("the channel is broken")

    counters = Counter[str]()
    journaling = made(Broken(b""), counters)
    journaling.begin(order())
    journaling.grew(KEY, [1, 2], has_kv=True)
    async with asyncio.timeout(60):
        while not counters["journal_refused"]:
            await asyncio.sleep(0.001)
    journaling.close()


class Calls:
    """Buddies whose calls wait in a list."""

    def __init__(self) -> None:
        self.waiting: list[tuple[handover_pb2.KeepRequest, Callable[[bytes | None], None]]] = []

    def keep(self, address: str, request: bytes, timeout_s: float, answered: Callable[[bytes | None], None]) -> None:
        self.waiting.append((handover_pb2.KeepRequest.FromString(request), answered))

    def after(self, delay_s: float, act: Callable[[], None]) -> Any:
        return SimpleNamespace(cancel=lambda: None)

    def close(self) -> None: ...

    def offered(self) -> list[int]:
        return [len(request.token_ids) for request, _ in self.waiting]


def journal_of(calls: Calls) -> Journaling:
    return Journaling(
        Journal(JournalLimits(1e9, retry_s=0.0), 1, 16), calls, MonotonicClock(), Counter(), lambda: "me:1"
    )


def test_nothing_is_offered_before_its_kv_is_here() -> None:
    calls = Calls()
    journaling = journal_of(calls)
    journaling.begin(order())
    journaling.grew(KEY, [1], has_kv=False)
    assert calls.offered() == []
    journaling.grew(KEY, [2], has_kv=True)
    assert calls.offered() == [64]
    told = calls.waiting[0][0]
    assert list(told.token_ids) == list(range(64))
    assert (told.isolation_domain, told.identity_root, told.address) == ("t", b"root", "me:1")


def test_a_run_that_is_over_is_offered_no_more_and_its_offer_is_awaited() -> None:
    calls = Calls()
    journaling = journal_of(calls)
    journaling.begin(order())
    journaling.grew(KEY, [1], has_kv=True)
    journaling.end(KEY)
    assert not journaling.is_idle
    calls.waiting[0][1](None)
    assert journaling.is_idle
    assert calls.offered() == [64]


@pytest.mark.parametrize(("place", "offered"), [(0, []), (1, [64])])
def test_only_the_first_prefill_worker_is_believed_to_hold_the_prompt(place: int, offered: list[int]) -> None:
    calls = Calls()
    journaling = journal_of(calls)
    asked = order()
    peers = [SimpleNamespace(worker_id="other", address="o:1")]
    peers.insert(place, asked.buddy)
    asked.peers = tuple(peers)
    journaling.begin(asked)
    journaling.grew(KEY, [1], has_kv=True)
    assert calls.offered() == offered


def test_after_the_close_nothing_is_offered() -> None:
    calls = Calls()
    journaling = journal_of(calls)
    journaling.close()
    journaling.begin(order())
    journaling.grew(KEY, [1], has_kv=True)
    assert calls.offered() == []
