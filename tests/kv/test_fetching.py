"""A fetch from one holder: what is taken, what ends it, and what is kept."""

from dataclasses import replace

import pytest

from twostroke.kv.block import BlockIdentity
from twostroke.kv.handover.fetching import BlockFetch, FetchedFrame, FetchEnd, Wanted
from twostroke.kv.handover.machine import AskBlocks, Close, Fetched, Write
from twostroke.kv.spec import WindowedLayers

NAMES = tuple(BlockIdentity(bytes([n]) * 16) for n in range(6))
WANTED = Wanted(NAMES[2:], 32, b"class")
SILENCE_S, DEADLINE_S = 2.0, 100.0


def frame(number: int, start: int, blocks: int, **changes) -> FetchedFrame:
    names = NAMES[start // 16 : start // 16 + blocks]
    made = FetchedFrame(number, start, 16 * blocks, names, b"class", is_last=False, is_intact=True, num_bytes=100)
    return replace(made, **changes)


@pytest.fixture
def fetch() -> BlockFetch:
    made = BlockFetch(WANTED, SILENCE_S, DEADLINE_S, 0.0)
    assert made.begin(1.0) == [AskBlocks(NAMES[2:], 32)]
    return made


def test_it_is_complete_when_all_is_stored(fetch):
    assert fetch.on_frame(frame(1, 32, 3), 1.5) == [Write(1, 32, 48)]
    assert fetch.on_frame(frame(2, 80, 1), 1.6) == [Write(2, 80, 16), Close(now=False)]
    assert fetch.written(32, 48) == []
    assert not fetch.is_over
    assert fetch.written(80, 16) == [Fetched("complete", 96)]
    assert (fetch.is_over, fetch.num_bytes, fetch.next_deadline_s) == (True, 200, None)
    assert fetch.written(80, 16) == fetch.cancel() == fetch.tick(1000.0) == []


def test_a_source_may_hold_less(fetch):
    assert fetch.on_frame(frame(1, 32, 2, is_last=True), 1.5) == [Write(1, 32, 32), Close(now=False)]
    assert fetch.end is FetchEnd.SHORT
    assert fetch.written(32, 32) == [Fetched("short", 64)]


def test_a_source_may_hold_nothing(fetch):
    assert fetch.closed() == [Close(now=True), Fetched("empty", 32)]


def test_what_came_before_a_break_is_kept_when_it_is_stored(fetch):
    fetch.on_frame(frame(1, 32, 1), 1.5)
    fetch.on_frame(frame(2, 48, 1), 1.5)
    assert fetch.closed() == [Close(now=True)]
    assert fetch.num_writing == 2
    assert fetch.written(32, 16) == []
    assert fetch.stored_upto == 48
    assert fetch.written(48, 16) == [Fetched("closed", 64)]


def test_a_damaged_frame_ends_it_and_is_not_stored(fetch):
    fetch.on_frame(frame(1, 32, 1), 1.5)
    assert fetch.on_frame(frame(2, 48, 1, is_intact=False), 1.5) == [Close(now=True)]
    assert fetch.on_frame(frame(3, 64, 1), 1.5) == []
    assert fetch.written(32, 16) == [Fetched("corrupted", 48, "tokens 48+16")]


@pytest.mark.parametrize(
    "wrong",
    [
        frame(3, 48, 1),
        frame(2, 64, 1),
        frame(2, 48, 1, token_count=8),
        frame(2, 48, 1, token_count=0),
        frame(2, 48, 1, token_count=24),
        frame(2, 48, 3, token_count=64, identities=(*NAMES[3:], NAMES[0])),
        frame(2, 48, 1, identities=NAMES[:1]),
        frame(2, 48, 1, numerics_class=b"other"),
    ],
)
def test_what_was_not_asked_for_ends_it(fetch, wrong):
    fetch.on_frame(frame(1, 32, 1), 1.5)
    assert fetch.on_frame(wrong, 1.5) == [Close(now=True)]
    (fetched,) = fetch.written(32, 16)
    assert (fetched.end, fetched.stored_upto) == ("protocol", 48)


def test_what_came_without_its_windows_is_kept_only_if_computing_may_begin_behind_it():
    names = tuple(BlockIdentity(bytes([n]) * 16) for n in range(16))
    wanted = Wanted(names, 0, None, WindowedLayers((0,), 20))
    for is_whole in (True, False):
        fetch = BlockFetch(wanted, SILENCE_S, DEADLINE_S, 0.0)
        fetch.begin(0.0)
        for number, start in enumerate(range(0, 192, 96), 1):
            names_of = names[start // 16 : start // 16 + 6]
            came = frame(number, start, 6, identities=names_of, numerics_class=b"", lacks_windows=True)
            assert fetch.on_frame(came, 0.0) == [Write(number, start, 96)]
            fetch.written(start, 96)
        assert fetch.stored_upto == 0
        if not is_whole:
            assert fetch.closed()[-1] == Fetched("closed", 0)
            continue
        last = frame(3, 192, 4, identities=names[12:], numerics_class=b"")
        assert fetch.on_frame(last, 0.0)[0] == Write(3, 192, 64)
        assert fetch.written(192, 64) == [Fetched("complete", 256)]


def test_a_second_copy_of_a_frame_is_nothing(fetch):
    fetch.on_frame(frame(1, 32, 1), 1.5)
    assert fetch.on_frame(frame(1, 32, 1), 1.5) == []
    assert fetch.end is None


def test_any_class_will_do_where_none_is_asked_for():
    fetch = BlockFetch(replace(WANTED, numerics_class=None), SILENCE_S, DEADLINE_S, 0.0)
    fetch.begin(0.0)
    assert fetch.on_frame(frame(1, 32, 1, numerics_class=b"other"), 0.0) == [Write(1, 32, 16)]


def test_garbage_ends_it(fetch):
    assert fetch.garbled("no envelope") == [Close(now=True), Fetched("protocol", 32, "no envelope")]


def test_silence_counts_from_the_last_frame(fetch):
    assert fetch.next_deadline_s == 3.0
    assert fetch.tick(2.9) == []
    fetch.on_frame(frame(1, 32, 1), 2.9)
    assert fetch.tick(4.8) == []
    assert fetch.next_deadline_s == 4.9
    assert fetch.tick(4.9) == [Close(now=True)]
    assert fetch.written(32, 16) == [Fetched("silent", 48)]


def test_its_requests_deadline_ends_it_even_if_nothing_is_stored(fetch):
    fetch.on_frame(frame(1, 32, 1), 99.5)
    assert fetch.tick(100.0) == [Close(now=True), Fetched("deadline", 32)]
    late = BlockFetch(WANTED, SILENCE_S, DEADLINE_S, 0.0)
    late.begin(0.0)
    late.on_frame(frame(1, 32, 4), 99.0)
    assert late.next_deadline_s == DEADLINE_S
    assert late.tick(99.9) == []
    assert late.tick(100.0) == [Fetched("complete", 32)]


def test_a_cancel_reports_nothing(fetch):
    fetch.on_frame(frame(1, 32, 1), 1.5)
    assert fetch.cancel() == [Close(now=True)]
    assert fetch.written(32, 16) == fetch.closed() == []
    assert fetch.is_over
