"""Planes that a prefill worker reads leave only as they were sealed, whatever their size and in whatever order."""

import asyncio
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from support.clusters.leases import PATIENT

from twostroke.core.clock import MonotonicClock
from twostroke.core.request import Epoch, FinishReason, SamplingParams, SequenceKey
from twostroke.engine.link import messages as link
from twostroke.kv.codec import Codec
from twostroke.kv.digest import frame_digests, places
from twostroke.kv.handover.damage import verify_frame
from twostroke.kv.handover.driver import Driver
from twostroke.kv.handover.frames import Frame, decode_envelope, encode_message
from twostroke.kv.handover.machine import Label
from twostroke.kv.handover.sender import Sender, SenderState
from twostroke.kv.section import SectionData
from twostroke.kv.spec import attention_spec
from twostroke.prefill_worker.task import MAX_READS, PrefillTask, PrefillTaskTools
from twostroke.protos import handover_pb2 as pb

KEY, CLASS = 0xC0FFEE, b"c" * 16
LABEL = Label("r", 0, Epoch(1, 5))
TOKENS = 72
SPECS = {
    "small": attention_spec(2, 2, 16, Codec.FP8_E4M3),
    "1 MiB": attention_spec(8, 8, 128, Codec.FP8_E4M3),
}


def sections(spec, start, count):
    """Rows that differ by place, sealed as a store would."""
    random = np.random.default_rng(start)
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
    return tuple(made)


class Bench:
    """A job that may send, an engine that is told what to answer, and the peer's ear."""

    def __init__(self, spec, executor, frame_tokens=TOKENS):
        self.spec, self.commands, self.counters = spec, [], Counter()
        self.up, self.down = asyncio.Queue(), []
        self.sequence = 0
        self.damages = {}  # reads (start, count) still to be spoilt, and how
        clock = MonotonicClock()
        tools = PrefillTaskTools(self, executor, KEY, CLASS, PATIENT, clock, self.counters)
        opening = LABEL.up(1, pb.Open(prompt_ids=range(TOKENS), frame_slots=8, timeout_ms=600_000))
        self.sequence = 1
        sender = Sender(opening, -(-frame_tokens // 16) * 16, 8, tools.timing, clock.now_s())
        key = SequenceKey("r/p1", 0)
        submit = link.Submit(key, link.Source.FOR_PEER, tuple(range(TOKENS)), (), b"", SamplingParams(4))
        self.driver = Driver(self, clock, executor)
        self.job = PrefillTask(sender, submit, self.driver, tools)
        self.job.start()
        self.task = asyncio.create_task(self.driver.run())

    def own(self, key, owner):
        self.tell = owner

    def send(self, command):
        """As dispatcher, and as stream: commands of the job, envelopes of its driver."""
        if isinstance(command, bytes):
            return self._hear(command)
        self.commands.append(command)
        if isinstance(command, link.ReadKv):
            place = (command.token_start, command.token_count)
            asyncio.get_running_loop().call_soon(self.tell, link.KvRead(command.key, *place, self._planes(*place)))
        return None

    async def _hear(self, envelope):
        self.down.append(decode_envelope(envelope))

    async def receive(self):
        return await self.up.get()

    def _planes(self, start, count):
        made = sections(self.spec, start, count)
        spoil = self.damages.get((start, count), [])
        if spoil:
            part, name, place = spoil.pop(0)
            getattr(made[part], name).reshape(-1).view(np.uint8)[place] ^= 8
        return made

    def say(self, body):
        self.sequence += 1
        self.up.put_nowait(encode_message(LABEL.up(self.sequence, body)))

    def compute(self):
        """Offered, bound, and the whole prompt computed."""
        key = self.job.key
        self.tell(link.Offered(key, 0))
        self.say(pb.Bind())
        self.tell(link.Progress(key, TOKENS))
        self.tell(link.TokenNews(key, 0, (7,)))

    async def until(self, condition):
        async with asyncio.timeout(60):
            while not condition():
                await asyncio.sleep(0.001)

    @property
    def frames(self):
        return [m for m in self.down if isinstance(m, Frame)]

    def said(self, kind):
        return [m for m in self.down if not isinstance(m, Frame) and m.WhichOneof("body") == kind]

    @property
    def reads(self):
        return [(c.token_start, c.token_count) for c in self.commands if isinstance(c, link.ReadKv)]


@pytest.fixture
async def bench():
    made = []
    with ThreadPoolExecutor(2) as executor:

        def make(size="small", **options):
            made.append(Bench(SPECS[size], executor, **options))
            return made[-1]

        yield make
        for one in made:
            one.job.leave()
            await asyncio.wait_for(one.task, 60)


@pytest.mark.parametrize("size", SPECS)
async def test_what_matches_its_seals_leaves_under_them(bench, size):
    it = bench(size)
    it.compute()
    await it.until(lambda: it.said("done"))
    (frame,) = it.frames
    assert verify_frame(frame, KEY, it.spec)
    assert frame.header.numerics_class == CLASS
    assert (frame.header.token_start, frame.header.token_count, frame.header.last) == (0, TOKENS, True)
    assert it.counters["kv_corrupted_reads"] == 0


WAYS = [(0, "payload", 0), (1, "payload", -1), (0, "scales", 0), (1, "scales", -1), (0, "digests", 0)]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: f"{way[1]}{way[2]}")
@pytest.mark.parametrize("size", SPECS)
async def test_one_flip_is_read_again_and_never_leaves(bench, size, way):
    it = bench(size)
    it.damages = {(0, TOKENS): [way]}
    it.compute()
    await it.until(lambda: it.said("done"))
    (frame,) = it.frames
    assert verify_frame(frame, KEY, it.spec)
    assert it.counters["kv_corrupted_reads"] == 1
    assert it.reads == [(0, TOKENS)] * 2


@pytest.mark.parametrize("way", WAYS, ids=lambda way: f"{way[1]}{way[2]}")
@pytest.mark.parametrize("size", SPECS)
async def test_planes_that_stay_damaged_fail_typed_and_nothing_leaves(bench, size, way):
    it = bench(size)
    it.damages = {(0, TOKENS): [way] * 9}
    it.compute()
    await it.until(lambda: it.said("failed"))
    assert it.said("failed")[0].failed.code == "kv_corrupted"
    assert it.frames == []
    assert it.counters["kv_corrupted_reads"] == MAX_READS
    assert any(isinstance(command, link.CancelSequence) for command in it.commands)


@pytest.mark.parametrize("size", SPECS)
async def test_leading_tokens_leave_first_though_they_are_read_twice_as_slowly(bench, size):
    it = bench(size, frame_tokens=64)
    it.compute()
    await it.until(lambda: it.said("done"))
    assert [(f.header.token_start, f.header.token_count) for f in it.frames] == [(0, 64), (64, 8)]
    assert all(verify_frame(frame, KEY, it.spec) for frame in it.frames)


async def test_planes_that_come_after_the_end_go_nowhere(bench):
    it = bench("1 MiB")
    it.compute()
    it.say(pb.Cancel(reason="test"))
    await it.until(lambda: it.job.sender.is_over)
    before = len(it.down)
    it.tell(link.KvRead(it.job.key, 0, TOKENS, sections(it.spec, 0, TOKENS)))
    it.tell(link.KvRead(it.job.key, 0, TOKENS, None))
    it.tell(link.Ended(it.job.key, FinishReason.CANCELLED))
    await asyncio.sleep(0.02)
    assert len(it.down) == before
    assert it.counters["kv_corrupted_reads"] == 0
    assert sum(isinstance(command, link.CancelSequence) for command in it.commands) == 1


@pytest.mark.parametrize("epoch", [Epoch(1, 4), Epoch(0, 9)])
async def test_words_of_an_older_dispatch_move_nothing(bench, epoch):
    it = bench()
    it.tell(link.Offered(it.job.key, 0))
    it.up.put_nowait(encode_message(Label("r", 0, epoch).up(2, pb.Bind())))
    it.up.put_nowait(encode_message(Label("r", 0, epoch).up(2, pb.Cancel(reason="old"))))
    await asyncio.sleep(0.02)
    assert it.job.sender.state is SenderState.OFFERED
    it.compute()
    await it.until(lambda: it.said("done"))


async def test_a_refetch_after_the_range_was_verified_ends_the_hand_over(bench):
    it = bench(frame_tokens=32)
    it.compute()
    await it.until(lambda: len(it.frames) == 3)
    it.say(pb.Verified(upto_token=32))
    it.say(pb.Refetch(token_start=0, token_count=32, attempt=1))
    await it.until(lambda: it.said("failed"))
    assert "not sent" in it.said("failed")[0].failed.message
    assert len(it.frames) == 3


async def test_a_refetch_after_the_release_moves_nothing(bench):
    it = bench()
    it.compute()
    await it.until(lambda: it.said("done"))
    it.say(pb.Verified(upto_token=TOKENS))
    await it.until(lambda: it.job.sender.state is SenderState.RELEASED)
    it.say(pb.Refetch(token_start=0, token_count=TOKENS, attempt=1))
    await asyncio.wait_for(it.task, 60)
    assert it.reads == [(0, TOKENS)]
    assert sum(isinstance(command, link.Release) for command in it.commands) == 1
    assert not any(isinstance(command, link.CancelSequence) for command in it.commands)


async def test_planes_that_left_are_not_kept(bench):
    it = bench(frame_tokens=32)
    it.compute()
    await it.until(lambda: it.said("done"))
    assert it.job._planes == {}


async def test_planes_that_come_after_the_end_are_not_verified(bench):
    it = bench()
    it.job.leave()
    checks = []
    it.driver.check = lambda check, answered: checks.append(check)
    it.tell(link.KvRead(it.job.key, 0, TOKENS, sections(it.spec, 0, TOKENS)))
    assert checks == []
