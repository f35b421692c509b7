"""What carries a machine out: actions in their order, items that wait for a verdict, and the end of a stream."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import pytest

from twostroke.core.clock import MonotonicClock
from twostroke.kv.handover.carrier import MAX_CHECKS, Carrier, Check, CheckLine
from twostroke.kv.handover.driver import INLINE_BYTES, ClientDriver


class Host:
    """A stream's end whose verdicts are given by the test."""

    def __init__(self) -> None:
        self.verdicts: list[Callable[[bool], None]] = []
        self.traced: list[Any] = []

    def now_s(self) -> float:
        return 0.0

    def trace(self, action: Any) -> None:
        self.traced.append(action)

    def check(self, check: Check, answered: Callable[[bool], None]) -> None:
        self.verdicts.append(answered)


class Machine:
    next_deadline_s = None

    def tick(self, now_s: float) -> list[Any]:
        return []


def test_what_an_action_brings_comes_after_the_actions_before_it() -> None:
    host, done = Host(), []

    def act(action: str) -> None:
        if action == "ask":
            carrier.do(["answer", "and more"])
        done.append(action)

    counted: list[int] = []
    carrier = Carrier(Machine(), host, act, lambda: counted.append(len(done)))  # type: ignore[arg-type]
    carrier.do(["ask", "second", "third"])  # type: ignore[list-item]
    assert done == host.traced == ["ask", "second", "third", "answer", "and more"]
    assert counted == [0, 0]  # before the actions, and those of an answer at once


def line_of(host: Host, heard: list[str]) -> CheckLine[str]:
    """A line whose frames have digests, and whose words have none."""

    def check_of(item: str) -> Check | None:
        return Check(lambda: True, 1, lambda holds: heard.append(f"{item} {holds}")) if "frame" in item else None

    return CheckLine(host, check_of, heard.append)  # type: ignore[arg-type]


def test_an_item_without_digests_waits_for_the_verdicts_before_it() -> None:
    host, heard = Host(), list[str]()
    line = line_of(host, heard)
    for item in ("word", "frame 1", "second word", "frame 2"):
        line.put(item)
    assert (heard, len(host.verdicts)) == (["word"], 1)
    host.verdicts.pop()(False)
    assert heard == ["word", "frame 1 False", "second word"]
    host.verdicts.pop()(True)
    assert heard[3:] == ["frame 2 True"]


def test_frames_are_verified_side_by_side_and_done_in_their_order() -> None:
    host, heard = Host(), list[str]()
    line = line_of(host, heard)
    for number in range(MAX_CHECKS + 1):
        line.put(f"frame {number}")
    line.put("word")
    assert len(host.verdicts) == MAX_CHECKS
    host.verdicts[1](False)
    assert heard == []
    host.verdicts[0](True)
    assert heard == ["frame 0 True", "frame 1 False"]
    assert len(host.verdicts) == MAX_CHECKS + 1
    for verdict in host.verdicts[:1:-1]:
        verdict(True)
    assert heard[2:] == [*(f"frame {number} True" for number in range(2, MAX_CHECKS + 1)), "word"]


class Stream:
    def __init__(self) -> None:
        self.what_happened: list[str] = []
        self._over = asyncio.Event()

    async def receive(self) -> None:
        await self._over.wait()

    async def send(self, envelope: bytes) -> None:
        self.what_happened.append(envelope.decode())

    async def finish(self) -> None:
        self.what_happened.append("finish")
        self._over.set()

    def close(self) -> None:
        self.what_happened.append("close")


async def test_the_peer_is_told_that_nothing_follows_and_may_read_the_last_words() -> None:
    stream = Stream()
    with ThreadPoolExecutor(1) as executor:
        driver = ClientDriver(stream, MonotonicClock(), executor, linger_s=60.0)  # type: ignore[arg-type]
        driver.send(b"last words")
        driver.close(now=False)
        async with asyncio.timeout(60):
            await driver.closed()
    assert stream.what_happened == ["last words", "finish", "close"]


@pytest.mark.parametrize("size_bytes", [1, INLINE_BYTES + 1])
@pytest.mark.parametrize("holds", [False, True])
async def test_a_verdict_is_what_the_digests_say_and_a_worker_that_ends_says_no(size_bytes: int, holds: bool) -> None:
    stream, verdicts = Stream(), []
    executor = ThreadPoolExecutor(1)
    driver = ClientDriver(stream, MonotonicClock(), executor, linger_s=0.0)  # type: ignore[arg-type]
    check = Check(lambda: holds, size_bytes, lambda _: None)
    driver.check(check, verdicts.append)
    while not verdicts:
        await asyncio.sleep(0.001)
    executor.shutdown()
    driver.check(check, verdicts.append)
    assert verdicts == [holds, holds and size_bytes <= INLINE_BYTES]
    driver.close(now=True)
    await driver.closed()


def test_what_comes_while_a_verdict_is_told_waits_for_its_end() -> None:
    host, heard = Host(), list[str]()

    def told(holds: bool) -> None:
        line.put("word")
        heard.append("told")

    def check_of(item: str) -> Check | None:
        return Check(lambda: True, 1, told) if item == "frame" else None

    line: CheckLine[str] = CheckLine(host, check_of, heard.append)  # type: ignore[arg-type]
    line.put("frame")
    host.verdicts.pop()(True)
    assert heard == ["told", "word"]


class Timer:
    is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True


def test_a_machine_has_one_timer_at_a_time() -> None:
    host, machine, timers = Host(), Machine(), []

    def after(delay_s: float, act: Callable[[], None]) -> Timer:
        timers.append(Timer())
        return timers[-1]

    host.after = after  # type: ignore[attr-defined]
    carrier = Carrier(machine, host, lambda _: None, lambda: None)  # type: ignore[arg-type]
    for due_s in (5.0, 3.0, None):
        machine.next_deadline_s = due_s  # type: ignore[assignment]
        carrier.rearm()
        assert [timer.is_cancelled for timer in timers[:-1]] == [True] * (len(timers) - 1)
    assert [timer.is_cancelled for timer in timers] == [True, True]


async def test_digests_that_wait_for_a_thread_are_not_verified_once_the_stream_is_closed() -> None:
    free, verified, verdicts = Event(), [], []
    with ThreadPoolExecutor(1) as executor:
        executor.submit(free.wait)
        driver = ClientDriver(Stream(), MonotonicClock(), executor, linger_s=0.0)  # type: ignore[arg-type]
        driver.check(Check(lambda: not verified.append(1), INLINE_BYTES + 1, lambda _: None), verdicts.append)
        driver.close(now=True)
        await driver.closed()
        free.set()
    await asyncio.sleep(0)
    assert (verified, verdicts) == ([], [])
