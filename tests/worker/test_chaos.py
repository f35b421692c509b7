"""Two real workers with a hostile network between them: no text changes, every request ends, every block comes back."""

import asyncio
import random
from collections import Counter

import pytest
from support.clusters.chaos import LASTING, ChaosProxy, Fault, Plan
from support.engines.workers import RouterHand

from twostroke.core.request import Role
from twostroke.kv.config import CacheConfig
from twostroke.protos import common_pb2

LONG = 320
NUM_PROMPTS = 4
SAMPLED = {"max_tokens": 6, "temperature": 1.0}
GOOD_ENDS = {common_pb2.FINISH_REASON_STOP, common_pb2.FINISH_REASON_LENGTH}


@pytest.fixture(params=["grpc", "shm", pytest.param("gloo", marks=pytest.mark.campaign)])
async def chaotic(request, usual_leases, start_worker, router_of, make_prompt):
    """Prefill and decode worker with a proxy between them, a session, and the calm texts: prompt by three choices."""
    cache = CacheConfig(tokens=8192, frame_bytes=8192, transport=request.param, prefix_caching=False)
    prefill, decode = [await start_worker(role, cache=cache) for role in (Role.PREFILL, Role.DECODE)]
    alone = await router_of(await start_worker(Role.COMBINED, cache=cache))
    calm = {}
    for salt in range(NUM_PROMPTS):
        for choice in range(3):
            answer = await alone.submit(f"c{salt}", make_prompt(LONG, salt), choice=choice, sampling=SAMPLED)
            calm[salt, choice] = (await answer.ended()).token_ids
    proxy = ChaosProxy(seed=1)
    await proxy.start(prefill.address)
    prefill._guard.audience = proxy.address  # by which it is known now
    yield prefill, decode, await router_of(decode), proxy, calm
    await proxy.close()


async def play(chaotic, make_prompt, all_free, plans) -> Counter[str]:
    """Three choices of one prompt per plan; returns how the hand-overs went."""
    prefill, decode, hand, proxy, calm = chaotic
    went: Counter[str] = Counter()
    for number, plan in enumerate(plans):
        proxy.set(plan)
        salt, name = number % NUM_PROMPTS, f"r{number}"
        choices = [
            await hand.submit(name, make_prompt(LONG, salt), [proxy.address], choice=choice, sampling=SAMPLED)
            for choice in range(3)
        ]
        for choice, answer in enumerate(choices):
            await answer.ended(60.0)
            assert answer.end.reason in GOOD_ENDS, (plan, answer.end)
            assert answer.token_ids == calm[salt, choice], plan
            went[answer.end.handover.local_reason or "whole"] += 1
        proxy.set(None)
        await all_free(prefill, decode, timeout_s=30.0)
        assert decode.faces.rings is None or not decode.faces.rings.used, plan
    await all_free(prefill, decode)
    return went


def plans_of(seed: int, count: int) -> list[Plan | None]:
    """Every fault in every direction in turn, at a random byte of a hand-over's."""
    rng = random.Random(seed)
    kinds = [(fault, direction) for fault in Fault for direction in ("up", "down")]
    rng.shuffle(kinds)
    most = {"up": 12_000, "down": 130_000}  # bytes of three hand-overs: orders, and planes
    chosen = [kinds[number % len(kinds)] for number in range(count)]
    return [Plan(fault, way, int(most[way] * rng.random() ** 2)) for fault, way in chosen]


@pytest.mark.timeout(600)
async def test_a_hostile_network_changes_no_text_and_keeps_no_block(chaotic, make_prompt, all_free):
    calm = await play(chaotic, make_prompt, all_free, [None])
    assert set(calm) == {"whole"}, calm
    proxy = chaotic[3]
    went = await play(chaotic, make_prompt, all_free, plans_of(0, 2 * len(Fault)))
    assert proxy.num_done > len(Fault), "the faults do not happen"
    assert went["whole"], went
    assert went.total() > went["whole"], "no fault was felt"


@pytest.mark.campaign
@pytest.mark.timeout(3600)
async def test_many_faults_at_many_bytes(chaotic, make_prompt, all_free):
    went = await play(chaotic, make_prompt, all_free, plans_of(1, 600))
    print(f"{chaotic[3].num_done} faults in 600 requests of three choices: {dict(went)}")
    assert {"whole", "peer_closed"} <= set(went), went


async def test_a_peer_that_never_answers_does_not_hold_up_others(chaotic, make_prompt, all_free):
    prefill, decode, hand, proxy, calm = chaotic
    hole = ChaosProxy()
    await hole.start(prefill.address)
    hole.set(Plan(Fault.STALL, "up", 1))  # nothing but one byte ever reaches a server
    try:
        stuck = await hand.submit("stuck", make_prompt(LONG, 0), [hole.address], sampling=SAMPLED)
        for number in range(3):
            answer = await hand.submit(f"r{number}", make_prompt(LONG, 1), [proxy.address], sampling=SAMPLED)
            await answer.ended(60.0)
            assert answer.token_ids == calm[1, 0]
            assert answer.end.handover.local_reason == ""
        await stuck.ended(60.0)
        assert stuck.token_ids == calm[0, 0]
        assert stuck.end.handover.local_reason in ("peer_silent", "peer_closed")
    finally:
        await hole.close()
    await all_free(prefill, decode)


def test_every_fault_is_planned():
    assert {plan.fault for plan in plans_of(0, 2 * len(Fault)) if plan} == set(Fault)
    assert set(LASTING) < set(Fault)


async def test_a_router_behind_a_hostile_network_has_a_prefix_and_leaves_no_block(start_worker, make_prompt, all_free):
    decode = await start_worker(Role.COMBINED)
    sampling = {"max_tokens": 60, "temperature": 0.0, "ignore_eos": True}
    async with RouterHand(decode.address) as hand:
        calm = (await (await hand.submit("calm", make_prompt(48), sampling=sampling)).ended()).token_ids
    proxy = ChaosProxy(seed=2)
    await proxy.start(decode.address)
    decode._guard.audience = proxy.address
    rng = random.Random(3)
    complete = []
    try:
        for number, fault in enumerate(fault for fault in Fault for _ in range(2)):
            proxy.set(None)
            async with RouterHand(proxy.address, incarnation=10 + number) as hand:
                proxy.set(Plan(fault, "down", rng.randrange(3_000)))
                answer = await hand.submit(f"r{number}", make_prompt(48), sampling=sampling)
                ended = asyncio.create_task(answer.ended(60.0 if fault in LASTING else 3.0))
                await asyncio.wait({ended, hand._reader}, return_when=asyncio.FIRST_COMPLETED)
                ended.cancel()
                await asyncio.gather(ended, return_exceptions=True)
                proxy.set(None)
            assert answer.token_ids == calm[: len(answer.token_ids)], fault
            if answer.ends:
                complete.append(fault)
                assert answer.token_ids == calm, "an end is said after the last token only"
            await all_free(decode, timeout_s=10.0)
    finally:
        await proxy.close()
    assert set(LASTING) <= set(complete)
    assert len(complete) < 2 * len(Fault), "no session broke"
