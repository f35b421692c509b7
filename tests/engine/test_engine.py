"""The step loop in its thread: with the real runner on a tiny random Llama, and with runners that fail."""

import asyncio
import socket
import sys
import threading
import time
from collections import defaultdict
from dataclasses import replace

import pytest

import twostroke.engine.loop as engine_module
from twostroke.core.clock import MonotonicClock
from twostroke.core.request import FinishReason, Role, SamplingParams, SequenceKey
from twostroke.decode_worker.policy import combined_policy, decode_policy
from twostroke.engine.core import CoreLimits, EngineCore
from twostroke.engine.link.messages import (
    Bind,
    BlocksFetched,
    Bound,
    CacheDelta,
    Ended,
    FetchBlocks,
    KvComplete,
    KvRead,
    KvWritten,
    LoadNews,
    Offered,
    PeerBound,
    PrefillLocally,
    Progress,
    Promised,
    ReadKv,
    Release,
    SetRole,
    Source,
    StepTokens,
    Stop,
    Submit,
    WriteKv,
)
from twostroke.engine.link.plan_stream import PlanReceiver, PlanSender
from twostroke.engine.link.process_link import FaceEnd, serve_engine
from twostroke.engine.link.thread_link import ThreadLink
from twostroke.engine.loop import INTEGRITY_S, Engine
from twostroke.engine.plan import StepResult
from twostroke.engine.policy import StepLimits
from twostroke.kv.cache.pool import BlockPool
from twostroke.kv.cache.prefix import PrefixCache
from twostroke.prefill_worker.policy import prefill_policy

TIMEOUT_S = 30
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
SEEDED = SamplingParams(max_tokens=12, temperature=0.9, top_p=0.9, seed=5, ignore_eos=True)


class Desk:
    """A face that remembers everything it heard, and can wait for something."""

    def __init__(self, link: ThreadLink) -> None:
        self.link = link
        self.heard = []
        self.tokens = defaultdict(list)
        self.is_over = False

    async def until(self, wanted):
        """The first event, already heard or to come, that `wanted` accepts; it is taken out."""
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                for event in self.heard:
                    if wanted(event):
                        self.heard.remove(event)
                        return event
                assert not self.is_over, "the engine ended before"
                await self.hear()

    async def hear(self):
        batch = await self.link.receive()
        self.is_over = not batch
        for event in batch:
            if isinstance(event, StepTokens):
                for news in event.news:
                    known = self.tokens[news.key]
                    if not known:
                        known += [None] * news.first_index  # a peer's first token never comes through this engine
                    assert news.first_index == len(known)
                    known += news.token_ids
        self.heard += batch

    async def of(self, kind, key):
        return await self.until(lambda event: isinstance(event, kind) and event.key == key)


class Behind:
    """The face's end of a link between processes, opened by the first that listens."""

    def __init__(self, link):
        self._sock, other = socket.socketpair()
        self._unsent, self._face = [], None
        serve_engine(other, link)

    def send(self, command):
        if self._face is None:
            self._unsent.append(command)
        else:
            self._face.send(command)

    async def receive(self):
        if self._face is None:
            self._face = await FaceEnd.open(self._sock)
            for command in self._unsent:
                self._face.send(command)
        return await self._face.receive()


class Travelling:
    """A runner that gets its plans as a rank of another process does: as differences, in bytes."""

    def __init__(self, runner):
        self._runner, self._sender, self._receiver = runner, PlanSender(), PlanReceiver()

    def __getattr__(self, name):
        return getattr(self._runner, name)

    def run(self, plan):
        travelled = self._receiver.decode(self._sender.encode(plan))
        assert travelled == plan
        return self._runner.run(travelled)


@pytest.fixture(params=["threads", "processes"])
def start(request):
    """Engines that are stopped after the test, behind either link."""
    engines = []

    def begin(runner, store, policy=combined_policy, *, num_blocks=64, clock=None, **limits):
        link = ThreadLink()
        pool = BlockPool(num_blocks, 16)
        limits = StepLimits(**limits)
        roles = {Role.PREFILL: prefill_policy(limits)}
        prefix = PrefixCache(pool)
        core = EngineCore(CoreLimits(), pool, prefix, policy(limits), eos_ids=[1], key=b"cluster", roles=roles)
        if request.param == "processes":
            runner = Travelling(runner)
        engine = Engine(core, runner, store, link, clock or MonotonicClock())
        engine.start()
        engines.append((engine, link))
        return engine, Desk(link if request.param == "threads" else Behind(link)), core

    yield begin
    for engine, link in engines:
        link.send(Stop())
        assert engine.join(TIMEOUT_S)
    assert not [thread for thread in threading.enumerate() if thread.name == "engine"]


def submit(name, source, length, params, **more):
    prompt = tuple((7 * place + length) % 150 + 2 for place in range(length))
    return Submit(SequenceKey(name, 0), source, prompt, (), b"root", params, **more)


async def in_one_piece(desk, length, params):
    command = submit(f"whole{length}", Source.LOCAL, length, params)
    desk.link.send(command)
    await desk.of(Ended, command.key)
    return desk.tokens.pop(command.key)


@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
async def test_a_batch_in_chunks_gives_the_tokens_of_one_at_a_time(write_tiny, make_runner, start, params):
    lengths = [3, 40, 100, 17]
    runner = make_runner(write_tiny({}))
    _, desk, _ = start(runner, runner.store)
    whole = [await in_one_piece(desk, length, params) for length in lengths]
    runner = make_runner(write_tiny({}))
    _, desk, core = start(runner, runner.store, num_blocks=16, max_batch_tokens=32)  # too small for all at once
    commands = [submit(f"b{length}", Source.LOCAL, length, params) for length in lengths]
    for command in commands:
        desk.link.send(command)
    for command, tokens in zip(commands, whole, strict=True):
        await desk.of(Ended, command.key)
        assert desk.tokens[command.key] == tokens
    assert core.num_live == 0


async def carry(sender: Desk, receiver: Desk, length, params, *, upto=None, frame=32):
    """A hand-over by hand; with `upto` the sender is lost there. Returns the key."""
    ask, take = submit("x", Source.FOR_PEER, length, params), submit("x", Source.PEER, length, params)
    key = ask.key
    receiver.link.send(take)
    held = (await receiver.of(Promised, key)).held_tokens
    sender.link.send(ask)
    await sender.of(Offered, key)
    receiver.link.send(Bind(key))
    await receiver.of(Bound, key)
    sender.link.send(PeerBound(key))
    sent, goal = held, length if upto is None else upto
    while sent < goal:
        computed = (await sender.of(Progress, key)).num_computed
        while sent < min(computed, goal):
            count = min(frame, computed - sent, goal - sent)
            if sent + count < length:
                count -= count % 16
            if count == 0:
                break
            sender.link.send(ReadKv(key, sent, count))
            read = await sender.of(KvRead, key)
            receiver.link.send(WriteKv(key, sent, count, read.sections))
            assert (await receiver.of(KvWritten, key)).token_start == sent
            sent += count
    await sender.until(lambda e: isinstance(e, StepTokens) and e.news[0].key == key)
    return key, sender.tokens.pop(key)[0]


@pytest.mark.parametrize("kv", ["fp8", "float32"])
@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
async def test_handed_over_gives_the_tokens_of_one_piece(write_tiny, make_runner, start, params, kv):
    make = lambda: make_runner(write_tiny({}), kv_dtype=kv)  # noqa: E731
    prefill, decode, alone = make(), make(), make()
    _, sender, sender_core = start(prefill, prefill.store, prefill_policy, max_batch_tokens=48)
    _, receiver, receiver_core = start(decode, decode.store, decode_policy)
    _, whole, _ = start(alone, alone.store)
    for length in (100, 39, 100):  # the third finds a prefix on both sides
        expected = await in_one_piece(whole, length, params)
        key, first = await carry(sender, receiver, length, params)
        receiver.link.send(KvComplete(key, first))
        sender.link.send(Release(key))
        await sender.of(Ended, key)
        await receiver.of(Ended, key)
        assert receiver.tokens.pop(key) == [None, *expected[1:]]
        assert first == expected[0]
    assert sender_core.num_live == receiver_core.num_live == 0
    assert receiver_core.load(0).cached_blocks > 0


@pytest.mark.parametrize("knows_first", [False, True])
async def test_a_lost_peer_changes_no_token(write_tiny, make_runner, start, knows_first):
    prefill, decode, alone = (make_runner(write_tiny({})) for _ in range(3))
    _, sender, _ = start(prefill, prefill.store, prefill_policy)
    _, receiver, _ = start(decode, decode.store, decode_policy)
    _, whole, _ = start(alone, alone.store)
    expected = await in_one_piece(whole, 100, SEEDED)
    key, first = await carry(sender, receiver, 100, SEEDED, upto=48)
    receiver.link.send(PrefillLocally(key, 40, first if knows_first else None))
    ended = await receiver.of(Ended, key)
    assert ended.reason is FinishReason.LENGTH
    assert receiver.tokens[key] == ([None, *expected[1:]] if knows_first else expected)


async def test_cached_blocks_are_fetched_by_identity(write_tiny, make_runner, start):
    runner = make_runner(write_tiny({}))
    _, desk, _ = start(runner, runner.store)
    await in_one_piece(desk, 70, GREEDY)
    stored = (await desk.until(lambda e: isinstance(e, CacheDelta))).stored
    desk.link.send(FetchBlocks(9, stored[1:4], 16, b"root"))
    fetched = await desk.until(lambda e: isinstance(e, BlocksFetched))
    assert (fetched.fetch_id, fetched.num_blocks) == (9, 3)
    assert {section.component for section in fetched.sections} == {"k", "v"}
    assert all(section.payload.shape[2] == 48 for section in fetched.sections)
    desk.link.send(FetchBlocks(10, stored[1:4], 16, b"another tenant's root"))
    refused = await desk.until(lambda e: isinstance(e, BlocksFetched) and e.fetch_id == 10)
    assert (refused.num_blocks, refused.sections) == (0, ())


async def test_planes_the_store_refuses_end_their_sequence_only(write_tiny, make_runner, start):
    runner = make_runner(write_tiny({}))
    _, desk, _ = start(runner, runner.store, decode_policy)
    take = submit("x", Source.PEER, 40, GREEDY)
    desk.link.send(take)
    await desk.of(Promised, take.key)
    desk.link.send(Bind(take.key))
    desk.link.send(WriteKv(take.key, 0, 32, ()))
    ended = await desk.of(Ended, take.key)
    assert (ended.reason, ended.error_code) == (FinishReason.ERROR, "kv_corrupted")
    assert len(await in_one_piece(desk, 20, GREEDY)) == 12


# ------------------------------------------------------------------ without weights


class Steps:
    """Runs steps without a model; fails those it is told to, and can be held."""

    def __init__(self, fails=()) -> None:
        self.fails = set(fails)
        self.count = 0
        self.may_go = threading.Event()
        self.may_go.set()

    def warm_up(self) -> None:
        pass

    def run(self, plan):
        self.may_go.wait(TIMEOUT_S)
        self.count += 1
        if self.count in self.fails:
            raise RuntimeError("boom")
        return StepResult(plan.step, tuple((5,) if step.samples else () for step in plan.sequences))


async def test_a_failed_step_ends_its_sequences_and_not_the_engine(start, caplog):
    good = GREEDY.max_tokens  # steps of the one between them
    engine, desk, core = start(Steps(fails=[1, 2, good + 3, good + 4]), None)
    for name in ("a", "b", "good", "c", "d"):
        desk.link.send(submit(name, Source.LOCAL, 20, GREEDY))
        ended = await desk.of(Ended, SequenceKey(name, 0))
        wanted = (FinishReason.LENGTH, "") if name == "good" else (FinishReason.ERROR, "internal_error")
        assert (ended.reason, ended.error_code) == wanted
    assert "boom" in caplog.text
    desk.link.send(submit("e", Source.LOCAL, 20, GREEDY))
    assert (await desk.of(Ended, SequenceKey("e", 0))).reason is FinishReason.LENGTH
    assert not engine.is_broken
    assert core.num_live == 0


class Poisoned(Steps):
    """Fails every step that computes a sequence of that name; takes others while `steps` lasts, where it is given."""

    steps: threading.Semaphore | None = None

    def run(self, plan):
        if any(step.key.request_id == "poison" for step in plan.sequences):
            self.count += 1
            raise RuntimeError("boom")
        if self.steps is not None:
            self.steps.acquire(timeout=TIMEOUT_S)
        return super().run(plan)


@pytest.mark.parametrize("start", ["threads"], indirect=True)  # counts steps from one command to the next
async def test_who_makes_a_step_fail_ends_alone_and_never_the_engine(start):
    runner = Poisoned()
    runner.steps = threading.Semaphore(0)  # the neighbour stays until the last of the others has ended
    engine, desk, core = start(runner, None)
    desk.link.send(submit("neighbour", Source.LOCAL, 20, replace(GREEDY, max_tokens=400)))
    for length in range(20, 28):
        desk.link.send(submit("poison", Source.LOCAL, length, GREEDY))
        runner.steps.release(3)
        ended = await desk.of(Ended, SequenceKey("poison", 0))
        assert (ended.error_code, "RuntimeError" in ended.error_message) == ("internal_error", True)
    runner.steps.release(400)
    assert (await desk.of(Ended, SequenceKey("neighbour", 0))).reason is FinishReason.LENGTH
    assert len(desk.tokens[SequenceKey("neighbour", 0)]) == 400
    assert not engine.is_broken
    assert core.num_live == 0


class Overflowing(Poisoned):
    """Beside it, one whose logits are not finite."""

    def run(self, plan):
        result = super().run(plan)
        bad = frozenset(step.key for step in plan.sequences if step.key.request_id == "overflows")
        return replace(result, tokens=tuple(() if step.key in bad else (5,) for step in plan.sequences), non_finite=bad)


async def test_what_is_told_of_a_neighbour_holds_also_where_a_step_is_taken_again(start):
    runner = Overflowing()
    _, desk, _ = start(runner, None)
    runner.may_go.clear()
    for name in ("first", "poison", "overflows"):
        desk.link.send(submit(name, Source.LOCAL, 20, GREEDY))
    runner.may_go.set()
    ends = {name: await desk.of(Ended, SequenceKey(name, 0)) for name in ("first", "poison", "overflows")}
    assert [ends[name].error_code for name in ends] == ["", "internal_error", "non_finite_kv"]


async def test_three_failures_in_a_row_break_the_engine_and_everyone_hears(start):
    engine, desk, _ = start(Steps(fails=[1, 2, 3]), None, max_num_seqs=1)
    keys = [SequenceKey(name, 0) for name in "abcd"]
    for key in keys:
        desk.link.send(submit(key.request_id, Source.LOCAL, 20, GREEDY))
    for key in keys:  # the fourth never ran
        assert (await desk.of(Ended, key)).error_code == "internal_error"
    assert (await desk.until(lambda e: isinstance(e, LoadNews) and e.phase == "broken")).total_blocks == 64
    while not desk.is_over:
        await desk.hear()
    assert engine.join(TIMEOUT_S)
    assert engine.is_broken


async def test_a_deadline_passes_while_nothing_else_happens(start):
    _, desk, _ = start(Steps(), None)
    now_s = time.monotonic()
    desk.link.send(submit("a", Source.PEER, 20, GREEDY, deadline_s=now_s + 0.15))
    assert (await desk.of(Ended, SequenceKey("a", 0))).error_code == "deadline_exceeded"
    assert time.monotonic() - now_s >= 0.15


async def test_an_idle_engine_sleeps_between_beats(start):
    _, desk, core = start(Steps(), None)
    ticks = 0
    plain = core.tick

    def tick(now_s):
        nonlocal ticks
        ticks += 1
        return plain(now_s)

    core.tick = tick
    for _ in range(4):
        await desk.until(lambda e: isinstance(e, LoadNews) and e.phase == "idle")
    assert ticks < 40


async def test_the_policy_changes_between_steps(start):
    _, desk, core = start(Steps(), None, decode_policy)
    desk.link.send(SetRole(Role.PREFILL))
    await in_one_piece(desk, 20, GREEDY)
    assert core.policy == prefill_policy(StepLimits())


async def test_the_beat_goes_on_and_learns_the_pace_of_steps(start):
    _, desk, _ = start(Steps(), None)
    for round_ in range(3):
        await in_one_piece(desk, 20 + round_, GREEDY)
    load = await desk.until(lambda e: isinstance(e, LoadNews) and e.decode_step_ms > 0 and e.steps >= 36)
    assert load.prefill_ms_per_token + load.prefill_ms_per_token_pair > 0


class Slow(Steps):
    """A token of a step takes a millisecond of a clock that only this runner moves."""

    def __init__(self) -> None:
        super().__init__()
        self.time_s = 0.0
        self.beside = []  # prompt tokens of every step that decodes as well
        self.at_stream = None  # called once, in the stream's first step after its prompt

    def now_s(self) -> float:
        self.time_s += 1e-6
        return self.time_s

    def run(self, plan):
        tokens = [step.num_tokens for step in plan.sequences]
        self.time_s += sum(tokens) / 1000
        if tokens == [1] and self.at_stream is not None:
            self.at_stream()
            self.at_stream = None
        if len(tokens) > 1:
            self.beside.append(sum(tokens) - 1)
        return super().run(plan)


async def test_a_prompt_beside_a_stream_comes_in_pieces_that_fit_the_time(start):
    runner = Slow()
    engine, desk, _ = start(runner, None, max_batch_tokens=512, target_ms=51.0, clock=runner)
    await in_one_piece(desk, 200, GREEDY)
    # From the engine's thread, so at the engine's end: on a longer way the order might come after the stream.
    runner.at_stream = lambda: engine._link.send(submit("long", Source.LOCAL, 300, GREEDY))
    desk.link.send(submit("stream", Source.LOCAL, 20, replace(GREEDY, max_tokens=200)))
    await desk.of(Ended, SequenceKey("long", 0))
    assert max(runner.beside) == 48  # a millisecond is the stream's, and chunks end at hash blocks
    assert sum(tokens for tokens in runner.beside if tokens > 1) == 300


class Gated(Steps):
    """Says when it has begun the step that it may not take yet, and in which order all happened. A store of nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.has_begun = threading.Event()
        self.order = []

    def run(self, plan):
        self.order += [step.key.request_id for step in plan.sequences]
        self.has_begun.set()
        return super().run(plan)

    def read_tokens(self, _held, _into, *, without_windows):
        self.order.append("read")
        return ()


async def test_what_a_peer_waits_for_is_read_before_the_next_step(start, monkeypatch):
    monkeypatch.setattr(engine_module, "PEER_WAIT_S", TIMEOUT_S)
    runner = Gated()
    _, desk, _ = start(runner, runner, prefill_policy, max_batch_tokens=64)
    keys = [SequenceKey(name, 0) for name in ("one", "two")]
    for key in keys:
        desk.link.send(submit(key.request_id, Source.FOR_PEER, 64, GREEDY))
        await desk.of(Offered, key)
    runner.may_go.clear()
    desk.link.send(submit("before", Source.LOCAL, 20, replace(GREEDY, max_tokens=1)))
    assert runner.has_begun.wait(TIMEOUT_S)
    for key in keys:
        desk.link.send(PeerBound(key))
    runner.may_go.set()
    await desk.of(Progress, keys[0])
    await asyncio.sleep(0.02)  # an engine that does not wait goes on
    desk.link.send(ReadKv(keys[0], 0, 64))
    await desk.of(KvRead, keys[0])
    desk.link.send(Release(keys[0]))
    await desk.of(Progress, keys[1])
    assert runner.order == ["before", "one", "read", "two"]


def lines_run(work) -> int:
    """Lines of Python that `work` runs: what it costs, on any machine."""
    count = 0

    def trace(frame, event, arg):
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def test_one_check_of_a_pool_of_four_million_tokens_holds_the_thread_no_longer_than_of_a_small_one(monkeypatch):
    monkeypatch.setattr(engine_module, "CHECKED_BLOCKS", 256)

    def cost(num_blocks: int, num_swap_blocks: int) -> int:
        pool = BlockPool(num_blocks, 16)
        limits = CoreLimits(None, num_swap_blocks)
        core = EngineCore(limits, pool, PrefixCache(pool), combined_policy(StepLimits()), eos_ids=[1], key=b"cluster")
        engine = Engine(core, None, None, ThreadLink(), MonotonicClock())
        costs = []
        for turn in range(3):
            costs.append(lines_run(lambda turn=turn: engine._check(turn * INTEGRITY_S)))
        return max(costs)

    assert cost(4_200_000 // 16, 300_000) <= cost(512, 512)


def test_host_blocks_are_checked_in_the_same_parts(monkeypatch):
    monkeypatch.setattr(engine_module, "CHECKED_BLOCKS", 16)
    pool = BlockPool(20, 16)
    core = EngineCore(
        CoreLimits(None, 40), pool, PrefixCache(pool), combined_policy(StepLimits()), eos_ids=[1], key=b"cluster"
    )
    engine = Engine(core, None, None, ThreadLink(), MonotonicClock())
    host = core._scheduler.holdings.swap.pool
    host.give_back([block for block in host.take(40) if block != 38])  # 38 has an owner, and no sequence has it
    engine._check(0.0)
    engine._check(INTEGRITY_S)
    with pytest.raises(AssertionError, match="block 38"):
        engine._check(2 * INTEGRITY_S)


def test_a_large_pool_is_checked_a_part_at_a_time_and_wholly_in_the_end(monkeypatch):
    monkeypatch.setattr(engine_module, "CHECKED_BLOCKS", 16)
    pool = BlockPool(40, 16)
    core = EngineCore(CoreLimits(), pool, PrefixCache(pool), combined_policy(StepLimits()), eos_ids=[1], key=b"cluster")
    engine = Engine(core, None, None, ThreadLink(), MonotonicClock())
    for turn in range(4):
        engine._check(turn * INTEGRITY_S)
    pool._is_cached[39] = 1  # plain, and yet marked; blocks 16 to 31 come first
    engine._check(4 * INTEGRITY_S)
    engine._check(4.5 * INTEGRITY_S)  # not due
    with pytest.raises(AssertionError, match="block 39"):
        engine._check(5 * INTEGRITY_S)
