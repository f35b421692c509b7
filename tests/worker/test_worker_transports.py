"""Which plane channel two real workers use, why, and what is left of it."""

import asyncio
import os
import sys
import textwrap
from pathlib import Path

import pytest
from support.engines.frames import damaged, is_frame
from support.engines.workers import CLUSTER_KEY

from twostroke.checkpoint.config import ModelConfig
from twostroke.core.request import Role
from twostroke.engine.config import StepConfig
from twostroke.kv.codec import Codec
from twostroke.kv.config import CacheConfig
from twostroke.kv.handover.frames import slot_bytes
from twostroke.kv.handover.plane_channel import ALL_USED, WRONG_BYTES
from twostroke.kv.handover.transports.grpc import ServerStream
from twostroke.kv.handover.transports.shared_memory import NAME, ring_bytes
from twostroke.kv.spec import attention_spec
from twostroke.worker.settings import WorkerSettings

LONG = 320
FRAME_BYTES, SLOTS = 8192, 4
SPEC = attention_spec(2, 2, 16, Codec.FP8_E4M3)  # of the tiny checkpoint
ONE_RING = ring_bytes(SLOTS, slot_bytes(SPEC, FRAME_BYTES)) + 1000


def cache(**changes):
    return CacheConfig(tokens=8192, frame_bytes=FRAME_BYTES, frame_slots=SLOTS, prefix_caching=False, **changes)


def open_rings() -> int:
    """Mappings of rings in this process, which is both workers."""
    return sum(NAME in line for line in Path("/proc/self/maps").read_text().splitlines())


@pytest.fixture
def start_pair(start_worker, router_of):
    async def start(prefill=None, decode=None):
        first = await start_worker(Role.PREFILL, cache=cache(**(prefill or {})))
        second = await start_worker(Role.DECODE, cache=cache(**(decode or {})))
        return first, second, await router_of(second)

    return start


async def asked(hand, prefill, prompt, request_id="r", **options):
    answer = await (await hand.submit(request_id, prompt, [prefill], **options)).ended()
    return answer.end.handover


async def test_two_workers_of_one_host_share_memory_and_use_one_ring_again(start_pair, make_prompt, all_free):
    before = open_rings()
    prefill, decode, hand = await start_pair()
    for number in range(3):
        handover = await asked(hand, prefill, make_prompt(LONG, number), f"r{number}")
        assert (handover.transport, handover.transport_reason) == ("shm", "")
        assert handover.tokens_moved == LONG
        await all_free(prefill, decode)
    assert decode.counters["handover_decode_shared_frames"] == decode.counters["handover_decode_frames"] > 2 * SLOTS
    assert decode.faces.rings.num_rings == 1
    assert open_rings() == before + 1  # the decode worker's: the prefill worker has unmapped it


async def test_requests_beside_each_other_have_rings_of_their_own(start_pair, make_prompt, all_free):
    prefill, decode, hand = await start_pair()
    answers = [await hand.submit(f"r{number}", make_prompt(LONG, number), [prefill]) for number in range(3)]
    reports = [(await answer.ended()).end.handover for answer in answers]
    assert {report.transport for report in reports} == {"shm"}
    await all_free(prefill, decode)
    assert 1 <= decode.faces.rings.num_rings <= 3


@pytest.mark.parametrize(
    ("prefill", "decode", "reason"),
    [
        ({"transport": "grpc"}, {}, "cache.transport is grpc"),
        ({}, {"transport": "grpc"}, "offers no shared memory"),
        ({}, {"ring_bytes": 0}, "offers no shared memory"),
        ({}, {"ring_bytes": 10_000}, "offers no shared memory"),  # less than a ring
    ],
    ids=str,
)
async def test_planes_come_over_the_stream_where_memory_cannot_be_shared(
    start_pair, make_prompt, prefill, decode, reason
):
    first, second, hand = await start_pair(prefill, decode)
    handover = await asked(hand, first, make_prompt(LONG))
    assert handover.transport == "grpc"
    assert reason in handover.transport_reason
    assert (handover.tokens_moved, handover.local_reason) == (LONG, "")
    assert second.counters["handover_decode_shared_frames"] == 0


@pytest.mark.parametrize("name", ["host_identity", "pid", "open"])
async def test_an_offer_that_cannot_be_mapped_costs_nothing_but_the_speed(
    start_pair, make_prompt, all_free, monkeypatch, name
):
    from twostroke.kv.handover.transports import shared_memory

    prefill, decode, hand = await start_pair()
    offer = shared_memory.OwnRing.offer
    if name == "open":
        monkeypatch.setattr(shared_memory.os, "readlink", refused)
    else:
        changed = {"host_identity": ("host", b"elsewhere"), "pid": ("pid", (1 << 22) + 1)}[name]

        def elsewhere(ring):
            message = offer(ring)
            setattr(message, *changed)
            return message

        monkeypatch.setattr(shared_memory.OwnRing, "offer", elsewhere)
    handover = await asked(hand, prefill, make_prompt(LONG))
    assert (handover.transport, handover.tokens_moved, handover.local_reason) == ("grpc", LONG, "")
    assert handover.transport_reason in (
        "another host or PID namespace",
        "its memory cannot be opened: No such file or directory",
        "its memory cannot be opened: Operation not permitted",
    )
    await all_free(prefill, decode)


def refused(path):
    raise OSError(1, "Operation not permitted", path)


@pytest.mark.parametrize("who", ["prefill", "decode"])
async def test_less_than_the_required_transport_is_refused_with_its_reason(start_pair, make_prompt, all_free, who):
    required = {"transport": "shm", "require_transport": True}
    lacking = {"transport": "grpc"}
    prefill, decode, hand = await start_pair(*(required if side == who else lacking for side in ("prefill", "decode")))
    handover = await asked(hand, prefill, make_prompt(LONG))
    assert handover.local_reason == "peer_transport"
    assert (handover.bytes_moved, handover.recomputed_tokens) == (0, LONG)
    await all_free(prefill, decode)


async def test_a_decode_worker_without_memory_for_the_required_transport_asks_nobody(start_pair, make_prompt, all_free):
    prefill, decode, hand = await start_pair(decode={"transport": "shm", "require_transport": True, "ring_bytes": 0})
    assert (await asked(hand, prefill, make_prompt(LONG))).local_reason == "no_shared_memory"
    assert prefill.counters["handovers_refused"] == 0
    await all_free(prefill, decode)


async def test_beyond_the_bound_hand_overs_go_over_the_stream(start_pair, make_prompt, all_free):
    prefill, decode, hand = await start_pair(decode={"ring_bytes": ONE_RING})
    lent = decode.faces.rings.take("somebody else")
    full = await asked(hand, prefill, make_prompt(LONG), "r1")
    assert (full.transport, full.transport_reason) == ("grpc", ALL_USED)
    lent.give_back(is_orderly=False)
    assert (await asked(hand, prefill, make_prompt(LONG, 2), "r2")).transport == "shm"
    await all_free(prefill, decode)


async def test_after_wrong_bytes_in_shared_memory_a_pair_uses_the_stream_and_says_why(
    start_pair, make_prompt, all_free, monkeypatch
):
    prefill, decode, hand = await start_pair()
    alone = await asked(hand, prefill, make_prompt(LONG), "r0")
    assert alone.transport == "shm"
    send = ServerStream.send

    async def damaging(stream, envelope):  # as if the memory itself were bad: every frame, also when it is read again
        await send(stream, damaged(envelope, decode.faces.rings) if is_frame(envelope) else envelope)

    monkeypatch.setattr(ServerStream, "send", damaging)
    broken = await asked(hand, prefill, make_prompt(LONG, 1), "r1")
    assert broken.local_reason == "peer_corrupted"
    monkeypatch.setattr(ServerStream, "send", send)
    after = await asked(hand, prefill, make_prompt(LONG, 2), "r2")
    assert (after.transport, after.transport_reason) == ("grpc", WRONG_BYTES)
    assert (after.tokens_moved, after.local_reason) == (LONG, "")
    await all_free(prefill, decode)
    assert decode.faces.rings.num_rings == 0


@pytest.fixture
def hold(monkeypatch):
    """Frames after the second one do not leave a prefill worker of this process until `free` is set."""
    held, free, num_frames, send = asyncio.Event(), asyncio.Event(), 0, ServerStream.send

    async def holding(stream, envelope):
        nonlocal num_frames
        num_frames += is_frame(envelope)
        if num_frames > 2 and not free.is_set():
            held.set()
            await free.wait()
        await send(stream, envelope)

    monkeypatch.setattr(ServerStream, "send", holding)
    return held, free


async def test_the_ring_of_a_cancelled_hand_over_is_never_used_again(start_pair, make_prompt, all_free, hold):
    before = open_rings()
    prefill, decode, hand = await start_pair()
    held, free = hold
    answer = await hand.submit("r", make_prompt(LONG), [prefill])
    await asyncio.wait_for(held.wait(), 60)
    (first,) = [ring.nonce for ring in decode.faces.rings.used]
    assert open_rings() == before + 2  # both sides have mapped it
    await hand.cancel("r")
    await answer.ended()
    await all_free(prefill, decode)
    free.set()
    assert (await asked(hand, prefill, make_prompt(LONG, 2), "r2")).transport == "shm"
    (second,) = decode.faces.rings.idle
    assert second.nonce != first
    await all_free(prefill, decode)
    assert (decode.faces.rings.num_rings, open_rings()) == (1, before + 1)


# ------------------------------------------------------------------ two processes

MAIN = textwrap.dedent("""
    import asyncio, logging, sys
    logging.basicConfig(level=logging.INFO, stream=sys.stdout)
    from twostroke.core.lease import Lease
    from twostroke.kv.handover.transports.grpc import ServerStream
    from twostroke.worker import process
    from twostroke.worker.main import run_worker
    from twostroke.worker.settings import WorkerSettings

    process.HANDOVER_LEASE = Lease(0.5, 300.0)  # as the fixture `patient_leases`
    num_frames, send = 0, ServerStream.send

    async def holding(stream, envelope):
        global num_frames
        num_frames += envelope[3] == 2
        if num_frames > 2:
            print("it holds", flush=True)
            await asyncio.Event().wait()
        await send(stream, envelope)

    if sys.argv[2] == "hold":
        ServerStream.send = holding
    run_worker(WorkerSettings.model_validate_json(sys.argv[1]))
""")


class Child:
    """A worker as a process of its own; with "hold" its frames after the second one do not leave."""

    async def start(self, checkpoint, role, how):
        settings = WorkerSettings(
            worker_id=f"{role.value}-child",
            role=role,
            model_directory=str(checkpoint),
            model_name="tiny",
            model=ModelConfig(path=str(checkpoint)),
            cache=cache(),
            step=StepConfig(max_num_batched_tokens=64),
            cluster_key=CLUSTER_KEY,
        )
        self.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", MAIN, settings.model_dump_json(), how),
            stdout=asyncio.subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        self.address = (await self.heard("serves at")).split()[-1]

    async def heard(self, words):
        async with asyncio.timeout(240):
            while words not in (line := (await self.process.stdout.readline()).decode()):
                assert line, f"it ended before it said {words!r}"
        return line

    async def kill(self):
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()


@pytest.fixture
async def start_one(tiny_checkpoint, start_worker):
    """Start a worker in this process, or with `how` as a child."""
    made = []

    async def start(role, how=None):
        if how is None:
            return await start_worker(role, cache=cache())
        child = Child()
        made.append(child)
        await child.start(tiny_checkpoint, role, how)
        return child

    yield start
    for child in made:
        await child.kill()


def rings_of(pid) -> int:
    return sum(NAME in line for line in Path(f"/proc/{pid}/maps").read_text().splitlines())


async def test_two_processes_hand_over_through_memory_token_for_token(start_one, router_of, make_prompt, all_free):
    child = await start_one(Role.PREFILL, "")
    decode, alone = await start_one(Role.DECODE), await start_one(Role.COMBINED)
    hand, to_alone = await router_of(decode), await router_of(alone)
    for number, length in enumerate((17, 100, LONG)):
        prompt = make_prompt(length, number)
        answer = await (await hand.submit(f"r{number}", prompt, [child.address])).ended()
        local = await (await to_alone.submit(f"r{number}", prompt)).ended()
        assert (answer.token_ids, answer.text) == (local.token_ids, local.text)
        handover = answer.end.handover
        assert (handover.transport, handover.tokens_moved, handover.refetched_blocks) == ("shm", length, 0)
    await all_free(decode)


async def test_kill_9_of_a_prefill_worker_leaves_no_memory(start_one, router_of, make_prompt, all_free):
    child, decode = await start_one(Role.PREFILL, "hold"), await start_one(Role.DECODE)
    before = open_rings()
    answer = await (await router_of(decode)).submit("r", make_prompt(LONG), [child.address])
    await child.heard("it holds")
    assert (open_rings(), rings_of(child.process.pid)) == (before + 1, 1)
    await child.kill()
    await answer.ended()
    assert answer.end.handover.local_reason == "peer_closed"
    await all_free(decode)
    assert (decode.faces.rings.num_rings, open_rings()) == (0, before)


@pytest.mark.campaign
async def test_kill_9_of_a_decode_worker_leaves_no_memory(start_one, hand_to, make_prompt, all_free, hold):
    child, prefill = await start_one(Role.DECODE, ""), await start_one(Role.PREFILL)
    before = open_rings()
    await (await hand_to(child.address)).submit("r", make_prompt(LONG), [prefill])
    await asyncio.wait_for(hold[0].wait(), 60)
    assert (open_rings(), rings_of(child.process.pid)) == (before + 1, 1)
    await child.kill()
    await all_free(prefill)
    async with asyncio.timeout(60):
        while open_rings() > before:  # the last read of the engine may still be on its way to a slot
            await asyncio.sleep(0.01)
