"""The face's side of the link: nobody waits for an engine that has ended, and an owner's trouble is its sequence's."""

import asyncio

import pytest

from twostroke.core.errors import Unavailable
from twostroke.core.request import FinishReason, SamplingParams, SequenceKey
from twostroke.engine.link.client import EngineClient
from twostroke.engine.link.messages import (
    BlocksFetched,
    CancelSequence,
    Ended,
    FetchBlocks,
    Promised,
    Source,
    StepTokens,
    Submit,
    TokenNews,
)
from twostroke.engine.link.thread_link import ThreadLink

KEY, OTHER = SequenceKey("a", 0), SequenceKey("b", 0)
PARAMS = SamplingParams(max_tokens=4)
TIMEOUT_S = 10


def submit(key):
    return Submit(key, Source.LOCAL, (5, 6), (), b"root", PARAMS)


def tokens(*keys):
    return StepTokens(1, tuple(TokenNews(key, 0, (7,)) for key in keys))


class Desk:
    """A dispatcher over a link whose engine is this test."""

    def __init__(self):
        self.link = ThreadLink()
        self.dispatcher = EngineClient(self.link)
        self.heard = {KEY: [], OTHER: []}
        self.running = asyncio.ensure_future(self.dispatcher.run())

    def own(self, *keys):
        for key in keys:
            self.dispatcher.own(key, self.heard[key].append)

    async def settle(self):
        for _ in range(5):
            await asyncio.sleep(0)

    async def until_over(self):
        await asyncio.wait_for(asyncio.wait([self.running]), TIMEOUT_S)


async def test_whoever_waits_when_the_engine_ends_is_released_with_a_typed_error():
    desk = Desk()
    desk.own(KEY)
    fetch = asyncio.ensure_future(desk.dispatcher.fetch([], 0, b"root"))
    end = asyncio.ensure_future(desk.dispatcher.next_end())
    await desk.settle()
    desk.link.close()  # without a word about KEY, as an engine that broke while it took commands
    with pytest.raises(Unavailable) as raised:
        await asyncio.wait_for(fetch, TIMEOUT_S)
    assert raised.value.retry_after_s
    await asyncio.wait_for(end, TIMEOUT_S)
    (ended,) = desk.heard[KEY]
    assert (ended.reason, ended.error_code) == (FinishReason.ERROR, "unavailable")
    assert desk.dispatcher.num_owned == 0
    await desk.until_over()


async def test_after_the_engines_end_nothing_waits_for_it():
    desk = Desk()
    desk.link.close()
    await desk.until_over()
    with pytest.raises(Unavailable):
        await asyncio.wait_for(desk.dispatcher.fetch([], 0, b"root"), TIMEOUT_S)
    desk.own(KEY)
    desk.dispatcher.send(submit(KEY))
    while desk.dispatcher.num_owned:
        await asyncio.wait_for(desk.dispatcher.next_end(), TIMEOUT_S)
    assert [event.error_code for event in desk.heard[KEY]] == ["unavailable"]
    desk.dispatcher.ask_snapshot()  # means nothing any more


async def test_a_reader_that_is_stopped_releases_them_too():
    desk = Desk()
    fetch = asyncio.ensure_future(desk.dispatcher.fetch([], 0, b"root"))
    await desk.settle()
    desk.running.cancel()
    with pytest.raises(Unavailable):
        await asyncio.wait_for(fetch, TIMEOUT_S)


async def test_a_fetch_has_its_answer():
    desk = Desk()
    fetch = asyncio.ensure_future(desk.dispatcher.fetch([], 16, b"root"))
    await desk.settle()
    (command,) = desk.link.take(9, 0)
    assert command == FetchBlocks(command.fetch_id, (), 16, b"root")
    desk.link.emit([BlocksFetched(command.fetch_id, 0, ())])
    assert (await asyncio.wait_for(fetch, TIMEOUT_S)).fetch_id == command.fetch_id
    assert not desk.dispatcher._fetches
    desk.link.close()
    await desk.until_over()


async def test_an_owner_that_raises_ends_its_own_sequence_and_hears_of_the_end(caplog):
    desk = Desk()
    heard = []

    def raises(event):
        heard.append(event)
        if isinstance(event, TokenNews):
            raise ValueError("no text for these")

    desk.dispatcher.own(KEY, raises)
    desk.own(OTHER)
    desk.link.emit([Promised(KEY, 0), tokens(KEY, OTHER), tokens(KEY, OTHER)])
    await desk.settle()
    assert desk.link.take(9, 0) == [CancelSequence(KEY, FinishReason.ERROR)]
    ended = Ended(KEY, FinishReason.ERROR, "internal_error", "…")
    desk.link.emit([tokens(KEY, OTHER), ended])
    await desk.settle()
    assert [type(event) for event in heard] == [Promised, TokenNews, Ended]
    assert len(desk.heard[OTHER]) == 3
    assert len([record for record in caplog.records if record.exc_info]) == 1
    assert desk.dispatcher.num_owned == 1
    desk.link.close()
    await desk.until_over()
