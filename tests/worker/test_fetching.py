"""A stream that goes on at another worker takes its KV with it: blocks are fetched, and what breaks is computed."""

import asyncio
import time

import pytest
from support.engines.frames import damaged

from twostroke.core.request import Role
from twostroke.kv.config import CacheConfig
from twostroke.kv.handover.sources import MOST_LEFT_TOKENS
from twostroke.protos import worker_pb2
from twostroke.worker.blocks.fetch import FetchService

PROMPT_TOKENS = 300
NUM_TOKENS = 60
CUT = 30  # tokens that the client has when its stream goes on elsewhere
SAMPLING = {"max_tokens": NUM_TOKENS, "temperature": 1.0, "seed": 5, "ignore_eos": True, "logprobs": 1}
HELD = (PROMPT_TOKENS + CUT - 1) // 16 * 16


class Tap:
    """Stands between the source and its stream: what it does to each frame is set by the test."""

    def __init__(self, monkeypatch):
        self.num_frames = 0
        self.num_asked = 0
        self.treat = None  # async (number of the frame, frame) -> frame
        frames, tap = FetchService._frames, self

        async def tapped(service, wanted):
            tap.num_asked += 1
            async for frame in frames(service, wanted):
                tap.num_frames += 1
                yield frame if tap.treat is None else await tap.treat(tap.num_frames, frame)

        monkeypatch.setattr(FetchService, "_frames", tapped)


@pytest.fixture
def tap(monkeypatch):
    return Tap(monkeypatch)


def source_of(worker, blocks=HELD // 16):
    return worker_pb2.BlockSource(
        worker_id=worker.settings.worker_id, incarnation=1, address=worker.address, num_blocks=blocks
    )


class Moved:
    """A stream on a first worker, and the same from token CUT on on a second one."""

    def __init__(self, hands, prompt, whole):
        self.hands, self.prompt, self.whole = hands, prompt, whole

    async def go_on(self, sources, peers=(), name="moved"):
        answer = self.hands[1].answers.setdefault((name, 0), type(self.whole)())
        answer.token_ids += self.whole.token_ids[:CUT]
        ids = self.prompt + self.whole.token_ids[:CUT]
        return await self.hands[1].submit(
            name, ids, peers, sampling=SAMPLING, emitted_tokens=CUT, block_sources=sources
        )

    async def assert_same(self, answer):
        """The rest is what it would have been; returns the report of the second worker."""
        await answer.ended()
        assert answer.token_ids == self.whole.token_ids
        assert self.whole.text.endswith(answer.text)
        assert answer.end.reason == self.whole.end.reason
        return answer.end.handover


@pytest.fixture
async def workers(start_worker):
    return [await start_worker(Role.DECODE) for _ in range(3)]


@pytest.fixture
async def moved(workers, router_of, make_prompt):
    hands = [await router_of(worker) for worker in workers]
    prompt = make_prompt(PROMPT_TOKENS)
    whole = await (await hands[0].submit("whole", prompt, sampling=SAMPLING)).ended()
    return Moved(hands, prompt, whole)


async def test_its_blocks_are_fetched_and_only_the_last_part_is_computed(workers, moved, tap, all_free):
    first, second, _ = workers
    report = await moved.assert_same(await moved.go_on([source_of(first)]))
    assert (report.tokens_fetched, report.fetched_from, report.fetch_end) == (HELD, "decode-0", "complete")
    assert report.recomputed_tokens == PROMPT_TOKENS + CUT - HELD
    assert report.bytes_fetched > HELD * first.room.facts.model.kv_spec.bytes_per_token
    assert second.counters["fetched_blocks"] == first.counters["fetch_served_blocks"] == HELD // 16
    assert tap.num_frames > 2
    await all_free(first, second)


async def test_blocks_that_are_there_are_not_fetched_again(workers, moved, tap):
    await moved.assert_same(await moved.go_on([source_of(workers[0])], name="one"))
    asked = tap.num_asked
    report = await moved.assert_same(await moved.go_on([source_of(workers[0])], name="two"))
    assert (report.tokens_fetched, report.fetch_end, tap.num_asked) == (0, "", asked)
    assert report.tokens_held == HELD


async def test_blocks_of_unlike_sizes_fit(start_worker, router_of, make_prompt, all_free):
    caches = [CacheConfig(tokens=8192, frame_bytes=8192, block_size=size) for size in (32, 16)]
    unlike = [await start_worker(Role.DECODE, cache=cache) for cache in caches]
    for first, second in (unlike, unlike[::-1]):
        hands = [await router_of(first), await router_of(second)]
        prompt = make_prompt(PROMPT_TOKENS, salt=1 + unlike.index(first))
        whole = await (await hands[0].submit("whole", prompt, sampling=SAMPLING)).ended()
        report = await Moved(hands, prompt, whole).assert_same(
            await Moved(hands, prompt, whole).go_on([source_of(first)])
        )
        assert report.tokens_fetched >= HELD - 16
    await all_free(*unlike)


@pytest.mark.parametrize("fault", ["unreachable", "knows nothing", "dies at once", "dies later"])
async def test_a_source_that_fails_costs_time_only(workers, moved, tap, all_free, fault):
    first, second, empty = workers
    source = source_of(first)
    if fault == "unreachable":
        source.address = "127.0.0.1:1"
    elif fault == "knows nothing":
        source.address = empty.address
    else:

        async def treat(number, frame):
            if number == (1 if fault == "dies at once" else 3):
                raise RuntimeError("the source breaks")
            return frame

        tap.treat = treat
    report = await moved.assert_same(await moved.go_on([source]))
    kept = report.tokens_fetched
    assert (0 < kept < HELD) if fault == "dies later" else kept == 0
    assert report.fetch_end == ("closed" if kept else "empty")
    assert report.recomputed_tokens == PROMPT_TOKENS + CUT - kept
    await all_free(first, second)


async def test_the_next_source_goes_on_where_the_first_one_failed(workers, moved, tap, router_of, all_free):
    first, second, other = workers
    await (await moved.hands[2].submit("copy", moved.prompt, sampling=SAMPLING)).ended()

    async def treat(number, frame):
        if number == 3:
            raise RuntimeError("the source breaks")
        return frame

    tap.treat = treat
    report = await moved.assert_same(await moved.go_on([source_of(first), source_of(other)]))
    assert (report.tokens_fetched, report.fetched_from, tap.num_asked) == (HELD, "decode-2", 2)
    assert other.counters["fetch_served_blocks"] < HELD // 16
    await all_free(first, second, other)


async def test_what_arrives_damaged_is_fetched_once_more(workers, moved, tap, all_free):
    async def treat(number, frame):
        return damaged(frame, None) if number == 2 else frame

    tap.treat = treat
    report = await moved.assert_same(await moved.go_on([source_of(workers[0])]))
    assert (report.tokens_fetched, report.fetch_end, tap.num_asked) == (HELD, "complete", 2)
    assert workers[1].counters["kv_corrupted_frames"] == 1
    await all_free(*workers)


async def test_what_arrives_damaged_twice_is_computed(workers, moved, tap, all_free):
    async def treat(number, frame):
        return damaged(frame, None) if number > 1 else frame

    tap.treat = treat
    report = await moved.assert_same(await moved.go_on([source_of(workers[0])]))
    assert report.fetch_end == "corrupted"
    assert 0 < report.tokens_fetched < HELD
    assert (tap.num_asked, workers[1].counters["fetch_corrupted"]) == (2, 2)
    await all_free(*workers)


async def test_a_peer_computes_what_no_source_has(workers, moved, start_worker, tap, all_free):
    prefill = await start_worker(Role.PREFILL)

    async def treat(number, frame):
        if number == 3:
            raise RuntimeError("the source breaks")
        return frame

    tap.treat = treat
    report = await moved.assert_same(await moved.go_on([source_of(workers[0])], [prefill]))
    assert 0 < report.tokens_fetched < HELD
    assert report.prefill_worker == prefill.settings.worker_id
    assert report.tokens_moved == PROMPT_TOKENS + CUT - report.tokens_fetched
    tap.treat = None
    await moved.hands[1].submit("x", [1, 2, 3])
    report = await moved.assert_same(await moved.go_on([source_of(workers[0])], [prefill], name="again"))
    assert report.prefill_worker == "", "fewer than MOST_LEFT_TOKENS are missing"
    assert report.recomputed_tokens < MOST_LEFT_TOKENS
    await all_free(*workers, prefill)


async def test_a_cancel_ends_the_fetch(workers, moved, tap, all_free):
    held = asyncio.Event()

    async def treat(number, frame):
        if number == 2:
            held.set()
            await asyncio.Event().wait()
        return frame

    tap.treat = treat
    answer = await moved.go_on([source_of(workers[0])])
    await asyncio.wait_for(held.wait(), 60)
    await moved.hands[1].cancel("moved")
    await answer.ended()
    assert answer.end.handover.fetch_end in ("", "cancelled")
    await all_free(*workers)


@pytest.mark.usefixtures("usual_leases")
async def test_a_silent_source_is_left_for_another_way(workers, moved, tap, all_free):
    async def treat(number, frame):
        if number == 2:
            await asyncio.Event().wait()
        return frame

    tap.treat = treat
    report = await moved.assert_same(await moved.go_on([source_of(workers[0])]))
    assert report.fetch_end == "silent"
    assert 0 < report.tokens_fetched < HELD
    await all_free(*workers)


async def test_a_source_that_is_killed_while_it_is_fetched_from(workers, moved, tap, all_free):
    held = asyncio.Event()

    async def treat(number, frame):
        if number == 3:
            held.set()
            await asyncio.Event().wait()
        return frame

    tap.treat = treat
    answer = await moved.go_on([source_of(workers[0])])
    await asyncio.wait_for(held.wait(), 60)
    await workers[0].stop(0.0)
    report = await moved.assert_same(answer)
    assert report.fetch_end in ("closed", "silent")
    assert 0 < report.tokens_fetched < HELD
    await all_free(workers[1])


# ---------------------------------------------------------------- drain


async def begun(hand, prompt, name, count=CUT):
    """A long stream on a worker, after some tokens."""
    long = {**SAMPLING, "max_tokens": 1500}
    answer = await hand.submit(name, prompt, sampling=long)
    return await answer.until(lambda told: len(told.token_ids) >= count)


async def test_a_draining_worker_keeps_what_it_gave_back_until_it_is_fetched(
    workers, router_of, make_prompt, monkeypatch
):
    first, second, _ = workers
    hands = [await router_of(first), await router_of(second)]
    prompt = make_prompt(PROMPT_TOKENS)
    given = await begun(hands[0], prompt, "r")
    first.faces.departing.departure.quiet_s = 60.0
    draining = asyncio.create_task(first.drain(0.0, time.monotonic() + 60.0))
    await given.ended()
    assert not draining.done(), "it waits for those who go on"
    emitted = list(given.token_ids)
    long = {**SAMPLING, "max_tokens": len(emitted) + 5}
    answer = hands[1].answers.setdefault(("r", 0), type(given)())
    answer.token_ids += emitted
    blocks = (PROMPT_TOKENS + len(emitted)) // 16
    await hands[1].submit(
        "r", prompt + emitted, sampling=long, emitted_tokens=len(emitted), block_sources=[source_of(first, blocks)]
    )
    assert await asyncio.wait_for(draining, 60) == 1
    await answer.ended()
    assert answer.end.handover.tokens_fetched >= (PROMPT_TOKENS + CUT - 1) // 16 * 16
    await first.stop(0.0)


async def test_a_draining_worker_leaves_if_nobody_comes(workers, router_of, make_prompt):
    first = workers[0]
    hand = await router_of(first)
    given = await begun(hand, make_prompt(PROMPT_TOKENS), "r")
    first.faces.departing.departure.quiet_s = 0.05
    assert await asyncio.wait_for(first.drain(0.0, time.monotonic() + 60.0), 60) == 1
    await given.ended()
    assert first.faces.departing.departure.num_left == 1


async def test_the_deadline_of_a_drain_ends_the_wait(workers, router_of, make_prompt):
    first = workers[0]
    hand = await router_of(first)
    await begun(hand, make_prompt(PROMPT_TOKENS), "r")
    first.faces.departing.departure.quiet_s = 60.0
    await asyncio.wait_for(first.stop(0.5), 60)
