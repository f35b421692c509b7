"""The thread pair: bounds, refusals and wake-ups."""

import asyncio
import threading

import pytest

from twostroke.core.errors import Unavailable
from twostroke.core.request import SamplingParams, SequenceKey
from twostroke.engine.link.messages import (
    BlocksFetched,
    Bound,
    CancelSequence,
    Ended,
    FetchBlocks,
    Release,
    Source,
    Stop,
    Submit,
)
from twostroke.engine.link.thread_link import LinkStalled, ThreadLink

KEY = SequenceKey("a", 0)


def a_submit(name="a"):
    return Submit(SequenceKey(name, 0), Source.LOCAL, (1,), (), b"", SamplingParams(max_tokens=1))


async def test_a_full_link_refuses_new_work_with_an_answer_and_lets_the_rest_in():
    link = ThreadLink(max_commands=2)
    link.send(a_submit("a"))
    link.send(a_submit("b"))
    link.send(a_submit("c"))
    link.send(FetchBlocks(4, (), 0, b"root"))
    others = [CancelSequence(KEY), Release(KEY), Stop()]
    for command in others:
        link.send(command)
    ended, fetched = await link.receive()
    assert (ended.key.request_id, ended.error_code) == ("c", "overloaded")
    assert fetched == BlocksFetched(4, 0, ())
    assert link.take(10, None) == [a_submit("a"), a_submit("b"), *others]


async def test_receive_wakes_and_takes_all_at_once():
    link = ThreadLink()
    waiting = asyncio.create_task(link.receive())
    await asyncio.sleep(0)
    thread = threading.Thread(target=link.emit, args=([Bound(KEY), Bound(KEY)],))
    thread.start()
    assert await asyncio.wait_for(waiting, 60) == [Bound(KEY), Bound(KEY)]
    thread.join()


async def test_a_cancelled_reader_loses_nothing():
    link = ThreadLink()
    waiting = asyncio.create_task(link.receive())
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    link.emit([Bound(KEY)])
    assert await link.receive() == [Bound(KEY)]


def test_take_gives_no_more_than_asked_and_waits_no_longer_than_told():
    link = ThreadLink()
    assert link.take(5, 0.01) == []
    for name in "abc":
        link.send(a_submit(name))
    assert [command.key.request_id for command in link.take(2, None)] == ["a", "b"]
    link.wake()
    assert [command.key.request_id for command in link.take(2, None)] == ["c"]


def test_a_wake_before_the_sleep_is_not_lost():
    link = ThreadLink()
    link.wake()
    assert link.take(5, 30) == []


async def test_the_engine_waits_for_a_slow_face():
    link = ThreadLink(max_events=2)
    link.emit([Bound(KEY)] * 2)
    thread = threading.Thread(target=link.emit, args=([Bound(SequenceKey("b", 0))],))
    thread.start()
    thread.join(0.05)
    assert thread.is_alive()
    assert len(await link.receive()) == 2
    thread.join(5)
    assert await link.receive() == [Bound(SequenceKey("b", 0))]


def test_a_dead_face_is_noticed():
    link = ThreadLink(max_events=1, stall_s=0.02)
    link.emit([Bound(KEY)])
    with pytest.raises(LinkStalled):
        link.emit([Bound(KEY)])


async def test_a_closed_link_gives_out_what_is_left_and_ends():
    link = ThreadLink()
    link.emit([Bound(KEY)])
    link.send(a_submit("late"))
    link.close([Bound(SequenceKey("last", 0))])
    bound, late, last = await link.receive()
    assert (bound, last) == (Bound(KEY), Bound(SequenceKey("last", 0)))
    assert isinstance(late, Ended)
    assert late.error_code == "unavailable"
    assert await link.receive() == []
    link.send(CancelSequence(KEY))
    with pytest.raises(Unavailable):
        link.send(a_submit())


def test_an_engine_outlives_its_faces_loop():
    link = ThreadLink()

    async def listen():
        asyncio.get_running_loop().create_task(link.receive())
        await asyncio.sleep(0)
        link._waiter = asyncio.get_running_loop().create_future()

    asyncio.run(listen())
    link.emit([Bound(KEY)])
    link.close()
