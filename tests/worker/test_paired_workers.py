"""Real workers whose planes go through a paired channel of gloo, and what becomes of requests when it fails."""

import asyncio
import os
import signal
import sys

import pytest
from support.engines.scripted_pair import FailingCommunicator, Wire
from support.engines.worker_main import MAIN, settings_for

from twostroke.core.request import Role
from twostroke.kv.config import CacheConfig

LONG, WAIT_S = 320, 120.0


def cache(**changes):
    return CacheConfig(tokens=8192, frame_bytes=8192, frame_slots=4, prefix_caching=False, **changes)


@pytest.fixture
def start_pair(start_worker, router_of):
    async def start(prefill="auto", decode="gloo", **changes):
        first = await start_worker(Role.PREFILL, cache=cache(transport=prefill))
        second = await start_worker(Role.DECODE, cache=cache(transport=decode, **changes))
        return first, second, await router_of(second)

    return start


async def asked(hand, prefill, prompt, request_id="r", **options):
    return await (await hand.submit(request_id, prompt, [prefill], **options)).ended(WAIT_S)


async def opened(decode, prefill):
    """Wait until both ends of the channel are open."""
    async with asyncio.timeout(WAIT_S):
        while not (decode.faces.pairs.num_open and prefill.faces.pairing.num_open):
            await asyncio.sleep(0.01)


async def test_the_first_hand_over_makes_the_channel_and_later_ones_use_it(start_pair, make_prompt, all_free):
    prefill, decode, hand = await start_pair()
    first = await asked(hand, prefill, make_prompt(LONG, 1), "first")
    assert first.end.handover.transport == "grpc"
    assert first.end.handover.transport_reason == "the paired channel is being made"
    await opened(decode, prefill)
    many = [await hand.submit(f"r{number}", make_prompt(LONG, number % 2 + 1), [prefill]) for number in range(5)]
    for answer in many:
        await answer.ended(WAIT_S)
        handover = answer.end.handover
        assert (handover.transport, handover.transport_reason, handover.tokens_moved) == ("gloo", "", LONG)
        assert (handover.refetched_blocks, handover.recomputed_tokens) == (0, 0)
    assert many[0].token_ids == many[2].token_ids == many[4].token_ids
    assert first.token_ids == many[0].token_ids or first.token_ids == many[1].token_ids
    assert decode.counters["handover_decode_transfers"] >= 5 * 4
    await all_free(prefill, decode)


async def test_a_channel_that_fails_under_way_costs_one_more_read_and_no_token(
    start_pair, make_prompt, all_free, monkeypatch
):
    """Both ends are in this process: the fifth operation is one of the second hand-over."""

    class Failing(FailingCommunicator):
        FAILS_AT = 5

    def join(backend, store, host=""):
        return lambda rank, patience, told: Failing(backend, store, rank, patience, told, host=host)

    monkeypatch.setattr("twostroke.worker.faces.faces.join_by_torch", join)
    prefill, decode, hand = await start_pair()
    prompt = make_prompt(LONG, 3)
    truth = await asked(hand, prefill, prompt, "truth")
    await opened(decode, prefill)
    answer = await asked(hand, prefill, prompt)
    told = answer.end.handover
    assert answer.token_ids == truth.token_ids
    assert (told.transport, told.recomputed_tokens) == ("gloo", 0)
    assert told.refetched_blocks > 0
    assert decode.counters["handover_transfers_lost"] > 0
    async with asyncio.timeout(WAIT_S):
        while decode.faces.pairs.num_channels or prefill.faces.pairing.num_channels:
            await asyncio.sleep(0.01)
    later = await asked(hand, prefill, prompt, "later")
    assert later.token_ids == truth.token_ids
    assert later.end.handover.transport == "grpc"
    assert later.end.handover.transport_reason not in ("", "the paired channel is being made"), "which end was first"
    await all_free(prefill, decode)


async def test_a_library_that_hangs_at_its_start_holds_up_no_request(start_pair, make_prompt, all_free, monkeypatch):
    wire = Wire(hangs_at_init=True)
    monkeypatch.setattr("twostroke.worker.faces.faces.join_by_torch", lambda backend, store, host="": wire.join)
    prefill, decode, hand = await start_pair()
    for number in range(3):
        answer = await asked(hand, prefill, make_prompt(LONG, number), f"r{number}")
        assert answer.end.handover.transport == "grpc"
        assert answer.end.handover.transport_reason == "the paired channel is being made"
    assert (decode.faces.pairs.num_channels, decode.faces.pairs.num_open) == (1, 0)
    await all_free(prefill, decode)


async def test_a_required_channel_is_waited_for(start_pair, make_prompt, all_free):
    prefill, decode, hand = await start_pair(require_transport=True)
    for attempt in range(5):  # on a busy machine the two ends may need longer to meet than a request waits for them
        answer = await asked(hand, prefill, make_prompt(LONG, 40 + attempt), f"r{attempt}")
        if answer.end.handover.transport == "gloo":
            break
    assert (answer.end.handover.transport, answer.end.handover.tokens_moved) == ("gloo", LONG)
    await all_free(prefill, decode)


async def test_less_than_the_required_channel_is_computed_here_with_the_reason(start_pair, make_prompt, all_free):
    prefill, decode, hand = await start_pair(prefill="grpc", require_transport=True)
    answer = await asked(hand, prefill, make_prompt(LONG, 5))
    assert answer.end.handover.local_reason == "no_paired_channel"
    assert decode.faces.pairs.why_none(prefill.address) == "this prefill worker's cache.transport is grpc"
    await all_free(prefill, decode)


async def test_a_cancelled_request_leaves_the_channel_to_the_others(start_pair, make_prompt, all_free):
    prefill, decode, hand = await start_pair()
    await asked(hand, prefill, make_prompt(LONG, 6), "first")
    await opened(decode, prefill)
    for number in range(4):
        doomed = await hand.submit(f"d{number}", make_prompt(LONG, number), [prefill])
        other = await hand.submit(f"o{number}", make_prompt(LONG, number + 10), [prefill])
        await hand.cancel(f"d{number}")
        await other.ended(WAIT_S)
        await doomed.ended(WAIT_S)
        assert other.end.handover.transport == "gloo"
    assert decode.faces.pairs.num_open == 1
    await all_free(prefill, decode)


@pytest.mark.campaign
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("usual_leases")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_prefill_process_that_dies_or_freezes_costs_no_token(
    number, tiny_checkpoint, start_worker, router_of, make_prompt
):
    """Again and again, at moments spread over its hand-overs."""
    alone = await router_of(await start_worker(Role.COMBINED))
    decode = await start_worker(Role.DECODE, cache=cache(transport="gloo"))
    hand = await router_of(decode)
    truth = [(await (await alone.submit(f"t{n}", make_prompt(LONG, n))).ended(WAIT_S)).token_ids for n in range(6)]
    for attempt in range(6):
        settings = settings_for(tiny_checkpoint, role=Role.PREFILL, cache=cache(transport="auto"))
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", MAIN, settings.model_dump_json()),
            stdout=asyncio.subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        try:
            async with asyncio.timeout(WAIT_S):
                while b"serves at" not in (line := await process.stdout.readline()):
                    assert line, "it ended before it served"
            address = line.split()[-1].decode()
            await (await hand.submit(f"first{attempt}", make_prompt(LONG, 9), [address])).ended(WAIT_S)
            async with asyncio.timeout(WAIT_S):
                while decode.faces.pairs.get(address) is None:
                    await asyncio.sleep(0.01)
            before = decode.counters["handover_decode_transfers"]
            told = [await hand.submit(f"a{attempt}n{n}", make_prompt(LONG, n), [address]) for n in range(6)]
            async with asyncio.timeout(WAIT_S):
                while decode.counters["handover_decode_transfers"] < before + 1 + 3 * attempt:
                    await asyncio.sleep(0.001)
            process.send_signal(number)
            for n, answer in enumerate(told):
                await answer.ended(WAIT_S)
                assert answer.token_ids == truth[n], (attempt, n, answer.end)
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()
        async with asyncio.timeout(WAIT_S):
            while decode.faces.pairs.num_channels or decode.dispatcher.num_owned:
                await asyncio.sleep(0.01)
