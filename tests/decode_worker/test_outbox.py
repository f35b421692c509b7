import asyncio

import pytest

from twostroke.core.request import Epoch, SequenceKey
from twostroke.decode_worker.outbox import Outbox
from twostroke.protos import worker_pb2

KEY, OTHER = SequenceKey("r", 0), SequenceKey("other", 1)
EPOCH = Epoch(1, 1)


def test_everything_that_waits_leaves_in_one_message():
    outbox = Outbox()
    outbox.at_step(5)
    outbox.add_tokens(KEY, EPOCH, 3, (7,), "a")
    outbox.add_tokens(OTHER, EPOCH, 0, (8,), "b")
    outbox.at_step(6)
    outbox.add_tokens(KEY, EPOCH, 4, (9, 10), "cd")
    outbox.add_end(worker_pb2.RequestEnd(request_id="r"))
    outbox.add_news(OTHER, EPOCH, "bound")
    step = outbox.take()
    assert step.step == 6
    first, second = step.tokens
    assert (first.request_id, first.first_index, list(first.token_ids), first.text) == ("r", 3, [7, 9, 10], "acd")
    assert (second.request_id, second.choice, list(second.token_ids)) == ("other", 1, [8])
    assert [end.request_id for end in step.ends] == ["r"]
    assert [news.what for news in step.news] == ["bound"]
    assert outbox.take() is None


def test_tokens_of_two_dispatches_never_mix():
    outbox = Outbox()
    outbox.add_tokens(KEY, EPOCH, 0, (1,), "")
    outbox.add_tokens(KEY, Epoch(1, 2), 0, (2,), "")
    assert [(t.epoch.counter, list(t.token_ids)) for t in outbox.take().tokens] == [(1, [1]), (2, [2])]


def test_a_gap_is_our_own_error():
    outbox = Outbox()
    outbox.add_tokens(KEY, EPOCH, 0, (1,), "")
    with pytest.raises(AssertionError):
        outbox.add_tokens(KEY, EPOCH, 2, (1,), "")


@pytest.mark.parametrize("by", ["tokens", "ends"])
async def test_a_router_that_does_not_listen_gets_no_more_work(by):
    outbox = Outbox(max_tokens=10, max_ends=10)
    for place in range(10):
        assert not outbox.is_full
        await asyncio.wait_for(outbox.wait_for_room(), 0.1)
        if by == "tokens":
            outbox.add_tokens(KEY, EPOCH, place, (1,), "")
        else:
            outbox.add_end(worker_pb2.RequestEnd())
    assert outbox.is_full
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(outbox.wait_for_room(), 0.02)
    outbox.take()
    await asyncio.wait_for(outbox.wait_for_room(), 0.1)


async def test_the_writer_sleeps_until_something_waits():
    outbox = Outbox()
    waiting = asyncio.create_task(outbox.wait())
    await asyncio.sleep(0)
    assert not waiting.done()
    outbox.add_news(KEY, EPOCH, "promised")
    await asyncio.wait_for(waiting, 0.1)
