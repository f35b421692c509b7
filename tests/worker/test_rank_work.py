"""Ranks that work together, each in a thread with its own store: one store to the engine, one end of every step."""

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

from twostroke.core.errors import InternalError, KvCorrupted, RankLost
from twostroke.core.request import SamplingParams, SequenceKey
from twostroke.engine.link.rank_link import LinkEnded, RankReceiver, RankSender
from twostroke.engine.loop import EngineStore
from twostroke.engine.plan import History, SampledPlace, SequenceStep, StepPlan, StepResult
from twostroke.engine.rank_store import SlicedStore
from twostroke.engine.store_ops import ReadOp, SwapInOp, SwapOutOp, WriteOp
from twostroke.kernels.cpu.build import NativeUnavailable, built_library
from twostroke.kernels.reference import store_kv
from twostroke.kv.block import BlockId
from twostroke.kv.section import HeldTokens, PlaneBuffer
from twostroke.kv.slices import RankSlices
from twostroke.kv.spec import KvSpec, attention_spec, mla_spec
from twostroke.kv.store.host_store import HostStore
from twostroke.kv.store.store import KvStore
from twostroke.model.parallel.shared_group import SharedMemoryGroup, shared_region
from twostroke.worker.rank_work import Leader, follow

KEY, BLOCKS, TOKENS = 0xC0FFEE, 12, 59
TABLE, USES = tuple(map(BlockId, (7, 2, 9, 4))), (3, 3, 1, 8)
SEQUENCE = SequenceKey("r", 0)
PLAIN = [attention_spec(2, heads, 16, codec) for heads in (4, 2) for codec in (1, 2)]


@pytest.fixture(autouse=True)
def _kernels() -> None:
    try:
        built_library()
    except NativeUnavailable as error:
        pytest.skip(str(error))


@dataclass
class Scripted:
    """A runner whose steps fail at given ranks, before or after its sums."""

    group: SharedMemoryGroup
    fails: dict[int, str] = field(default_factory=dict)  # by step
    seen: list[StepPlan] = field(default_factory=list)

    def warm_up(self) -> None:
        self.group.all_reduce(torch.ones(3))

    def run(self, plan: StepPlan) -> StepResult:
        self.seen.append(plan)
        if self.fails.get(plan.step) == "before":
            raise ValueError("no memory")
        for _ in range(3):
            self.group.all_reduce(torch.ones(5))
        if self.fails.get(plan.step) == "after":
            raise ValueError("no memory")
        return StepResult(plan.step, tuple((step.token_ids[-1] + 1,) for step in plan.sequences))


class Worker:
    """Ranks in threads. Rank 0 is the test's."""

    def __init__(self, size: int, spec: KvSpec) -> None:
        region = shared_region(size, 4096)
        self.groups = [SharedMemoryGroup(region, rank, size, 4096) for rank in range(size)]
        os.close(region)
        pairs = [socket.socketpair() for _ in range(size - 1)]
        sender = RankSender([here for here, _ in pairs])
        self.stores = [KvStore(spec.of_rank(rank, size), BLOCKS, 16, digest_key=KEY) for rank in range(size)]
        self.runners = [Scripted(group) for group in self.groups]
        self.host_stores = [store.on_host(8) for store in self.stores]
        both = zip(self.stores, self.host_stores, strict=True)
        engines = [EngineStore(store, HostStore(store, host)) for store, host in both]
        self.leader = Leader(self.runners[0], sender, self.groups[0])
        self.slices = RankSlices(spec, size)
        self.store = SlicedStore(engines[0], sender, self.groups[0], self.slices)
        self.ends: list[BaseException] = []
        self._sender = sender
        self._threads = [
            threading.Thread(target=self._follow, args=(RankReceiver(pairs[rank - 1][1]), rank, engines[rank]))
            for rank in range(1, size)
        ]
        for thread in self._threads:
            thread.start()

    def _follow(self, receiver: RankReceiver, rank: int, store: EngineStore) -> None:
        try:
            follow(receiver, self.runners[rank], store, self.groups[rank], self.slices)
        except BaseException as error:
            self.ends.append(error)
        receiver.close()

    def close(self) -> None:
        self._sender.close()
        for thread in self._threads:
            thread.join(60)
        for group in self.groups:
            group.close()


@pytest.fixture
def make_worker() -> Iterator[Callable[..., Worker]]:
    with contextlib.ExitStack() as stack:

        def make(size: int, spec: KvSpec | None = None) -> Worker:
            worker = Worker(size, spec or attention_spec(2, 3 if size == 3 else 4, 16, 1))
            stack.callback(worker.close)
            return worker

        yield make


def filled(spec: KvSpec) -> tuple[KvStore, HeldTokens]:
    """A store of the whole model with one sealed sequence."""
    store = KvStore(spec, BLOCKS, 16, digest_key=KEY)
    place = torch.arange(TOKENS)
    slots = torch.tensor(TABLE)[place // 16] * 16 + place % 16
    generator = torch.Generator().manual_seed(5)
    for layer in range(2):
        rows = [torch.randn(TOKENS, c.heads, c.width, generator=generator) for c in spec.main.components]
        store_kv(rows[0], rows[1], slots, *store.planes(layer))
    held = HeldTokens(TABLE, USES, 0, TOKENS)
    store.seal(held)
    return store, held


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    "spec", [*PLAIN, mla_spec(2, 32, 16, 2)], ids=["4h fp8", "4h bf16", "2h fp8", "2h bf16", "mla"]
)
def test_a_prompt_that_arrives_is_shared_out_and_read_as_it_came(size: int, spec: KvSpec, make_worker) -> None:
    whole, held = filled(spec)
    worker = make_worker(size, spec)
    sections = whole.read_tokens(held)
    half = [
        tuple(
            replace(
                s, head_start=a, head_count=b - a, payload=s.payload[:, a:b], digests=s.digests[:, a:b],
                scales=None if s.scales is None else s.scales[:, a:b],
            )
            for s in sections
        )
        for a, b in ((0, 1), (1, sections[0].head_count))
    ]  # fmt: skip
    arrived = sections if sections[0].head_count == 1 else half[0] + half[1]
    worker.store.write(WriteOp(SEQUENCE, 0, TOKENS, TABLE, USES, arrived))
    assert all(store.verify(held) for store in worker.stores)
    for start, count in ((0, TOKENS), (16, 32), (48, 5)):
        part = HeldTokens(TABLE, USES, start, count)
        memory = np.zeros(1 << 20, np.uint8)
        slot = PlaneBuffer(memoryview(memory))  # a hand-over through shared memory asks so
        got = worker.store.read(ReadOp(SEQUENCE, start, count, TABLE, USES, slot))
        for mine, wanted in zip(got, whole.read_tokens(part), strict=True):
            assert replace(mine, payload=0, scales=0, digests=0) == replace(wanted, payload=0, scales=0, digests=0) or (
                (mine.component, mine.head_start, mine.head_count) == (wanted.component, 0, wanted.head_count)
            )
            assert np.array_equal(mine.payload, wanted.payload)
            assert np.array_equal(mine.digests, wanted.digests)
            assert (mine.scales is None) == (wanted.scales is None)
            assert mine.scales is None or np.array_equal(mine.scales, wanted.scales)
        assert np.shares_memory(got[0].payload, memory), "the joined heads are in the slot"


def test_a_rank_that_cannot_read_fails_the_read_and_the_next_one_works(make_worker) -> None:
    whole, held = filled(PLAIN[0])
    worker = make_worker(2)
    worker.store.write(WriteOp(SEQUENCE, 0, TOKENS, TABLE, USES, whole.read_tokens(held)))
    worker.stores[1]._sealed_generation[TABLE[1]] = 99
    with pytest.raises(InternalError, match="rank 1"):
        worker.store.read(ReadOp(SEQUENCE, 0, TOKENS, TABLE, USES))
    with pytest.raises(KvCorrupted, match="not sealed"):
        worker.store.read(ReadOp(SEQUENCE, 0, TOKENS, TABLE, (3, 3, 1, 9)))
    assert worker.store.read(ReadOp(SEQUENCE, 0, 16, TABLE, USES))[0].head_count == 4


def test_a_swapped_sequence_comes_back_at_every_rank_or_is_damaged_at_all(make_worker) -> None:
    whole, held = filled(PLAIN[0])
    worker = make_worker(2)
    sections = whole.read_tokens(held)
    worker.store.write(WriteOp(SEQUENCE, 0, TOKENS, TABLE, USES, sections))
    there = ((BlockId(1), BlockId(3), BlockId(5), BlockId(0)), (1, 1, 1, 1))
    now = ((BlockId(0), BlockId(1), BlockId(3), BlockId(5)), (5, 5, 5, 5))
    worker.store.swap_out(SwapOutOp(SEQUENCE, 0, TOKENS, TABLE, USES, *there))
    for store in worker.stores:
        for component in store.components:
            component.payload.fill_(0xAA)
    back = SwapInOp(SEQUENCE, 0, TOKENS, *now, *there)
    assert worker.store.swap_in(back)
    got = worker.store.read(ReadOp(SEQUENCE, 0, TOKENS, *now))
    assert all(np.array_equal(a.payload, b.payload) for a, b in zip(got, sections, strict=True))
    for rank in (1, 0):
        worker.host_stores[rank].components[0].payload.fill_(0x11)
        assert not worker.store.swap_in(back)


def step(token: int, place: SampledPlace | None = None, history: History | None = None) -> SequenceStep:
    return SequenceStep(
        *(SEQUENCE, 4, (token,), TABLE, USES, True, SamplingParams(9), 0), from_place=place, history=history
    )


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("failing", [(0,), (1,), (2,), (0, 1, 2)])
def test_a_step_that_fails_at_one_rank_fails_at_all_and_the_next_one_works(when, failing, make_worker) -> None:
    worker = make_worker(3)
    worker.leader.warm_up()
    for rank in failing:
        worker.runners[rank].fails[2] = when
    assert worker.leader.run(StepPlan(1, (step(7),))).tokens == ((8,),)
    with pytest.raises((ValueError, InternalError)):
        worker.leader.run(StepPlan(2, (step(7),)))
    assert worker.leader.run(StepPlan(3, (step(9),))).tokens == ((10,),)
    assert [[plan.step for plan in runner.seen] for runner in worker.runners] == [[1, 2, 3]] * 3
    assert not worker.ends


def test_the_other_ranks_get_tokens_that_were_sampled_before_the_plan_knew_them(make_worker) -> None:
    worker = make_worker(2)
    worker.leader.run(StepPlan(1, (step(7), step(20)._replace(key=SequenceKey("s", 0)))))
    worker.leader.run(StepPlan(2, (step(0, SampledPlace(1, 1), History((1, 2), (3,))),)))
    for runner in worker.runners:
        (got,) = runner.seen[-1].sequences
        assert (got.token_ids, got.from_place, got.history) == ((21,), None, History((1, 2), (3, 21)))


def test_the_ranks_end_with_the_first_and_it_ends_with_any(make_worker) -> None:
    worker = make_worker(3)
    worker.close()
    assert [type(error) for error in worker.ends] == [LinkEnded] * 2
    worker = make_worker(3)
    worker.leader.warm_up()
    worker.groups[2].fail(2)
    with pytest.raises(RankLost):
        worker.leader.run(StepPlan(1, (step(7),)))
    for thread in worker._threads:
        thread.join(60)
    assert [type(error) for error in worker.ends] == [RankLost] * 2


def test_a_section_of_other_heads_or_another_group_gives_a_rank_nothing() -> None:
    whole, held = filled(PLAIN[0])
    first = whole.read_tokens(held)[0]
    part = replace(first, head_count=2, payload=first.payload[:, :2], digests=first.digests[:, :2], scales=None)
    two, four = (RankSlices(PLAIN[0], size) for size in (2, 4))
    assert two.taken_apart([part])[1] == ()
    assert two.taken_apart([replace(part, group="draft")]) == [(), ()]
    _, (mine,), *others = four.taken_apart([part])
    assert others == [(), ()]
    assert (mine.head_start, mine.head_count) == (0, 1)
    assert np.array_equal(mine.payload[:, 0], first.payload[:, 1])


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("spec", [mla_spec(8, 32, 16, 2), attention_spec(8, 1, 16, 1)], ids=["mla", "mqa"])
def test_ranks_that_hold_the_same_give_equal_shares(size: int, spec: KvSpec) -> None:
    """Each packs its share of the layers, so that the parts of all together are the whole once."""
    num_bytes = 8 * (64 * spec.main.components[0].bytes_per_token + 4 * 8)  # payload, scales, digests
    num_bytes += 8 * (64 * spec.main.components[1].bytes_per_token + 4 * 8)
    assert RankSlices(spec, size).packed_bytes(64) == num_bytes // size
