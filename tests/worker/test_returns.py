"""The second turn of a chat: blocks that decode produced come back to prefill, and what does not come is computed."""

import asyncio

import pytest

from twostroke.core.request import Role
from twostroke.kv.config import CacheConfig
from twostroke.protos import worker_pb2
from twostroke.worker.blocks.fetch import FetchService

PROMPT_TOKENS, ANSWER_TOKENS, MORE_TOKENS = 200, 60, 90
HELD = (PROMPT_TOKENS + ANSWER_TOKENS - 1) // 16 * 16  # after the first turn, on the decode worker alone
SAMPLING = {"max_tokens": ANSWER_TOKENS, "temperature": 1.0, "seed": 3, "ignore_eos": True}
WAIT_S = 60.0


class Chat:
    """Two workers after a first turn, and a third one that says what the second turn must be."""

    def __init__(self, prefill, decode, hand, turn, truth):
        self.prefill, self.decode, self.hand, self.turn, self.truth = prefill, decode, hand, turn, truth

    def peer(self, *sources, blocks=HELD // 16):
        """The prefill worker, as an order names it that has blocks fetched from `sources`."""
        return worker_pb2.PrefillPeer(
            worker_id=self.prefill.settings.worker_id,
            incarnation=self.prefill.incarnation,
            address=self.prefill.address,
            block_sources=[
                worker_pb2.BlockSource(worker_id=name, incarnation=1, address=address, num_blocks=blocks)
                for name, address in sources
            ],
        )

    @property
    def holder(self):
        return self.decode.settings.worker_id, self.decode.address

    async def second(self, *sources, name="second", **options):
        """The second turn, which must say what it says without a fetch; returns the report of its hand-over."""
        blocks = options.pop("blocks", HELD // 16)
        answer = await self.hand.submit(
            name, self.turn, [self.peer(*sources, blocks=blocks)], sampling=SAMPLING, **options
        )
        await answer.ended(WAIT_S)
        if "domain" not in options:
            assert answer.token_ids == self.truth
        return answer.end.handover


@pytest.fixture
async def chat(start_worker, router_of, make_prompt):
    prefill, decode, alone = [await start_worker(role) for role in (Role.PREFILL, Role.DECODE, Role.COMBINED)]
    hand, one = await router_of(decode), await router_of(alone)
    prompt = make_prompt(PROMPT_TOKENS)
    first = await (await hand.submit("first", prompt, [prefill], sampling=SAMPLING)).ended(WAIT_S)
    turn = [*prompt, *first.token_ids, *make_prompt(MORE_TOKENS, 7)]
    truth = await (await one.submit("truth", turn, sampling=SAMPLING)).ended(WAIT_S)
    return Chat(prefill, decode, hand, turn, truth.token_ids)


async def test_the_answer_comes_back_and_only_the_new_turn_is_computed(chat, make_prompt, all_free):
    told = await chat.second(chat.holder)
    assert (told.prefill_worker, told.tokens_held) == (chat.prefill.settings.worker_id, HELD)
    assert told.prefill_cached_tokens == HELD
    held_before = PROMPT_TOKENS // 16 * 16
    assert told.prefill_fetched_tokens == HELD - held_before
    assert (told.prefill_fetched_from, told.prefill_fetch_end) == (chat.decode.settings.worker_id, "complete")
    assert told.tokens_moved == len(chat.turn) - HELD, "decode gets what it lacks, and no more"
    counters = chat.prefill.counters
    assert (counters["prefill_fetched_tokens"], counters["prefill_returns_kept"]) == (HELD - held_before, 1)
    other = [*chat.turn[:-40], *make_prompt(60, 9)]
    answer = await chat.hand.submit("again", other, [chat.peer(chat.holder)], sampling=SAMPLING)
    again = (await answer.ended(WAIT_S)).end.handover
    assert again.prefill_worker == chat.prefill.settings.worker_id
    assert (again.prefill_fetched_tokens, again.prefill_fetch_end) == (0, ""), "it is here already"
    assert counters["prefill_returns_given_up"] == 1, "no blocks were taken for it"
    await all_free(chat.prefill, chat.decode)


async def test_without_a_source_it_is_computed(chat, all_free):
    told = await chat.second()
    assert (told.prefill_fetched_tokens, told.prefill_cached_tokens) == (0, PROMPT_TOKENS // 16 * 16)
    assert chat.prefill.counters["prefill_returns_kept"] == 0
    await all_free(chat.prefill, chat.decode)


@pytest.mark.parametrize("fault", ["unreachable", "breaks", "knows less", "damaged"])
async def test_what_does_not_come_is_computed(chat, monkeypatch, all_free, fault):
    frames, num_frames = FetchService._frames, 0

    async def treated(service, wanted):
        nonlocal num_frames
        async for frame in frames(service, wanted):
            num_frames += 1
            if fault == "breaks" and num_frames == 2:
                raise RuntimeError("the source breaks")
            yield frame[:-3] + bytes([frame[-3] ^ 1]) + frame[-2:] if fault == "damaged" else frame

    monkeypatch.setattr(FetchService, "_frames", treated)
    source = ("nobody", "127.0.0.1:1") if fault == "unreachable" else chat.holder
    if fault == "knows less":
        nobody = ("nobody", "127.0.0.1:1")
        told = await chat.second(source, nobody, blocks=len(chat.turn) // 16 + 9)
        assert chat.prefill.counters["fetch_short"] == 1, "so the next one is asked"
        assert told.prefill_fetched_from == chat.decode.settings.worker_id
    else:
        told = await chat.second(source)
    ends = {"unreachable": "empty", "breaks": "closed", "knows less": "empty", "damaged": "corrupted"}
    assert chat.prefill.counters["fetch_corrupted"] == (2 if fault == "damaged" else 0), "it is asked once more"
    assert told.prefill_fetch_end == ends[fault]
    came = told.prefill_fetched_tokens
    most = HELD - PROMPT_TOKENS // 16 * 16
    assert {"unreachable": came == 0, "damaged": came == 0, "knows less": came == most, "breaks": 0 < came < most}[
        fault
    ], came
    assert told.recomputed_tokens == 0, "by the prefill worker, not by the decode worker"
    await all_free(chat.prefill, chat.decode)


async def test_the_next_source_gives_what_the_first_does_not(chat):
    told = await chat.second(("nobody", "127.0.0.1:1"), chat.holder)
    assert told.prefill_fetched_from == chat.decode.settings.worker_id
    assert told.prefill_cached_tokens == HELD


async def test_what_one_source_gave_is_not_asked_of_the_next_one(chat):
    told = await chat.second(chat.holder, chat.holder)
    assert told.prefill_fetched_tokens == HELD - PROMPT_TOKENS // 16 * 16
    assert chat.decode.counters["fetch_served_blocks"] * 16 == told.prefill_fetched_tokens


async def test_only_whole_blocks_of_its_pool_come(chat, start_worker, router_of, all_free):
    chat.prefill = await start_worker(Role.PREFILL, cache=CacheConfig(tokens=8192, frame_bytes=8192, block_size=32))
    told = await chat.second(chat.holder, blocks=15)
    assert told.prefill_fetched_tokens == told.prefill_cached_tokens == 224
    await all_free(chat.prefill, chat.decode)


async def test_another_tenant_gets_none_of_it(chat, all_free):
    told = await chat.second(chat.holder, domain="others")
    assert (told.prefill_fetched_tokens, told.prefill_cached_tokens, told.tokens_held) == (0, 0, 0)
    assert told.prefill_fetch_end == "empty"
    await all_free(chat.prefill, chat.decode)


async def test_a_cancelled_request_gives_up_its_fetch(chat, monkeypatch, all_free):
    frames, asked = FetchService._frames, asyncio.Event()

    async def slow(service, wanted):
        asked.set()
        await asyncio.sleep(WAIT_S)
        async for frame in frames(service, wanted):
            yield frame

    monkeypatch.setattr(FetchService, "_frames", slow)
    answer = await chat.hand.submit("second", chat.turn, [chat.peer(chat.holder)], sampling=SAMPLING)
    async with asyncio.timeout(WAIT_S):
        await asked.wait()
    await chat.hand.cancel("second")
    await answer.ended(WAIT_S)
    counters = chat.prefill.counters
    async with asyncio.timeout(WAIT_S):  # the cancellation is on its way
        while chat.prefill.faces.prefill.num_running or not counters["prefill_returns_given_up"]:
            await asyncio.sleep(0.01)
    assert counters["prefill_returns_given_up"] == 1
    await all_free(chat.prefill, chat.decode)


async def test_an_address_that_is_none_ends_the_request_with_its_name(chat):
    answer = await chat.hand.submit("bad", chat.turn, [chat.peer(("x", "file:///etc/passwd"))], sampling=SAMPLING)
    await answer.ended(WAIT_S)
    assert answer.end.error.code == "invalid_value"
    assert "block_sources.address" in answer.end.error.message
