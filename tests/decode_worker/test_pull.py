"""Frames of every size through the real `KvPull` and its driver: damage, doubles and strangers are not stored."""

import asyncio
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from support.clusters.leases import PATIENT

from twostroke.core.clock import MonotonicClock
from twostroke.core.request import Epoch, SequenceKey
from twostroke.decode_worker.pull import KvPull, KvPullTools
from twostroke.engine.link.messages import WriteKv
from twostroke.kv.codec import Codec
from twostroke.kv.digest import frame_digests, places
from twostroke.kv.handover.driver import INLINE_BYTES, ClientDriver
from twostroke.kv.handover.frames import FrameLabel, decode_envelope, encode_frame, encode_message
from twostroke.kv.handover.machine import Label
from twostroke.kv.handover.receiver import Receiver, ReceiverState
from twostroke.kv.section import SectionData
from twostroke.kv.spec import attention_spec
from twostroke.protos import common_pb2
from twostroke.protos import handover_pb2 as pb

KEY, CLASS = 0xC0FFEE, b"c" * 16
LABEL = Label("r", 0, Epoch(1, 5))
TOKENS = 72  # of the prompt: four hash blocks and a tail
SMALL = attention_spec(2, 2, 16, Codec.FP8_E4M3)
MEBIBYTE = attention_spec(8, 8, 128, Codec.FP8_E4M3)  # 72 tokens are 1.1 MiB, as a real model's frames
NEAR_BELOW, NEAR_ABOVE = (attention_spec(layers, 2, 111, Codec.FP8_E4M3) for layers in (2, 3))
SPECS = {"small": SMALL, "just inline": NEAR_BELOW, "just not inline": NEAR_ABOVE, "1 MiB": MEBIBYTE}


def sections(spec, start, count, seed=0):
    """Random rows of all layers and heads, sealed as a store would."""
    random = np.random.default_rng(seed)
    blocks = start // 16 + np.arange(-(-count // 16))
    made = []
    for number, part in enumerate(spec.main.components):
        layers = spec.main.num_layers
        payload = random.integers(0, 126, (layers, part.heads, count, part.row_bytes), np.uint8)
        scales = random.integers(1, 200, (layers, part.heads, count), np.uint8)
        place = places(np.arange(layers)[:, None, None], number, np.arange(part.heads)[:, None], blocks)
        digests = frame_digests(payload, scales, place, KEY, 16)
        shape = (0, layers, 0, part.heads)
        made.append(SectionData("main", part.name, *shape, part.codec, part.row_bytes, payload, scales, digests))
    return made


class Stream:
    """The decode side's end of a stream in memory."""

    def __init__(self):
        self.inbox, self.sent = asyncio.Queue(), []
        self.is_closed = False

    async def send(self, envelope):
        self.sent.append(decode_envelope(envelope))

    async def receive(self):
        return await self.inbox.get()

    async def finish(self):
        self.inbox.put_nowait(None)

    def close(self):
        self.is_closed = True


class Bench:
    """A pull that has bound its blocks, its owner, and the peer's hand."""

    def __init__(self, spec, executor, **order):
        self.commands, self.lost, self.counters = [], None, Counter()
        self.stream, self.spec, self.sequence = Stream(), spec, 1
        tools = KvPullTools(self, executor, KEY, spec, PATIENT, MonotonicClock(), self.counters)
        fields = {"frame_slots": 8, "timeout_ms": 600_000, "deterministic": True, "numerics_class": CLASS} | order
        opening = pb.Open(prompt_ids=range(TOKENS), **fields)
        now_s = tools.clock.now_s()
        self.driver = ClientDriver(self.stream, tools.clock, executor, 0.1)
        receiver = Receiver(LABEL, opening, tools.timing, now_s + 9, now_s)
        self.pull = KvPull(receiver, self.driver, SequenceKey("r/d1", 0), self, tools)
        self.say(pb.Started())

    def send(self, command):
        self.commands.append(command)

    def bind_wanted(self):
        self.pull.bound()

    def first_token_came(self, first):
        self.first = first

    def pull_completed(self):
        raise AssertionError("nobody said done")

    def pull_lost(self, lost):
        self.lost = lost

    def say(self, body):
        self.stream.inbox.put_nowait(encode_message(LABEL.down(self.sequence, body)))
        self.sequence += 1

    def envelope(self, start=0, count=TOKENS, *, seed=0, label=LABEL, sequence=None, numerics=CLASS, change=None):
        """A frame; `change` may spoil its sections before they are sent."""
        made = sections(self.spec, start, count, seed)
        if change is not None:
            change(made)
        number = self.sequence if sequence is None else sequence
        self.sequence += sequence is None
        return encode_frame(FrameLabel(label, number, numerics, start, count), made, is_last=False)

    def give(self, envelope):
        self.stream.inbox.put_nowait(envelope)

    async def settled(self):
        """Everything that was given is judged: a beat behind it has been heard."""
        self.say(pb.HandoverBeat())
        async with asyncio.timeout(60):
            while self.pull.receiver.counters.messages_received < self.sequence - 1 and not self.pull.receiver.is_over:
                await asyncio.sleep(0.001)
        for _ in range(5):
            await asyncio.sleep(0)  # the writer's turn: what was said is sent

    @property
    def written(self):
        return [(c.token_start, c.token_count) for c in self.commands if isinstance(c, WriteKv)]

    def said(self, kind):
        return [getattr(m, kind) for m in self.stream.sent if m.WhichOneof("body") == kind]


@pytest.fixture
def executor():
    with ThreadPoolExecutor(2) as made:
        yield made


@pytest.fixture
async def bench(executor):
    made = []

    def make(spec=SMALL, **order):
        made.append(Bench(spec, executor, **order))
        return made[-1]

    yield make
    for one in made:
        one.pull.cancel("the test is over")
        await one.driver.closed()
        assert one.stream.is_closed


def flip(part, name, place):
    def change(made):
        getattr(made[part], name).reshape(-1).view(np.uint8)[place] ^= 4

    return change


DAMAGES = {
    "first byte": flip(0, "payload", 0),
    "last byte": flip(1, "payload", -1),
    "a byte of the tail": lambda made: made[0].payload[0, 0].__setitem__((-1, 0), made[0].payload[0, 0, -1, 0] ^ 1),
    "first scale": flip(0, "scales", 0),
    "last scale": flip(1, "scales", -1),
    "a seal": flip(0, "digests", 0),
    "the tail's seal": flip(1, "digests", -1),
    "two rows change places": lambda made: made[0].payload.__setitem__(
        (0, 0, slice(0, 2)), made[0].payload[0, 0, 1::-1].copy()
    ),
}


def test_the_sizes_lie_on_both_sides_of_the_bound():
    sizes = {name: len(encode_frame(FrameLabel(LABEL, 1, CLASS, 0, TOKENS), sections(spec, 0, TOKENS), is_last=True))
             for name, spec in SPECS.items()}  # fmt: skip
    assert sizes["small"] < sizes["just inline"] <= INLINE_BYTES < sizes["just not inline"] < 2 * INLINE_BYTES
    assert sizes["1 MiB"] > 1 << 20


@pytest.mark.parametrize("size", SPECS)
async def test_a_whole_frame_is_stored_as_it_came(bench, size):
    it = bench(SPECS[size])
    it.give(it.envelope())
    await it.settled()
    assert it.written == [(0, TOKENS)]
    assert [m.upto_token for m in it.said("verified")] == [TOKENS]
    for mine, theirs in zip(sections(it.spec, 0, TOKENS), it.commands[0].sections, strict=True):
        np.testing.assert_array_equal(mine.payload, theirs.payload)
        np.testing.assert_array_equal(mine.scales, theirs.scales)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("size", SPECS)
async def test_a_damaged_frame_is_not_stored_but_asked_for_again(bench, size, damage):
    it = bench(SPECS[size])
    it.give(it.envelope(change=DAMAGES[damage]))
    await it.settled()
    assert it.written == []
    assert [(m.token_start, m.token_count) for m in it.said("refetch")] == [(0, TOKENS)]
    assert it.counters["kv_corrupted_frames"] == 1
    assert it.pull.refetched_blocks == 5
    it.give(it.envelope())
    await it.settled()
    assert it.written == [(0, TOKENS)]


@pytest.mark.parametrize("size", SPECS)
async def test_the_same_tokens_damaged_twice_are_given_up(bench, size):
    it = bench(SPECS[size])
    for _ in range(2):
        it.give(it.envelope(change=DAMAGES["last byte"]))
    await it.settled()
    assert it.lost.reason == "corrupted"
    assert it.lost.stored_upto == 0
    assert it.written == []


async def test_one_block_damaged_twice_is_given_up_whatever_came_with_it(bench):
    it = bench()
    it.give(it.envelope(0, 16, change=DAMAGES["last byte"]))
    it.give(it.envelope(0, 32, change=DAMAGES["last byte"]))
    await it.settled()
    assert [(m.token_start, m.token_count, m.attempt) for m in it.said("refetch")] == [(0, 16, 1)]
    assert it.lost.reason == "corrupted"


class _Ring:
    """A lent ring that writes down when it comes back."""

    def __init__(self, log):
        self.log = log

    def give_back(self, *, is_orderly, has_failed):
        self.log.append(("ring", is_orderly, has_failed))


async def test_a_ring_that_the_peer_does_not_use_comes_back_when_it_says_so(bench):
    it, log = bench(), []
    it.pull._ring = _Ring(log)
    await it.settled()
    assert (log, it.lost) == ([("ring", True, False)], None)


async def test_shared_memory_is_not_distrusted_for_what_came_over_the_stream(bench):
    it, log = bench(), []
    it.stream.inbox.get_nowait()  # in place of Started
    it.pull._ring = _Ring(log)
    it.give(b"garbage")
    async with asyncio.timeout(60):
        while it.lost is None:
            await asyncio.sleep(0.001)
    assert (log, it.lost.reason) == ([("ring", False, False)], "protocol")


async def test_the_ring_is_given_back_before_the_owner_hears_of_the_loss(bench):
    it, log = bench(), []
    await it.settled()
    it.pull._ring = _Ring(log)
    it.pull_lost = lambda lost: log.append(("lost", lost.reason))  # the owner may open the next hand-over at once
    it.say(common_pb2.Error(code="unavailable", message="no"))
    await it.settled()
    assert log == [("ring", False, False), ("lost", "failed")]


@pytest.mark.parametrize("size", ["small", "1 MiB"])
async def test_a_frame_of_fewer_heads_is_not_whole(bench, size):
    it = bench(SPECS[size])
    it.give(it.envelope(change=lambda made: made.pop()))
    await it.settled()
    assert it.written == []
    assert it.said("refetch")


@pytest.mark.parametrize("size", ["small", "1 MiB"])
@pytest.mark.parametrize("place", [0, 2, 3, 5, 8, 14, 40])
async def test_a_damaged_header_ends_the_hand_over(bench, size, place):
    it = bench(SPECS[size])
    envelope = bytearray(it.envelope())
    envelope[place] ^= 1
    it.give(bytes(envelope))
    await it.settled()
    assert it.lost.reason == "protocol"
    assert it.written == []


@pytest.mark.parametrize(
    ("envelope", "reason"),
    [
        (b"no envelope", "protocol"),
        (encode_message(LABEL.up(2, pb.HandoverBeat())), "protocol"),  # our own direction's
        (None, "closed"),
    ],
    ids=["garbled", "of the other direction", "the end"],
)
async def test_what_no_peer_says_ends_the_hand_over_at_once(bench, envelope, reason):
    it = bench()
    await it.settled()
    it.give(envelope)
    async with asyncio.timeout(60):
        while it.lost is None:
            await asyncio.sleep(0.001)
    assert it.lost.reason == reason


@pytest.mark.parametrize(("start", "count"), [(0, 72), (0, 16), (32, 40), (16, 32), (64, 8)], ids=str)
@pytest.mark.parametrize("size", ["small", "1 MiB"])
async def test_what_is_held_is_not_written_over(bench, size, start, count):
    it = bench(SPECS[size])
    it.give(it.envelope(seed=1))
    await it.settled()
    it.pull.written(0, TOKENS)
    it.give(it.envelope(start, count, seed=2))
    await it.settled()
    assert it.written == [(0, TOKENS)]
    assert "overlap" in it.lost.detail
    assert it.lost.stored_upto == TOKENS


async def test_a_frame_that_overlaps_one_under_way_ends_the_hand_over(bench):
    it = bench()
    it.give(it.envelope(0, 32))
    it.give(it.envelope(16, 32, seed=3))
    await it.settled()
    assert it.written == [(0, 32)]
    assert "overlap" in it.lost.detail


@pytest.mark.parametrize("size", ["small", "1 MiB"])
async def test_a_second_frame_of_one_number_is_dropped_whatever_it_holds(bench, size):
    it = bench(SPECS[size])
    it.give(it.envelope(0, 32))
    it.give(it.envelope(32, 32, seed=3, sequence=it.sequence - 1))
    await it.settled()
    assert it.written == [(0, 32)]
    assert it.lost is None
    assert it.pull.receiver.counters.duplicates == 1


@pytest.mark.parametrize(("start", "count"), [(64, 16), (80, 16), (0, 88), (64, 7), (0, 24), (0, 71)])
async def test_tokens_that_were_not_promised_end_the_hand_over(bench, start, count):
    it = bench()
    it.give(it.envelope(start, count))
    await it.settled()
    assert it.lost.reason == "protocol"
    assert it.written == []


async def test_tokens_that_decode_held_are_not_taken(bench):
    it = bench(held_tokens=32)
    it.give(it.envelope(16, 32))
    await it.settled()
    assert "not asked for" in it.lost.detail
    assert it.written == []


@pytest.mark.parametrize("deterministic", [True, False])
async def test_a_frame_of_other_numerics_is_taken_only_where_nobody_is_deterministic(bench, deterministic):
    it = bench(deterministic=deterministic)
    it.give(it.envelope(numerics=b"x" * 16))
    await it.settled()
    assert bool(it.written) is not deterministic
    assert (it.lost is not None) is deterministic


@pytest.mark.parametrize(
    ("label", "is_lost"),
    [
        (Label("r", 0, Epoch(1, 4)), False),
        (Label("r", 0, Epoch(0, 9)), False),
        (Label("r", 0, Epoch(1, 6)), True),
        (Label("r", 0, Epoch(2, 0)), True),
        (Label("r", 1, Epoch(1, 5)), True),
        (Label("s", 0, Epoch(1, 5)), True),
    ],
)
async def test_frames_of_other_dispatches_are_never_stored(bench, label, is_lost):
    it = bench()
    it.give(it.envelope(label=label, sequence=it.sequence))
    await it.settled()
    assert it.written == []
    assert (it.lost is not None) is is_lost


async def test_what_follows_a_frame_waits_for_its_verdict(bench, executor):
    it = bench(MEBIBYTE)
    held = asyncio.Event()
    loop = asyncio.get_running_loop()
    blocked = [executor.submit(lambda: asyncio.run_coroutine_threadsafe(held.wait(), loop).result()) for _ in range(2)]
    it.give(it.envelope())
    it.say(pb.FirstToken(token_id=7))
    await asyncio.sleep(0.05)  # both threads are busy: the frame cannot be verified yet
    assert not hasattr(it, "first")
    held.set()
    await it.settled()
    assert it.written == [(0, TOKENS)]
    assert it.first.token_id == 7
    assert all(one.result() for one in blocked)


async def test_a_frame_that_is_verified_after_a_cancel_is_not_stored(bench, executor):
    it = bench(MEBIBYTE)
    held = asyncio.Event()
    loop = asyncio.get_running_loop()
    for _ in range(2):
        executor.submit(lambda: asyncio.run_coroutine_threadsafe(held.wait(), loop).result())
    it.give(it.envelope())
    await asyncio.sleep(0.02)
    it.pull.cancel("test")
    held.set()
    await asyncio.wait_for(it.driver.closed(), 60)
    assert it.written == []
    assert it.pull.receiver.state is ReceiverState.CANCELLED


async def test_digests_that_cannot_be_verified_count_as_damage(bench, executor):
    it = bench(MEBIBYTE)
    it.pull._tools = replace(it.pull._tools, digest_key="no key")
    it.give(it.envelope())
    await it.settled()
    assert it.written == []
    assert it.said("refetch")


async def test_the_speed_is_told_of_whole_frames_only(bench):
    it = bench()
    it.give(it.envelope(change=DAMAGES["last byte"]))
    await it.settled()
    assert it.pull._arrivals == []
    whole = it.envelope()
    it.give(whole)
    await it.settled()
    assert [arrival.num_bytes for arrival in it.pull._arrivals] == [len(whole)]


async def test_a_frame_that_comes_after_the_end_is_not_verified(bench):
    it = bench()
    await it.settled()
    it.pull.cancel("test")
    checks = []
    it.driver.check = lambda check, answered: checks.append(check)
    it.pull._arrive(it.envelope())
    assert checks == []
