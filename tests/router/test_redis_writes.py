"""What the journal's store writes again after Redis failed. The Redis here is none: it answers as it is told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from twostroke.core.errors import Unavailable
from twostroke.core.request import Request, SamplingParams
from twostroke.router.journal.journal import Asked, Entry
from twostroke.router.journal.redis_store import RedisStore
from twostroke.router.requests.pieces import OutputDelta

pytest.importorskip("redis")


class Pipeline:
    """Counts what is sent, and calls `during` while the answer is under way."""

    def __init__(self, during: Callable[[], Any]) -> None:
        self._during, self._num = during, 0

    def eval(self, *_: Any) -> None:
        self._num += 1

    async def execute(self, *, raise_on_error: bool) -> list[int]:
        self._during()
        return [1] * self._num


def entry(name: str) -> Entry:
    request = Request(name, "m", (1,), SamplingParams(8), 1, "d", 60.0, tenant="t")
    found = Entry(Asked(request, "text_completion", {}, 7), 0.0)
    found.pieces.append(OutputDelta(0, 0, (1,), "a"))
    return found


def store_with(during: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> RedisStore:
    store = RedisStore("redis://127.0.0.1:1", b"k" * 32, "router", lambda _: 60.0, lambda _: None)
    monkeypatch.setattr(store, "_write_for_ever", _nothing)
    monkeypatch.setattr(store._redis, "pipeline", lambda **_: Pipeline(during))
    return store


async def _nothing() -> None:
    return None


async def test_what_changed_while_redis_failed_is_written_with_what_it_lost(monkeypatch: pytest.MonkeyPatch):
    one, other = entry("one"), entry("other")

    def fail() -> None:
        store.changed(other)
        raise ConnectionError("planted")

    store = store_with(fail, monkeypatch)
    store.changed(one)
    assert not await store._write()
    assert list(store._dirty) == [one, other]


async def test_the_end_of_a_request_that_came_during_a_write_is_written(monkeypatch: pytest.MonkeyPatch):
    one = entry("one")

    def end() -> None:
        if not one.is_over:
            one.ended_s = 1.0
            store.changed(one)

    store = store_with(end, monkeypatch)
    store.changed(one)
    assert await store._write()
    assert list(store._dirty) == [one]
    assert await store._write()
    assert store.num_waiting == 0


async def test_a_full_redis_is_down_until_it_takes_something(monkeypatch: pytest.MonkeyPatch, caplog: Any):
    answer: list[Any] = [ValueError("OOM")]
    store = store_with(lambda: None, monkeypatch)

    class Full(Pipeline):
        async def execute(self, *, raise_on_error: bool) -> list[Any]:
            return answer * self._num

    monkeypatch.setattr(store._redis, "pipeline", lambda **_: Full(lambda: None))
    store.changed(entry("one"))
    for _ in range(3):
        assert not await store._write()
        assert not store.is_up
    assert len(caplog.records) == 1, "said once"
    answer[0] = 1
    assert await store._write()
    assert store.is_up


async def test_it_closes_though_a_library_swallows_a_cancellation():
    store = RedisStore("redis://127.0.0.1:1", b"k" * 32, "router", lambda _: 60.0, lambda _: None)
    swallowed: list[bool] = []
    writing = asyncio.Event()

    async def write() -> bool:
        writing.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            swallowed.append(True)
        return False

    store._write = write  # type: ignore[method-assign]
    store.changed(entry("one"))
    await writing.wait()
    store.is_up = False
    async with asyncio.timeout(60):
        await store.close()
    assert swallowed


async def test_a_redis_that_does_not_answer_is_not_told_as_a_request_that_is_not_there():
    store = RedisStore("redis://127.0.0.1:1", b"k" * 32, "router", lambda _: 60.0, lambda _: None)  # nobody listens
    try:
        with pytest.raises(Unavailable, match="does not answer; ask again") as caught:
            await store.find("t", "cmpl-1")
        assert caught.value.retry_after_s == 1.0
    finally:
        await store.close()
