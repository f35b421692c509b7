"""A buddy keeps a copy of a stream's KV: after a kill the next worker has it from there."""

import asyncio

import pytest

from twostroke.core.request import CacheScope, Role
from twostroke.kv.config import CacheConfig
from twostroke.protos import handover_pb2, worker_pb2
from twostroke.worker.blocks.fetch import FetchService

PROMPT_TOKENS = 200
SAMPLING = {"max_tokens": 400, "temperature": 1.0, "seed": 5, "ignore_eos": True}


def peer_of(worker):
    return worker_pb2.PrefillPeer(worker_id=worker.settings.worker_id, incarnation=1, address=worker.address)


def source_of(worker, blocks):
    return worker_pb2.BlockSource(
        worker_id=worker.settings.worker_id, incarnation=1, address=worker.address, num_blocks=blocks
    )


async def until(condition, timeout_s=60.0):
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


async def held_tokens(worker, ids):
    """Leading tokens of a chain that a worker has in its cache."""
    names = worker.room.facts.namer.name(ids, CacheScope("tests", b""))
    found = await worker.dispatcher.fetch(names.identities, 0, names.root)
    return found.num_blocks * 16


@pytest.mark.parametrize("with_prefill", [False, True])
async def test_a_killed_workers_stream_goes_on_from_its_buddys_copy(
    start_worker, router_of, make_prompt, all_free, with_prefill
):
    first, heir = [await start_worker(Role.DECODE) for _ in range(2)]
    buddy = await start_worker(Role.PREFILL if with_prefill else Role.DECODE)
    hands = [await router_of(first), await router_of(heir)]
    prompt = make_prompt(PROMPT_TOKENS)
    peers = [buddy] if with_prefill else []
    whole = await (await hands[1].submit("whole", prompt, sampling=SAMPLING, domain="other")).ended()
    answer = await hands[0].submit("r", prompt, peers, sampling=SAMPLING, buddy=peer_of(buddy))
    await until(lambda: first.counters["journal_offers"] >= 2)
    await answer.ended()
    assert answer.token_ids == whole.token_ids
    emitted = whole.token_ids[:100]
    assert await held_tokens(buddy, prompt + emitted) == (PROMPT_TOKENS + 100) // 16 * 16
    if with_prefill:
        assert buddy.counters["fetched_blocks"] * 16 < 400, "it had the prompt"
    await all_free(first, buddy)
    await first.stop(0.0)
    resumed = hands[1].answers.setdefault(("r", 0), type(whole)())
    resumed.token_ids += emitted
    sources = [source_of(buddy, (PROMPT_TOKENS + 100) // 16)]
    await hands[1].submit("r", prompt + emitted, sampling=SAMPLING, emitted_tokens=100, block_sources=sources)
    await resumed.ended()
    assert resumed.token_ids == whole.token_ids
    report = resumed.end.handover
    assert (report.tokens_fetched, report.fetch_end) == ((PROMPT_TOKENS + 99) // 16 * 16, "complete")
    await all_free(heir, buddy)


async def test_a_buddy_that_is_full_keeps_nothing_and_is_asked_again_later(
    start_worker, router_of, make_prompt, all_free
):
    first = await start_worker(Role.DECODE)
    buddy = await start_worker(Role.DECODE, cache=CacheConfig(tokens=192, frame_bytes=8192))
    hand = await router_of(first)
    answer = await hand.submit("r", make_prompt(PROMPT_TOKENS), sampling=SAMPLING, buddy=peer_of(buddy))
    await answer.ended()
    assert first.counters["journal_offers"] == 0, (first.counters, buddy.counters)
    assert 1 <= buddy.counters["keeps_refused"] == first.counters["journal_refused"] <= 3, (
        "it is asked ever more rarely"
    )
    await all_free(first, buddy)


@pytest.mark.parametrize("fault", ["dies", "damaged", "is gone"])
async def test_an_offer_that_fails_costs_the_stream_nothing(
    start_worker, router_of, make_prompt, all_free, monkeypatch, *, fault
):
    first, buddy = [await start_worker(Role.DECODE) for _ in range(2)]
    hand = await router_of(first)
    frames = FetchService._frames

    async def broken(service, wanted):
        async for frame in frames(service, wanted):
            if fault == "dies":
                raise RuntimeError("the source breaks")
            yield frame[:-5] + bytes([frame[-5] ^ 0x40]) + frame[-4:]

    monkeypatch.setattr(FetchService, "_frames", broken)
    address = peer_of(buddy)
    if fault == "is gone":
        address.address = "127.0.0.1:1"
    answer = await hand.submit("r", make_prompt(PROMPT_TOKENS), sampling=SAMPLING, buddy=address)
    await answer.ended()
    await until(lambda: first.counters["journal_refused"] >= 1)
    assert len(answer.token_ids) == 400
    assert first.counters["journal_offers"] == 0, (first.counters, buddy.counters)
    assert await held_tokens(buddy, make_prompt(PROMPT_TOKENS)) == 0
    await all_free(first, buddy)


async def test_a_malformed_offer_is_refused(start_worker, make_prompt):
    buddy = await start_worker(Role.DECODE)
    root = buddy.room.facts.namer.root(CacheScope("tests", b""))

    async def offer(**changes):
        wanted = {"token_ids": make_prompt(32), "isolation_domain": "tests", "identity_root": root} | changes
        request = handover_pb2.KeepRequest(address="127.0.0.1:1", **wanted).SerializeToString()
        return handover_pb2.KeepReply.FromString(await buddy._channels.keep(buddy.address, request, 10.0))

    for wrong in ({"token_ids": make_prompt(33)}, {"token_ids": []}, {"token_ids": [10**6] * 16}):
        with pytest.raises(Exception, match="INVALID_ARGUMENT"):
            await offer(**wrong)
    assert (await offer(identity_root=b"another")).reason == "weights, numerics or keys differ"
    assert (await offer()).reason == "not all blocks came"
    assert buddy.dispatcher.num_owned == 0
