"""The core under random commands where blocks may lack their windowed layers: no step reads what is not there."""

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import initialize, precondition, rule
from support.engines.core_machine import CoreMachine
from support.fakes.cell_store import EOS, KEY, ROOT, FakeStore

from twostroke.core.request import SequenceKey
from twostroke.decode_worker.policy import combined_policy
from twostroke.engine.core import CoreLimits, EngineCore
from twostroke.engine.link.messages import BlocksFetched, FetchBlocks, Reading, ReadKv, Release, Source, WriteKv
from twostroke.engine.plan import StepPlan, StepResult
from twostroke.engine.policy import StepLimits
from twostroke.engine.store_ops import FetchOp, ReadOp, WriteOp
from twostroke.kv.cache.pool import BlockPool
from twostroke.kv.cache.prefix import PrefixCache
from twostroke.kv.spec import WindowedLayers
from twostroke.kv.windows import windows_from


class Cell(bytes):
    """A token's KV in both of two layers, the first of which has a window. Also the section that brings it."""

    group, layer_start, layer_count = "main", 0, 2


class Bare(Cell):
    """The same without the windowed layer."""

    layer_start, layer_count = 1, 1


class WindowStore(FakeStore):
    """Steps look at the windowed layer of what their rows see."""

    def __init__(self, block_tokens: int, window: int) -> None:
        super().__init__(block_tokens)
        self.window = window

    def run(self, plan: StepPlan) -> StepResult:
        for step in plan.sequences:
            first = max(0, step.start - self.window + 1)
            seen = self.read(step.block_table, step.generations, first, step.start - first)
            assert not any(isinstance(cell, Bare) for cell in seen), f"{step.key} sees what is not there"
        return super().run(plan)


class WindowMachine(CoreMachine):
    """Hand-overs and fetches leave out what is before the window; all else goes on from there."""

    @initialize(
        num_blocks=st.integers(8, 22),
        span=st.sampled_from([16, 16, 32, 64]),
        seqs=st.integers(1, 5),
        batch=st.sampled_from([32, 96]),
        num_host=st.sampled_from([0, 6, 20]),
        window=st.sampled_from([1, 10, 40]),
    )
    def begin(self, *, num_blocks, span, seqs, batch, num_host, window):
        self.start_with(StepLimits(seqs, batch, 8, 600), BlockPool(num_blocks * 16 // span + 2, span))
        self.store, self.windowed = WindowStore(span, window), WindowedLayers((0,), window)
        self.store.host = FakeStore(span)
        prefix = PrefixCache(self.pool, windowed=self.windowed)
        self.core = EngineCore(
            CoreLimits(None, num_host), self.pool, prefix, combined_policy(self.limits), eos_ids=[EOS], key=KEY
        )
        self.answers: list[BlocksFetched] = []

    @rule(
        source=st.sampled_from([Source.LOCAL, Source.PEER, Source.PEER, Source.FOR_PEER]),
        sizes=st.tuples(st.integers(1, 260), st.integers(1, 60), st.integers(0, 3)),
        family=st.integers(0, 9),
        copies=st.integers(1, 3),
        patience=st.none() | st.none() | st.floats(0.5, 20),
    )
    def submit(self, source, sizes, family, copies, patience):
        length, max_tokens, emitted = sizes
        for copy in range(copies):
            self.submit_one(source, (length + 9 * copy, max_tokens, emitted), family, patience)

    def write_next(self, key: SequenceKey, size: int) -> None:
        face = self.faces[key]
        num_tokens = len(face.submit.prompt_ids)
        first = windows_from(self.windowed, face.held, num_tokens)
        start = max(face.held, face.written)
        end = min(start + 32 * size, first if start < first else num_tokens)
        if end > start:
            kind = Bare if end <= first else Cell
            sections = tuple(kind(cell) for cell in face.cells[start:end])
            self.hear(self.core.handle(WriteKv(key, start, end - start, sections), self.now_s))
            if face.is_bound:
                face.written = end

    @precondition(lambda self: self.faces)
    @rule(data=st.data(), first=st.integers(0, 3), how=st.sampled_from(Reading))
    def fetch(self, data, first, how):
        face = self.faces[self.some(data)]
        self.fetched_cells = face.cells[16 * first :]
        outbox = self.core.handle(FetchBlocks(1, face.submit.identities[first:], 16 * first, ROOT, how), self.now_s)
        self.hear(outbox)
        if how is Reading.NOTHING:
            (answer,) = [item for item in outbox if isinstance(item, BlocksFetched)]
            self.check_start(face, first, answer.num_blocks)

    def check_start(self, face, first: int, count: int) -> None:
        """As many blocks as were counted are here, with the window of their last one behind the asker's own."""
        prefix, identities = self.core.prefix, face.submit.identities
        end = (first + count) * 16
        for number in range(first, first + count):
            block = prefix.locate(identities[number])
            assert block is not None
            is_seen = (number + 1) * 16 > end - self.windowed.tokens + 1
            assert not (is_seen and prefix.lacks_windows(block)), "a start that sees what is not there"

    @precondition(lambda self: self.faces)
    @rule(data=st.data(), start=st.integers(0, 12), count=st.integers(1, 100))
    def read(self, data, start, count):
        key = self.some(data)
        count = min(count, max(self.faces[key].computed - 16 * start, 1))
        first = windows_from(self.windowed, 0, len(self.faces[key].submit.prompt_ids))
        without = 16 * start + count <= first
        self.hear(self.core.handle(ReadKv(key, 16 * start, count, without), self.now_s))

    def answer(self, key, face, state: str) -> None:
        if state != "HELD":
            super().answer(key, face, state)
            return
        num_tokens = len(face.submit.prompt_ids)
        first = windows_from(self.windowed, 0, num_tokens)
        if first:
            self.hear(self.core.handle(ReadKv(key, 0, first, True), self.now_s))
        self.hear(self.core.handle(ReadKv(key, first, num_tokens - first), self.now_s))
        self.hear(self.core.handle(Release(key), self.now_s))

    def execute(self, op) -> None:
        super().execute(op)
        if isinstance(op, WriteOp) or op.without_windows:
            return
        cells = self.store.read(op.block_table, op.generations, op.token_start, op.token_count)
        lacks = any(isinstance(cell, Bare) for cell in cells)
        if isinstance(op, FetchOp):
            assert not lacks, "a fetch of all layers reads what is not there"
        elif isinstance(op, ReadOp) and lacks:
            # Only a random read across the edge: a sender reads each side for itself.
            num_tokens = len(self.faces[op.key].submit.prompt_ids)
            assert op.token_start < windows_from(self.windowed, 0, num_tokens), "a sender reads what is not there"


WindowMachine.TestCase.settings = settings(
    max_examples=25,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
TestRandomLivesWithWindows = WindowMachine.TestCase
