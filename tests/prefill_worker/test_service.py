"""Which hand-overs are taken, told without an engine: a link that records, a stream in memory."""

import asyncio
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from support.clusters.leases import PATIENT

from twostroke.core.clock import MonotonicClock
from twostroke.core.lease import Lease
from twostroke.core.request import CacheScope, Epoch, FinishReason, Role, SamplingParams
from twostroke.engine.adapters import AdapterBounds, AdapterFiles
from twostroke.engine.facts import FaceFacts, ModelFacts
from twostroke.engine.link.client import EngineClient
from twostroke.engine.link.messages import CancelSequence, Ended, Offered, PeerBound, PeerNotYet, Source, Submit
from twostroke.kv.codec import Codec
from twostroke.kv.handover.frames import decode_envelope, encode_message
from twostroke.kv.handover.machine import Label
from twostroke.kv.keys import PromptHasher
from twostroke.kv.messages import sampling_to_wire, spec_to_wire
from twostroke.kv.spec import attention_spec
from twostroke.prefill_worker.service import PrefillService
from twostroke.prefill_worker.task import PrefillTaskTools
from twostroke.protos import handover_pb2 as pb

SPEC = attention_spec(2, 2, 16, Codec.FP8_E4M3)
CLASS = b"c" * 16
SCOPE = CacheScope("tests", b"")
NAMER = PromptHasher(b"k" * 32, b"w" * 16, CLASS)


class Recorder:
    """The face's end of a link without an engine."""

    def __init__(self):
        self.commands = []
        self.sent = asyncio.Event()
        self._events = asyncio.Queue()

    def send(self, command):
        self.commands.append(command)
        self.sent.set()
        if isinstance(command, CancelSequence):
            self.say(Ended(command.key, FinishReason.CANCELLED))

    def say(self, event):
        self._events.put_nowait(event)

    async def receive(self):
        return [await self._events.get()]

    async def until(self, kind):
        async with asyncio.timeout(60):
            while not any(isinstance(command, kind) for command in self.commands):
                self.sent.clear()
                await self.sent.wait()
        return next(command for command in self.commands if isinstance(command, kind))


class Pipe:
    """A stream in memory, as the decode worker sees it."""

    def __init__(self):
        self.up, self.down = asyncio.Queue(), asyncio.Queue()
        self.sequence = 0
        self.label = Label("r", 0, Epoch(1, 1))

    async def send(self, envelope):
        self.down.put_nowait(envelope)

    async def receive(self):
        return await self.up.get()

    def write(self, body):
        self.sequence += 1
        self.up.put_nowait(encode_message(self.label.up(self.sequence, body)))

    def hang_up(self):
        self.up.put_nowait(None)

    async def read(self, kind):
        """The next message that is no beat."""
        async with asyncio.timeout(60):
            while True:
                message = decode_envelope(await self.down.get())
                if message.WhichOneof("body") != "beat":
                    assert message.WhichOneof("body") == kind, message
                    return message


def order(**changes):
    fields = {
        "prompt_ids": list(range(40)),
        "sampling": sampling_to_wire(SamplingParams(max_tokens=4, temperature=0.0)),
        "isolation_domain": "tests",
        "kv_spec": spec_to_wire(SPEC),
        "numerics_class": CLASS,
        "deterministic": True,
        "frame_slots": 4,
        "timeout_ms": 600_000,
        "identity_root": NAMER.root(SCOPE),
    }
    return pb.Open(**fields | changes)


class Bench:
    """A service between a recorder and pipes."""

    def __init__(self, deterministic=True, role=Role.PREFILL, max_streams=2, timing=None):
        model = ModelFacts("m", "", 100, 64, frozenset({1}), b"w" * 16, CLASS, "here", deterministic, SPEC)
        facts = FaceFacts("p", model, NAMER, 7, 10, 16, 8192, 4, 8, 64)
        self.link = Recorder()
        dispatcher = EngineClient(self.link)
        self._executor = ThreadPoolExecutor(1)
        self.counters = Counter()
        tools = PrefillTaskTools(
            dispatcher, self._executor, 7, CLASS, timing or PATIENT, MonotonicClock(), self.counters
        )
        self.role = role
        self.service = PrefillService(facts, tools, lambda: self.role, max_streams)
        self._tasks = [asyncio.create_task(dispatcher.run())]

    def open(self, message=None):
        pipe = Pipe()
        if message is not None:
            pipe.write(message)
        self._tasks.append(asyncio.create_task(self.service.serve(pipe)))
        return pipe, self._tasks[-1]

    async def close(self):
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._executor.shutdown()


@pytest.fixture
async def bench():
    made = []

    def make(**options):
        made.append(Bench(**options))
        return made[-1]

    yield make
    for one in made:
        await one.close()


async def test_an_order_becomes_a_sequence_for_a_peer(bench):
    it = bench()
    it.open(order(held_tokens=16, priority=3, emitted_tokens=2))
    submit = await it.link.until(Submit)
    assert submit.source is Source.FOR_PEER
    assert submit.prompt_ids == tuple(range(40))
    assert len(submit.identities) == 2
    assert (submit.priority, submit.num_emitted) == (3, 2)
    assert 0 < submit.deadline_s - MonotonicClock().now_s() <= 600


async def test_a_drain_that_takes_too_long_ends_what_runs_and_says_how_many(bench):
    it = bench()
    _, task = it.open(order())
    await it.link.until(Submit)
    assert await it.service.drain(0.01) == 1
    await it.link.until(CancelSequence)
    await asyncio.wait([task], timeout=2)
    assert task.done()


async def test_the_engine_waits_for_room_over_there(bench):
    it = bench()
    pipe, _ = it.open(order())
    submit = await it.link.until(Submit)
    it.link.say(Offered(submit.key, 16))
    assert (await pipe.read("started")).started.cached_tokens == 16
    pipe.write(pb.NotYet())
    await it.link.until(PeerNotYet)
    pipe.write(pb.Bind())
    await it.link.until(PeerBound)


@pytest.mark.parametrize(
    ("changes", "code", "word"),
    [
        ({"numerics_class": b"x" * 16}, "kv_pair_refused", "numerics class"),
        ({"kv_spec": spec_to_wire(attention_spec(3, 2, 16, Codec.FP8_E4M3))}, "kv_pair_refused", "3 layers"),
        ({"kv_spec": spec_to_wire(attention_spec(2, 4, 16, Codec.FP8_E4M3))}, "kv_pair_refused", "heads 0 to 1 of k"),
        ({"capabilities": ["handover.shm.1"]}, "kv_pair_refused", "handover.grpc.1"),
        ({"tensor_parallel_size": 3}, "kv_pair_refused", "over 3 ranks"),
        ({"capabilities": ["kv.read.float32"]}, "kv_pair_refused", "cannot store fp8"),
        ({"prompt_ids": []}, "invalid_value", "held_tokens"),
        ({"prompt_ids": [1] * 64}, "context_length_exceeded", "64"),
        ({"prompt_ids": [100]}, "invalid_value", "vocabulary"),
        ({"sampling": sampling_to_wire(SamplingParams(4, stop_token_ids=(100,)))}, "invalid_value", "vocabulary"),
        ({"sampling": sampling_to_wire(SamplingParams(4, bad_words=((7, 100),)))}, "invalid_value", "vocabulary"),
        ({"held_tokens": 8}, "invalid_value", "multiple of 16"),
        ({"frame_slots": 0}, "invalid_value", "frame_slots"),
    ],
)
async def test_an_order_that_cannot_be_carried_out_is_refused_typed(bench, changes, code, word):
    it = bench()
    pipe, task = it.open(order(**changes))
    failed = (await pipe.read("failed")).failed
    assert failed.code == code
    assert word in failed.message
    await asyncio.wait_for(task, 60)
    assert it.link.commands == []


@pytest.mark.parametrize(
    "changes",
    [{"key": b"x" * 32}, {"weights_fingerprint": b"x" * 16}, {"numerics_class": b"x" * 16}],
    ids=lambda changes: next(iter(changes)),
)
@pytest.mark.parametrize("deterministic", [True, False])
async def test_a_peer_that_names_its_blocks_otherwise_is_refused(bench, changes, deterministic):
    it = bench(deterministic=deterministic)
    root = replace(NAMER, **changes).root(SCOPE)
    pipe, task = it.open(order(identity_root=root, deterministic=deterministic))
    failed = (await pipe.read("failed")).failed
    assert (failed.code, failed.param) == ("invalid_value", "identity_root")
    await asyncio.wait_for(task, 60)
    assert it.link.commands == []


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"isolation_domain": "others"}, "identity_root"),
        ({"identity_root": b""}, "identity_root"),
        ({"adapter": b"a"}, "identity_root"),
        ({"adapter": b"a", "identity_root": NAMER.root(replace(SCOPE, adapter=b"a"))}, "adapter"),  # not loaded
    ],
)
async def test_an_order_whose_names_do_not_follow_from_it_is_refused(bench, changes, param):
    it = bench()
    pipe, _ = it.open(order(**changes))
    assert (await pipe.read("failed")).failed.param == param
    assert it.link.commands == []


async def test_a_job_holds_its_adapter_until_its_stream_has_ended(bench):
    it = bench()
    adapters, dropped = it.service._tools.adapters, []
    adapters.bounds = AdapterBounds(2, 1000)
    adapters._drop = dropped.append
    slot = adapters.claim("x", AdapterFiles(b"a", "/a", 8, 100))
    adapters.ready(slot, 100)
    pipe, task = it.open(order(adapter=b"a", identity_root=NAMER.root(replace(SCOPE, adapter=b"a"))))
    assert (await it.link.until(Submit)).adapter_slot == slot
    adapters.remove("x")
    assert dropped == []
    pipe.up.put_nowait(None)  # the peer is gone
    await asyncio.wait_for(task, 60)
    assert dropped == [slot]
    cancels = [place for place, command in enumerate(it.link.commands) if isinstance(command, CancelSequence)]
    assert cancels, "the sequence ends before its adapter is dropped"


async def test_another_class_is_welcome_where_nobody_is_deterministic(bench):
    it = bench(deterministic=False)
    it.open(order(deterministic=False, numerics_class=b"x" * 16))
    await it.link.until(Submit)


async def test_a_deterministic_worker_takes_no_other_class_whatever_the_order_says(bench):
    it = bench()
    pipe, _ = it.open(order(deterministic=False, numerics_class=b"x" * 16))
    assert (await pipe.read("failed")).failed.param == "numerics_class"


async def test_another_codec_is_welcome_where_nobody_is_deterministic(bench):
    it = bench(deterministic=False)
    it.open(order(deterministic=False, kv_spec=spec_to_wire(attention_spec(2, 2, 16, Codec.FP32))))
    await it.link.until(Submit)


async def test_streams_are_bounded(bench):
    it = bench(max_streams=1)
    it.open(order())
    await it.link.until(Submit)
    pipe, _ = it.open(order())
    failed = (await pipe.read("failed")).failed
    assert failed.code == "overloaded"
    assert failed.retry_after_ms > 0


async def test_the_same_order_may_come_again_before_the_first_has_ended(bench):
    it = bench()
    for _ in range(2):
        it.open(order())
    async with asyncio.timeout(60):
        while len(submits := [command for command in it.link.commands if isinstance(command, Submit)]) < 2:
            await asyncio.sleep(0.001)
    assert submits[0].key != submits[1].key


@pytest.mark.parametrize("why", ["combined", "draining"])
async def test_who_takes_no_hand_overs_says_so(bench, why):
    it = bench(role=Role.COMBINED if why == "combined" else Role.PREFILL)
    it.service.draining.is_on = why == "draining"
    pipe, _ = it.open(order())
    assert (await pipe.read("failed")).failed.code == "unavailable"


async def test_a_decode_worker_takes_hand_overs_that_were_on_their_way_when_its_role_changed(bench):
    it = bench(role=Role.DECODE)
    it.open(order())
    assert (await it.link.until(Submit)).source is Source.FOR_PEER


@pytest.mark.parametrize("how", ["cancel", "hang up", "silence", "task cancelled", "garbage", "deadline"])
async def test_every_way_out_gives_the_blocks_back(bench, how):
    it = bench(timing=Lease(beat_s=0.05, silence_s=0.3 if how == "silence" else 60.0))
    pipe, task = it.open(order(timeout_ms=150 if how == "deadline" else 600_000))
    submit = await it.link.until(Submit)
    if how == "cancel":
        pipe.write(pb.Cancel(reason="test"))
    elif how == "hang up":
        pipe.hang_up()
    elif how == "task cancelled":
        task.cancel()
    elif how == "garbage":
        pipe.up.put_nowait(b"TK garbage")
    assert (await it.link.until(CancelSequence)).key == submit.key
    await asyncio.wait([task], timeout=2)
    assert task.done()
    assert it.service.num_running == 0


async def test_the_engines_refusal_reaches_the_peer(bench):
    it = bench()
    pipe, task = it.open(order())
    submit = await it.link.until(Submit)
    it.link.say(Ended(submit.key, FinishReason.ERROR, "overloaded", "the queue is full"))
    failed = (await pipe.read("failed")).failed
    assert (failed.code, failed.message) == ("overloaded", "the queue is full")
    await asyncio.wait_for(task, 60)
    assert not any(isinstance(command, CancelSequence) for command in it.link.commands)


@pytest.mark.parametrize("first", [None, b"", b"TK", "frame of another direction"])
async def test_a_stream_that_does_not_open_costs_nothing(bench, first):
    it = bench(timing=Lease(beat_s=0.05, silence_s=0.1))
    pipe, task = it.open()
    if first == "frame of another direction":
        first = encode_message(pipe.label.down(1, pb.Started()))
    if first is not None:
        pipe.up.put_nowait(first)
    await asyncio.wait_for(task, 60)
    assert it.link.commands == []
