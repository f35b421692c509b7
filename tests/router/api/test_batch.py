"""Several prompts as one request: their pieces in one stream, and the names under which they are known."""

import asyncio
from collections.abc import AsyncGenerator

import pytest

from twostroke.core.errors import InternalError, Overloaded, WorkerLost
from twostroke.core.request import FinishReason
from twostroke.router.api.batch import MAX_NAMES, Lists, explain_list, merged, streams_at_once
from twostroke.router.requests.pieces import OutputDelta, TokenUsage


class Source:
    """A stream of a prompt with two choices, which ends when it is told to."""

    def __init__(self, num_pieces: int, error: Exception | None = None) -> None:
        self.may_end = asyncio.Event()
        self.was_closed = False
        self.num_taken = 0
        self._num_pieces = num_pieces
        self._error = error

    async def pieces(self) -> AsyncGenerator[OutputDelta, None]:
        try:
            for index in range(self._num_pieces):
                self.num_taken += 1
                yield OutputDelta(index % 2, index // 2, (index,), f"{index} ")
            await self.may_end.wait()
            if self._error is not None:
                raise self._error
            yield OutputDelta(1, self._num_pieces, (), "", FinishReason.STOP, TokenUsage(3, self._num_pieces, 1))
        finally:
            self.was_closed = True


def stream_of(*sources: Source) -> AsyncGenerator[OutputDelta, None]:
    return merged([source.pieces for source in sources], 2, at_once=len(sources), patience_s=0)


async def test_choices_are_numbered_through_and_usage_is_summed_once():
    sources = [Source(4), Source(2), Source(6)]
    for source in sources:
        source.may_end.set()
    pieces = [piece async for piece in stream_of(*sources)]
    texts = [""] * 6
    for piece in pieces:
        texts[piece.choice] += piece.text
    assert texts == ["0 2 ", "1 3 ", "0 ", "1 ", "0 2 4 ", "1 3 5 "]
    assert [piece.usage for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].usage == TokenUsage(9, 12, 3)
    assert [source.was_closed for source in sources] == [True] * 3


@pytest.mark.parametrize("first", [0, 1])
async def test_usage_comes_last_whichever_prompt_ends_first(first: int):
    sources = [Source(2), Source(2)]
    sources[first].may_end.set()
    stream = stream_of(*sources)
    early = [await anext(stream) for _ in range(5)]
    assert [piece.finish_reason for piece in early].count(FinishReason.STOP) == 1
    assert all(piece.usage is None for piece in early)
    sources[1 - first].may_end.set()
    assert [piece.usage async for piece in stream] == [TokenUsage(6, 4, 2)]


@pytest.mark.parametrize("error", [WorkerLost("gone", retry_after_s=1.0), Overloaded("full", retry_after_s=1.0)])
async def test_one_prompts_failure_ends_the_others(error: Exception):
    sources = [Source(1), Source(0, error), Source(1)]
    sources[1].may_end.set()
    with pytest.raises(type(error)):
        async for _ in stream_of(*sources):
            pass
    assert [source.was_closed for source in sources] == [True] * 3


async def test_closing_closes_every_prompt():
    sources = [Source(1), Source(1)]
    stream = stream_of(*sources)
    await anext(stream)
    await stream.aclose()
    assert [source.was_closed for source in sources] == [True] * 2


async def test_a_client_that_reads_nothing_leaves_the_pieces_where_they_are():
    """So that the router's own bound for slow clients holds for lists, too."""
    sources = [Source(10_000), Source(10_000)]
    stream = stream_of(*sources)
    await anext(stream)
    for _ in range(200):
        await asyncio.sleep(0)
    assert sum(source.num_taken for source in sources) < 20
    await stream.aclose()


def test_names_belong_to_a_tenant_and_are_bounded():
    lists = Lists()
    lists.add("key-1", "mine", 2)
    assert lists.requests("key-1", "mine") == ["mine-0", "mine-1"]
    assert lists.requests("key-2", "mine") == []
    for place in range(MAX_NAMES):
        lists.add("key-2", f"list{place}", 1)
    assert lists.requests("key-1", "mine") == []


@pytest.mark.parametrize(
    ("states", "state"),
    [
        (("finished", "running"), "running"),
        (("finished", "cancelled", "failed"), "failed"),
        (("finished", "finished"), "finished"),
    ],
)
def test_a_lists_state_is_the_one_that_tells_most(states: tuple[str, ...], state: str):
    known = {f"x-{place}": {"state": one} for place, one in enumerate(states)}
    explained = explain_list("x", [*known, "x-forgotten"], known.get)
    assert explained is not None
    assert (explained["state"], explained["prompts"]) == (state, list(known.values()))
    assert explain_list("x", ["x-forgotten"], known.get) is None


async def test_only_so_many_prompts_run_at_once():
    sources = [Source(2) for _ in range(5)]
    stream = merged([source.pieces for source in sources], 2, at_once=2, patience_s=5)
    await anext(stream)
    await asyncio.sleep(0)
    assert [source.num_taken > 0 for source in sources] == [True, True, False, False, False]
    for source in sources:
        source.may_end.set()
    rest = [piece async for piece in stream]
    assert len(rest) == 14
    assert rest[-1].usage == TokenUsage(15, 10, 5)


async def test_a_prompt_in_turn_waits_for_room_and_one_of_the_first_does_not():
    refusals = iter([Overloaded("full", retry_after_s=0.001)] * 2)
    waiting = Source(2)
    waiting.may_end.set()

    def start() -> AsyncGenerator[OutputDelta, None]:
        error = next(refusals, None)
        refused = Source(0, error)
        refused.may_end.set()
        return waiting.pieces() if error is None else refused.pieces()

    first = Source(1)
    first.may_end.set()
    pieces = [piece async for piece in merged([first.pieces, start], 2, at_once=1, patience_s=5)]
    assert pieces[-1].usage == TokenUsage(6, 3, 2)
    refusals = iter([Overloaded("full", retry_after_s=0.001)])
    with pytest.raises(Overloaded):
        [piece async for piece in merged([start], 2, at_once=1, patience_s=5)]


def test_long_prompts_and_many_choices_run_fewer_at_once():
    assert [streams_at_once(1, 10), streams_at_once(8, 10), streams_at_once(1, 8192), streams_at_once(128, 1)] == [
        *(64, 8, 8, 1)
    ]
    assert streams_at_once(1, 10**6) == 1


async def test_a_stream_that_ends_without_its_last_piece_is_an_error_and_no_wait():
    async def cut_short() -> AsyncGenerator[OutputDelta, None]:
        yield OutputDelta(0, 0, (1,), "a")

    async with asyncio.timeout(60):
        with pytest.raises(InternalError):
            [piece async for piece in merged([cut_short], 1, at_once=1, patience_s=0)]


async def test_a_prompt_that_has_begun_does_not_begin_again():
    class Full(Source):
        num_begun = 0

        async def pieces(self) -> AsyncGenerator[OutputDelta, None]:
            Full.num_begun += 1
            async for piece in super().pieces():
                yield piece

    first, full = Source(1), Full(1, Overloaded("full", retry_after_s=0.001))
    for source in (first, full):
        source.may_end.set()
    with pytest.raises(Overloaded):
        [piece async for piece in merged([first.pieces, full.pieces], 2, at_once=1, patience_s=5)]
    assert Full.num_begun == 1
