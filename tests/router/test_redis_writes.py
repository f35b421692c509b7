"""What the journal's store writes again after Redis failed. The Redis here is none: it answers as it is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

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
