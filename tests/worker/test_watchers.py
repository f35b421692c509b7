"""What one watcher is sent: each change once, in order, or a new snapshot."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

from twostroke.core.request import Role
from twostroke.engine.link.messages import CacheDelta, CacheSnapshot
from twostroke.kv.block import BlockIdentity
from twostroke.worker.watch import FaceLoad, Watchers

A, B, C, D = (BlockIdentity(bytes([n] * 16)) for n in range(4))


class Engine:
    """The dispatcher's cache listener, called by the test."""

    last_load = None

    def __init__(self) -> None:
        self.asked = 0
        self.tell: Callable[[Any], None] = lambda _: None

    def on_cache(self, listener: Callable[[Any], None]) -> None:
        self.tell = listener

    def on_load(self, listener: Callable[[Any], None]) -> None: ...

    def ask_snapshot(self) -> None:
        self.asked += 1


def watchers(**bounds: int) -> tuple[Engine, Watchers]:
    engine = Engine()
    return engine, Watchers(engine, 7, lambda: FaceLoad(Role.COMBINED), Counter(), **bounds)  # type: ignore[arg-type]


def told(made: Watchers, watcher: Any) -> list[tuple[int, str, bytes]]:
    """Number, kind and identities of each event."""
    found = []
    for event in made.events(watcher):
        kind = event.WhichOneof("body")
        body = event.snapshot.identities if kind == "snapshot" else event.delta.stored + b"-" + event.delta.removed
        found.append((event.sequence, kind, body))
    return found


def test_changes_follow_the_snapshot_in_order_and_what_was_before_it_is_left_out() -> None:
    engine, made = watchers()
    watcher = made.open()
    engine.tell(CacheDelta(1, (A,), ()))
    assert told(made, watcher) == []
    engine.tell(CacheSnapshot(3, (A, B)))
    engine.tell(CacheDelta(3, (B,), ()))
    engine.tell(CacheDelta(4, (C,), (A,)))
    assert told(made, watcher) == [(1, "snapshot", A + B), (2, "delta", C + b"-" + A)]


def test_a_change_that_is_missing_is_made_good_by_a_new_snapshot() -> None:
    engine, made = watchers()
    watcher = made.open()
    engine.tell(CacheSnapshot(1, (A,)))
    told(made, watcher)
    engine.tell(CacheDelta(3, (C,), ()))
    assert told(made, watcher) == []
    assert engine.asked == 2
    engine.tell(CacheDelta(4, (D,), ()))  # the snapshot has it
    engine.tell(CacheSnapshot(4, (A, B, C, D)))
    assert told(made, watcher) == [(2, "snapshot", A + B + C + D)]


def test_a_snapshot_takes_the_place_of_all_that_waits() -> None:
    engine, made = watchers()
    watcher = made.open()
    engine.tell(CacheSnapshot(1, (A,)))
    engine.tell(CacheDelta(2, (B,), ()))
    engine.tell(CacheSnapshot(5, (D,)))
    assert told(made, watcher) == [(1, "snapshot", D)]


def test_the_snapshot_that_another_router_asked_for_is_no_news_to_who_knows_it() -> None:
    engine, made = watchers()
    first = made.open()
    engine.tell(CacheSnapshot(1, (A,)))
    engine.tell(CacheDelta(2, (B,), ()))
    second = made.open()
    engine.tell(CacheSnapshot(2, (A, B)))
    assert told(made, first) == [(1, "snapshot", A), (2, "delta", B + b"-")]
    assert told(made, second) == [(1, "snapshot", A + B)]


def test_who_reads_in_time_is_told_every_change_however_many_they_are() -> None:
    engine, made = watchers(max_pending=4)
    watcher = made.open()
    engine.tell(CacheSnapshot(1, (A,)))
    told(made, watcher)
    for number in range(2, 40):
        engine.tell(CacheDelta(number, (B,), ()))
        assert [kind for _, kind, _ in told(made, watcher)] == ["delta"]
    assert engine.asked == 1


async def test_who_reads_no_more_is_forgotten() -> None:
    engine, made = watchers()
    events = made.watch()
    reader = asyncio.ensure_future(anext(events))
    await asyncio.sleep(0)
    engine.tell(CacheSnapshot(1, (A,)))
    assert (await reader).snapshot.identities == A
    assert len(made) == 1
    await events.aclose()  # type: ignore[attr-defined]
    assert len(made) == 0


def test_each_piece_of_a_snapshot_says_which_of_its_own_blocks_lack_windows() -> None:
    engine, made = watchers(piece_identities=2)
    watcher = made.open()
    engine.tell(CacheSnapshot(1, (A, B, C, D), (B, C)))
    pieces = [event.snapshot for event in made.events(watcher)]
    assert [(piece.identities, piece.lacking) for piece in pieces] == [(A + B, b"\2"), (C + D, b"\1")]
