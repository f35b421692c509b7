"""Threads that tokenise: how many at once, who waits, and what becomes of work that nobody waits for any more."""

from __future__ import annotations

import asyncio
import threading

import pytest

from twostroke.core.errors import DeadlineExceeded
from twostroke.router.api.text_work import LARGE_CHARS, TextWork


class Held:
    """Work that goes on until it is let go, and the most of it at one time."""

    def __init__(self) -> None:
        self.free = threading.Event()
        self.num_begun = self.num_running = self.most = 0
        self._lock = threading.Lock()

    def __call__(self) -> str:
        with self._lock:
            self.num_begun += 1
            self.num_running += 1
            self.most = max(self.most, self.num_running)
        assert self.free.wait(10)
        with self._lock:
            self.num_running -= 1
        return "done"


async def _begun(held: Held, count: int) -> None:
    async with asyncio.timeout(60):
        while held.num_begun < count:
            await asyncio.sleep(0.001)


@pytest.mark.parametrize(("num_chars", "most"), [(10, 2), (LARGE_CHARS + 1, 1)])
async def test_few_texts_are_worked_at_at_once_and_of_large_ones_one(num_chars, most):
    texts, held = TextWork(max_at_once=2), Held()
    waiting = [asyncio.create_task(texts.run(held, num_chars, 10.0)) for _ in range(6)]
    await _begun(held, most)
    await asyncio.sleep(0.02)
    assert held.num_begun == most
    held.free.set()
    assert await asyncio.gather(*waiting) == ["done"] * 6
    assert held.most == most


async def test_a_large_text_does_not_keep_small_ones_waiting():
    texts, held = TextWork(max_at_once=1), Held()
    large = asyncio.create_task(texts.run(held, LARGE_CHARS + 1, 10.0))
    await _begun(held, 1)
    assert await texts.run(lambda: "quick", 10, 10.0) == "quick"
    held.free.set()
    await large


async def test_who_waits_gives_up_in_time_and_the_thread_keeps_its_place():
    texts, held, ended = TextWork(max_at_once=1), Held(), []
    with pytest.raises(DeadlineExceeded, match=r"longer than the request's 0\.05 s"):
        await texts.run(held, 10, 0.05, lambda: ended.append("first"))
    assert ended == []
    second = Held()
    with pytest.raises(DeadlineExceeded):
        await texts.run(second, 10, 0.05, lambda: ended.append("second"))
    await asyncio.sleep(0)
    assert ended == ["second"]  # it had not begun, and never will
    held.free.set()
    assert await texts.run(lambda: "next", 10, 10.0) == "next"
    assert second.num_begun == 0
    assert ended == ["second", "first"]


async def test_what_the_work_raises_is_raised_here():
    def fail() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        await TextWork().run(fail, 10, 10.0)
