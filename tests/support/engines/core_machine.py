"""Random commands to the core, with a store that remembers which prefix every cell was computed from."""

from collections import Counter

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.fakes.cell_store import EOS, KEY, ROOT, FakeStore, cells_of, oracle

from twostroke.core.request import SamplingParams, SequenceKey
from twostroke.decode_worker.policy import combined_policy, decode_policy
from twostroke.engine.core import CoreLimits, EngineCore
from twostroke.engine.link.messages import (
    AskSnapshot,
    Bind,
    Bound,
    CacheDelta,
    CacheSnapshot,
    CancelSequence,
    Ended,
    FetchBlocks,
    KvComplete,
    PeerBound,
    PeerNotYet,
    PrefillLocally,
    Progress,
    Promised,
    ReadKv,
    Release,
    Source,
    StepTokens,
    Submit,
    WriteKv,
)
from twostroke.engine.plan import StepPlan, StepResult
from twostroke.engine.policy import StepLimits
from twostroke.engine.step_times import StepTimes
from twostroke.engine.store_ops import FetchOp, ReadOp, SwapInOp, SwapOutOp, WriteOp
from twostroke.kv.block import chain
from twostroke.kv.cache.pool import BlockPool
from twostroke.kv.cache.prefix import PrefixCache
from twostroke.prefill_worker.policy import prefill_policy


class Face:
    """What the face knows of one sequence."""

    def __init__(self, submit: Submit) -> None:
        self.submit = submit
        self.truth = oracle(submit.prompt_ids, submit.params, submit.num_emitted)
        self.cells = cells_of([*submit.prompt_ids, *self.truth])
        self.tokens: list[int] = []
        self.held = self.computed = self.written = 0
        self.is_bound = self.is_local = False


class CoreMachine(RuleBasedStateMachine):
    """Random commands and steps; afterwards everything drains."""

    @initialize(
        num_blocks=st.integers(4, 10),
        span=st.sampled_from([16, 16, 32]),
        seqs=st.integers(1, 5),
        batch=st.sampled_from([16, 32, 48, 96]),
        num_host=st.sampled_from([0, 2, 6, 20]),
    )
    def begin(self, num_blocks, span, seqs, batch, num_host):
        self.start_with(StepLimits(seqs, batch, 8, 600), BlockPool(num_blocks, span))
        prefix = PrefixCache(self.pool)
        self.core = EngineCore(
            CoreLimits(None, num_host), self.pool, prefix, combined_policy(self.limits), eos_ids=[EOS], key=KEY
        )

    def start_with(self, limits, pool):
        self.limits, self.pool = limits, pool
        self.store = FakeStore(pool.block_tokens)
        self.store.host = FakeStore(pool.block_tokens)
        self.spoiled = 0  # copies that come back damaged from now on
        self.faces: dict[SequenceKey, Face] = {}
        self.known: set[bytes] = set()  # what a watcher of the cache believes
        self.last_delta = 0
        self.submitted, self.ended = 0, Counter()
        self.parked: set[SequenceKey] = set()
        self.now_s = 0.0
        self.flight: StepPlan | None = None

    # ------------------------------------------------------------------ the face

    @rule(
        source=st.sampled_from([Source.LOCAL, Source.PEER, Source.PEER, Source.FOR_PEER]),
        sizes=st.tuples(st.integers(1, 120), st.integers(1, 60), st.integers(0, 3)),
        family=st.integers(0, 2),
        copies=st.integers(1, 4),
        patience=st.none() | st.none() | st.floats(0.5, 20),
    )
    def submit(self, source, sizes, family, copies, patience):
        length, max_tokens, emitted = sizes
        for copy in range(copies):
            self.submit_one(source, (length + 9 * copy, max_tokens, emitted), family, patience)

    def submit_one(self, source, sizes, family, patience):
        self.submitted += 1
        length, max_tokens, emitted = sizes
        key = SequenceKey(f"r{self.submitted}", 0)
        common = min(length - 1, 20 + 16 * family)  # prompts of one family share a prefix
        prompt = tuple(3 + (place * (family + 3)) % 5 for place in range(common))
        prompt += tuple(3 + (place * self.submitted) % 7 for place in range(common, length))
        submit = Submit(
            key=key,
            source=source,
            prompt_ids=prompt,
            identities=tuple(chain(KEY, ROOT, prompt)),
            identity_root=ROOT,
            params=SamplingParams(max_tokens=max_tokens),
            num_emitted=min(emitted, length - 1, max_tokens - 1),
            priority=self.submitted % 2,
            deadline_s=None if patience is None else self.now_s + patience,
        )
        self.faces[key] = Face(submit)
        self.hear(self.core.handle(submit, self.now_s))

    def some(self, data) -> SequenceKey:
        return data.draw(st.sampled_from(sorted(self.faces)), label="of")

    @precondition(lambda self: self.faces)
    @rule(data=st.data(), kind=st.sampled_from([Bind, PeerBound, PeerNotYet, Release, CancelSequence]))
    def say(self, data, kind):
        self.hear(self.core.handle(kind(self.some(data)), self.now_s))

    @precondition(lambda self: self.faces)
    @rule(data=st.data(), size=st.integers(1, 3))
    def peers_go_on(self, data, size):
        """What a peer would say now, to every sequence that waits for one."""
        fitting = {"PROMISED": Bind, "OFFERED": PeerBound, "PARKED": PeerBound}
        for key, state in self.core.states().items():
            if state.name in fitting and data.draw(st.booleans()):
                self.hear(self.core.handle(fitting[state.name](key), self.now_s))
            elif state.name == "BOUND" and data.draw(st.booleans()):
                self.write_next(key, size)

    @precondition(lambda self: self.faces)
    @rule(data=st.data(), size=st.integers(1, 3))
    def write(self, data, size):
        """The next frame of a hand-over, or one for whoever does not expect it."""
        key = self.some(data)
        self.write_next(key, size)

    def write_next(self, key: SequenceKey, size: int) -> None:
        face = self.faces[key]
        start = max(face.held, face.written)
        end = min(start + 16 * size, len(face.submit.prompt_ids))
        if end > start:
            sections = tuple(face.cells[start:end])
            self.hear(self.core.handle(WriteKv(key, start, end - start, sections), self.now_s))
            if face.is_bound:
                face.written = end

    @precondition(lambda self: self.faces)
    @rule(data=st.data())
    def complete(self, data):
        """Also with gaps: the core must notice."""
        key = self.some(data)
        self.expect_first(key, self.core.handle(KvComplete(key, self.faces[key].truth[0]), self.now_s))

    def expect_first(self, key: SequenceKey, outbox) -> None:
        face = self.faces[key]
        if face.is_bound and not face.is_local:
            face.tokens.append(face.truth[0])  # it came over the hand-over
            face.is_local = True
        self.hear(outbox)

    @precondition(lambda self: self.faces)
    @rule(data=st.data(), knows_first=st.booleans(), kept=st.integers(0, 120))
    def peer_lost(self, data, knows_first, kept):
        bound = [key for key, face in self.faces.items() if face.is_bound and not face.is_local]
        waiting = [key for key, face in self.faces.items() if face.submit.source is Source.PEER and not face.is_local]
        if bound or (waiting and kept == 0):
            self.lose(data.draw(st.sampled_from(bound or waiting)), kept, knows_first=knows_first)

    def lose(self, key: SequenceKey, kept: int, *, knows_first: bool) -> None:
        face = self.faces[key]
        face.is_local = True
        if knows_first:
            face.tokens.append(face.truth[0])
        first = face.truth[0] if knows_first else None
        self.hear(self.core.handle(PrefillLocally(key, kept, first), self.now_s))

    @precondition(lambda self: self.faces)
    @rule(data=st.data(), start=st.integers(0, 6), count=st.integers(1, 100))
    def read(self, data, start, count):
        key = self.some(data)
        count = min(count, max(self.faces[key].computed - 16 * start, 1))
        self.hear(self.core.handle(ReadKv(key, 16 * start, count), self.now_s))

    @precondition(lambda self: self.faces)
    @rule(data=st.data(), first=st.integers(0, 3))
    def fetch(self, data, first):
        face = self.faces[self.some(data)]
        identities = face.submit.identities[first:]
        self.fetched_cells = face.cells[16 * first :]
        self.hear(self.core.handle(FetchBlocks(1, identities, 16 * first, ROOT), self.now_s))

    @rule()
    def ask_snapshot(self):
        self.hear(self.core.handle(AskSnapshot(), self.now_s))

    @rule(copies=st.integers(1, 2))
    def spoil(self, copies):
        self.spoiled = copies

    @rule(kind=st.sampled_from([prefill_policy, decode_policy, combined_policy]))
    def change_role(self, kind):
        self.core.set_policy(kind(self.limits))

    @rule(decode_ms=st.floats(0, 200), per_token_ms=st.floats(0, 50), per_pair_ms=st.floats(0, 1))
    def learn_times(self, decode_ms, per_token_ms, per_pair_ms):
        """Steps on this machine take so long: prompts beside decodes come in smaller pieces."""
        self.core.set_times(StepTimes(decode_ms, per_token_ms, per_pair_ms))

    # ------------------------------------------------------------------ the loop

    @precondition(lambda self: self.flight is None)
    @rule(pause_s=st.floats(0, 1))
    def begin_step(self, pause_s):
        self.now_s += pause_s
        self.hear(self.core.tick(self.now_s))
        self.flight = self.core.plan(self.now_s)
        self.hear(self.core.drain())
        if self.flight is not None:
            self.check_plan(self.flight)

    @precondition(lambda self: self.flight is not None)
    @rule(fate=st.sampled_from(["fine"] * 8 + ["fails", "not finite", "waits for a mask"]))
    def end_step(self, fate):
        plan, self.flight = self.flight, None
        if fate == "fails":
            self.hear(self.core.fail_step(plan, "internal_error", "boom"))
            return
        result = self.store.run(plan)
        if fate == "not finite":
            bad = plan.sequences[0].key
            result = StepResult(plan.step, ((), *result.tokens[1:]), frozenset({bad}))
        if fate == "waits for a mask":
            late = frozenset(step.key for step in plan.sequences if step.samples)
            result = StepResult(plan.step, ((),) * len(plan.sequences), deferred=late)
        self.hear(self.core.apply(plan, result, self.now_s))

    @precondition(lambda self: self.flight is None)
    @rule(steps=st.integers(2, 12))
    def run(self, steps):
        for _ in range(steps):
            self.begin_step(0.01)
            if self.flight is None:
                break
            self.end_step("fine")

    @precondition(lambda self: self.flight is None)
    @rule(length=st.integers(1, 40), family=st.integers(0, 2), steps=st.integers(20, 60))
    def crowd(self, length, family, steps):
        """More growth than the pool holds: somebody is preempted."""
        for place in range(3):
            self.submit_one(Source.LOCAL, (length + 8 * place, 60, 0), family, None)
        self.run(steps)

    def check_plan(self, plan: StepPlan) -> None:
        budget = self.core.policy.budget(0)
        assert 0 < plan.num_tokens <= budget.max_batch_tokens
        assert len(plan.sequences) <= budget.max_seqs
        assert len({step.key for step in plan.sequences}) == len(plan.sequences)
        for step in plan.sequences:
            known = [*self.faces[step.key].submit.prompt_ids, *self.faces[step.key].truth]
            assert list(step.token_ids) == known[step.start : step.end], "ids that are not the sequence's"
            assert len(step.block_table) * self.pool.block_tokens >= step.end

    # ------------------------------------------------------------------ what the face hears

    def hear(self, outbox) -> None:
        for item in outbox:
            face = self.faces.get(getattr(item, "key", None))
            match item:
                case SwapOutOp() | SwapInOp() if self.spoiled:
                    self.spoiled -= 1
                    self.hear(self.core.swap_failed(item.key))
                case SwapOutOp() | SwapInOp():
                    self.store.swap(item)
                case ReadOp() | WriteOp() | FetchOp():
                    self.execute(item)
                case Promised():
                    face.held = item.held_tokens
                case Bound():
                    face.is_bound = True
                case Progress():
                    assert item.num_computed > face.computed
                    assert item.began == (face.computed == 0)
                    face.computed = item.num_computed
                case StepTokens():
                    for news in item.news:
                        face = self.faces[news.key]
                        assert news.first_index == face.submit.num_emitted + len(face.tokens)
                        face.tokens += news.token_ids
                        assert face.tokens == face.truth[: len(face.tokens)], "a wrong, lost or doubled token"
                        assert face.submit.source is not Source.FOR_PEER or len(face.tokens) == 1
                case Ended():
                    self.ended[item.key] += 1
                    face = self.faces.pop(item.key)
                    if face.submit.source is not Source.FOR_PEER and item.reason in ("stop", "length"):
                        assert face.tokens == face.truth
                case CacheDelta():
                    assert item.sequence == self.last_delta + 1
                    self.last_delta += 1
                    assert not self.known & set(item.stored)
                    assert self.known >= set(item.removed)
                    self.known = (self.known | set(item.stored)) - set(item.removed)
                case CacheSnapshot():
                    assert (item.sequence, set(item.identities)) == (self.last_delta, self.known)

    def execute(self, op) -> None:
        if isinstance(op, WriteOp):
            assert all(self.pool.owners(block) == 1 for block in op.block_table[op.token_start // 32 :][-1:])
            self.store.write(op.block_table, op.generations, op.token_start, op.sections)
            return
        cells = self.store.read(op.block_table, op.generations, op.token_start, op.token_count)
        truth = self.fetched_cells if isinstance(op, FetchOp) else self.faces[op.key].cells[op.token_start :]
        assert cells == truth[: op.token_count], "KV of another prefix"

    # ------------------------------------------------------------------ always, and in the end

    @invariant()
    def everything_adds_up(self):
        if not hasattr(self, "core"):
            return
        self.core.check_integrity()
        assert set(self.core.states()) == set(self.faces)
        assert all(count == 1 for count in self.ended.values())
        assert len(self.ended) + len(self.faces) == self.submitted
        assert self.pool.allocated_total - self.pool.freed_total == self.pool.num_live

    def teardown(self):
        if hasattr(self, "core"):
            self.drain()

    def drain(self):
        """Peers answer, nobody cancels: every sequence ends, within a bounded number of steps."""
        if self.flight is not None:
            self.end_step("fine")
        for _ in range(400 * (1 + len(self.faces))):
            if not self.faces:
                break
            for key, state in list(self.core.states().items()):
                face = self.faces.get(key)
                if face is not None:
                    self.answer(key, face, state.name)
            self.begin_step(0.0)
            if self.flight is not None:
                self.end_step("fine")
        assert not self.faces, f"stuck: {self.core.states()}"
        self.hear(self.core.handle(AskSnapshot(), self.now_s))
        assert self.pool.num_live == 0
        assert self.core.load(self.now_s).promised_blocks == 0
        assert dict(self.core.load(self.now_s).counters).get("swap_blocks_in_use", 0) == 0

    def carry_on(self, key: SequenceKey, face: Face) -> None:
        """A frame at a time; every other hand-over is lost after its first one, and its end claims too much."""
        habit = int(key.request_id[1:]) % 4
        whole = len(face.submit.prompt_ids)
        if habit > 1 and face.written:
            self.lose(key, whole, knows_first=habit == 2)
        elif face.written < whole:
            self.write_next(key, 1)
        else:
            self.expect_first(key, self.core.handle(KvComplete(key, face.truth[0]), self.now_s))

    def answer(self, key: SequenceKey, face: Face, state: str) -> None:
        match state:
            case "PROMISED":
                kind = CancelSequence if int(key.request_id[1:]) % 7 == 0 else Bind
                self.hear(self.core.handle(kind(key), self.now_s))
            case "BOUND":
                self.carry_on(key, face)
            case "OFFERED" if key not in self.parked and int(key.request_id[1:]) % 3 == 0:
                self.parked.add(key)
                self.hear(self.core.handle(PeerNotYet(key), self.now_s))
            case "OFFERED" | "PARKED":
                self.hear(self.core.handle(PeerBound(key), self.now_s))
            case "HELD":
                self.hear(self.core.handle(ReadKv(key, 0, len(face.submit.prompt_ids)), self.now_s))
                self.hear(self.core.handle(Release(key), self.now_s))
