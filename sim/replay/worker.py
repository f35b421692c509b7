"""One simulated worker, step by step: production policy, block pool and prefix cache; step times from a `Machine`.

Not `engine/scheduler.py`, whose work per token would cost hours per run. Here a step costs the same whatever the number
of its sequences, and steps without prompts are played many at once. Budgets, shares, nearness and watermark come from
the role's production `RolePolicy`, measured speeds from the production `StepTimeModel`. tests/sim/replay plays a small
trace on both. Left out: copies to host memory (a preempted sequence is computed again), priorities, and more than
SCANNED waiting prompts per step.

    submit ──▶ waiting ── near, has room ──▶ prefilling ──▶ decoding ──▶ ended
                  ▲  bind at the decode worker   │    └─ for a peer: KV travels ─▶ decoding there
                  └──────────── preempted ───────┴─────────┘
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Callable
from typing import Any, NamedTuple, cast

from ...core.lease import ENGINE_LEASE
from ...core.request import Role
from ...engine.plan import StepPlan
from ...engine.policy import Ahead, RolePolicy
from ...engine.step_times import StepTimeModel
from ...kv.cache.pool import OutOfBlocks
from ...kv.spec import HASH_BLOCK_TOKENS
from ...router.routing.coefficients import pairs_of
from ...router.routing.facts import LoadFacts
from ..scale.machine import Machine
from .cache import JobCache
from .clock import Planned, VirtualClock
from .decoding import Decoding
from .job import Job, Report, rank_of

SCANNED = 64  # waiting prompts that are looked at before a step
HANDOVER_OVERLAP = 0.8  # share of a hand-over that travels while later chunks are computed


class WorkerFrame(NamedTuple):
    """What a worker is and where it runs."""

    name: str
    role: Role
    machine: Machine
    policy: RolePolicy
    block_tokens: int
    clock: VirtualClock
    handover_s: Callable[[int], float]  # time that the KV of so many tokens travels


class _Row(NamedTuple):
    """Part of a step, as `StepTimeModel` reads it."""

    token_ids: range  # only their number counts
    start: int
    samples: bool
    num_generated: int
    targets: tuple[int, ...] = ()


_DECODE_ROW = _Row(range(1), 0, samples=True, num_generated=1)


class _Batch(NamedTuple):
    """Decode steps that are played at once."""

    began_s: float
    num_steps: int
    first_ms: float  # time of the first step
    growth_ms: float  # more in each later one
    end: Planned

    def took_s(self, steps: int) -> float:
        return (steps * self.first_ms + self.growth_ms * steps * (steps - 1) / 2) / 1e3


class SimWorker:
    """The queue, the running sequences and the cache of one worker."""

    def __init__(self, frame: WorkerFrame, tell: Callable[[SimWorker, Report], None]) -> None:
        """`tell` gets a report after each step that has news."""
        self.name, self.role, self.machine, self.policy = frame.name, frame.role, frame.machine, frame.policy
        self.cache = JobCache(frame.machine.kv_capacity_tokens, frame.block_tokens, frame.policy)
        self.pace = StepTimeModel()
        self.coming: list[Job] = []  # orders under way, which the worker does not know yet
        self.waiting: list[Job] = []  # by rank
        self.prefilling: list[Job] = []  # by rank
        self.decoding = Decoding(frame.block_tokens)
        self.num_bound = 0  # sequences whose KV comes from a peer
        self.num_preemptions = 0
        self.busy_s = 0.0
        self.gaps_ms: dict[int, int] = {}  # time between tokens, rounded up: number of tokens
        self._clock, self._tell, self._handover_s = frame.clock, tell, frame.handover_s
        self._running = False  # a step is under way
        self._batch: _Batch | None = None
        self._next_beat_s = 0.0
        self._first: list[Job] = []
        self._ended: list[Job] = []
        self._waiting_tokens = 0
        self._waiting_pairs = 0.0
        self._arrived: list[Job] = []  # bound sequences whose KV is here

    # ------------------------------------------------------------------ from outside

    def submit(self, job: Job) -> None:
        """A request arrives: to be computed here, for itself or for a peer."""
        self.coming.remove(job)
        job.likely_cached = self.cache.held_tokens(job)
        self._wait(job)
        self.wake()

    def wake(self) -> None:
        """Begin a step if none is under way; end a batch of decode steps after the present one."""
        if self._batch is not None:
            self._cut(self._batch)
        elif not self._running:
            self._turn(self._clock.now_s)

    def bind(self, job: Job) -> bool:
        """A peer is about to compute a prompt: take the blocks for it. False: there is no room or seat now."""
        if self._num_seated >= self.policy.budget(len(self.decoding)).max_seqs or not self.cache.has_room(job):
            return False
        self.cache.take(job)
        job.missing_tokens = job.num_remaining
        job.bound, job.blocks = job.blocks, []
        job.num_computed = job.num_published = 0
        self.num_bound += 1
        return True

    def receive(self, job: Job) -> None:
        """The KV of a bound prompt is here; it decodes from the next step on."""
        self._arrived.append(job)
        self.wake()

    def load(self) -> LoadFacts:
        """Its load, as engine/report.py counts it."""
        pool = self.cache.pool
        return LoadFacts(
            waiting=len(self.waiting) + self.num_bound,
            running=len(self.prefilling) + len(self.decoding),
            queued_prefill_tokens=self._waiting_tokens + sum([job.num_remaining for job in self.prefilling]),
            queued_prefill_pairs=self._waiting_pairs
            + sum([pairs_of(job.num_remaining, job.num_computed) for job in self.prefilling]),
            running_context_tokens=self.decoding.context_tokens,
            free_blocks=pool.num_free,
            cached_blocks=pool.num_cached,
            total_blocks=pool.num_blocks,
            phase="decode" if self._running else "idle",
            steps=self.decoding.num_steps,
            prefill_ms_per_token=self.pace.prefill_ms_per_token,
            prefill_ms_per_token_pair=self.pace.prefill_ms_per_token_pair,
            decode_step_ms=self.pace.decode_step_ms,
        )

    # ------------------------------------------------------------------ admission

    @property
    def _num_seated(self) -> int:
        return self.num_bound + len(self.prefilling) + len(self.decoding)

    def _admit(self) -> None:
        max_seqs = self.policy.budget(len(self.decoding)).max_seqs
        ahead = self._ahead()
        if not self.policy.is_near(1, ahead):
            return  # then no longer prompt is near, either
        for job in self.waiting[:SCANNED]:
            if not self.policy.is_near(job.num_expected, ahead) or self._awaits_prefix(job):
                continue
            if self._num_seated >= max_seqs or not self.cache.has_room(job):
                break
            if job.is_for_peer and not job.decode.bind(job):
                continue  # parked: the next one may go
            self.cache.take(job)
            if job.cached_tokens is None:
                job.cached_tokens = job.num_computed
            self.waiting.remove(job)
            self._count_waiting(job, -1)
            insort(self.prefilling, job, key=rank_of)
            ahead = self._ahead()

    def _wait(self, job: Job) -> None:
        insort(self.waiting, job, key=rank_of)
        self._count_waiting(job, 1)

    def _count_waiting(self, job: Job, sign: int) -> None:
        """Keep the sums over `waiting`; a job that leaves counts as it did when it came."""
        tokens = job.prompt_tokens - job.likely_cached
        self._waiting_tokens += sign * tokens
        self._waiting_pairs += sign * pairs_of(tokens, job.likely_cached)

    def _ahead(self) -> Ahead:
        return Ahead(tuple([job.num_remaining for job in self.prefilling]), len(self.decoding))

    def _awaits_prefix(self, job: Job) -> bool:
        """True if a running prompt computes the next block that this one lacks."""
        findable = self.cache.findable(job)
        held = self.cache.prefix.match(findable)
        if held == len(findable):
            return False
        return any(held < len(w.identities) and w.identities[held] == findable[held] for w in self.prefilling)

    # ------------------------------------------------------------------ steps

    def _turn(self, now_s: float) -> None:
        self._running = False
        for job in self._arrived:
            self.num_bound -= 1
            job.blocks, job.bound, job.is_for_peer = job.bound, [], False
            self.cache.publish(job, job.prompt_tokens)
            self._begin_decode(job)
        self._arrived.clear()
        self._admit()
        chunks = self._chunks(len(self.decoding))
        if chunks:
            self._step(chunks)
        elif len(self.decoding):
            self._decode(now_s)
        else:
            self._report(now_s, is_idle=True)

    def _chunks(self, num_decodes: int) -> list[tuple[Job, int]]:
        """Prompts of the next step and their tokens, as `Scheduler._chunks` does it."""
        if not self.prefilling:
            return []
        policy = self.policy
        budget = policy.budget(num_decodes)
        num_tokens = min(budget.prefill_tokens, budget.max_batch_tokens - num_decodes)
        if num_decodes:
            longest = max(job.num_computed for job in self.prefilling)
            num_tokens = policy.prompt_tokens(num_tokens, self.pace.times, longest, is_scored=False)
        found = []
        shares = policy.share([job.num_remaining for job in self.prefilling], num_tokens)
        for job, share in zip(self.prefilling, shares, strict=True):
            size = min(share, job.num_remaining)
            if size < job.num_remaining:
                size -= (job.num_computed + size) % HASH_BLOCK_TOKENS
            if size > 0:
                found.append((job, size))
        return found

    def _step(self, chunks: list[tuple[Job, int]]) -> None:
        """A step with prompts."""
        count = len(self.decoding)
        took_ms = sum(self.machine.prefill_s(size, job.num_computed) for job, size in chunks) * 1e3
        rows = [_Row(range(size), job.num_computed, samples=False, num_generated=0) for job, size in chunks]
        if count:
            took_ms += self.machine.step_s(count, self.decoding.context_tokens) * 1e3
            rows.append(_DECODE_ROW)
        self._observe(rows, took_ms)
        self._running = True
        self._clock.later(took_ms / 1e3, lambda now_s: self._end_step(now_s, chunks, count, took_ms))

    def _end_step(self, now_s: float, chunks: list[tuple[Job, int]], num_decodes: int, took_ms: float) -> None:
        self.busy_s += took_ms / 1e3
        if num_decodes:
            self._count_gaps(num_decodes, took_ms)
            self.decoding.num_steps += 1
            self._settle_due()
        for job, size in chunks:
            if job not in self.prefilling:
                continue  # preempted for a decode of this step
            job.num_computed += size
            self.cache.publish(job, job.num_computed)
            if not job.num_remaining:
                self.prefilling.remove(job)
                self._prefilled(job)
        self._report(now_s)
        self._turn(now_s)

    def _prefilled(self, job: Job) -> None:
        job.emitted += 1
        if job.emitted == 1:
            self._first.append(job)
        if not job.is_for_peer:
            self._begin_decode(job)
            return
        travels_s = self._handover_s(job.missing_tokens) * (1.0 - HANDOVER_OVERLAP)
        blocks, job.blocks = job.blocks, []

        def arrive(_: float) -> None:
            self.cache.pool.give_back(blocks)
            job.decode.receive(job)
            self.wake()

        job.num_published = 0  # the bound blocks are published at the other end
        self._clock.later(travels_s, arrive)

    def _decode(self, now_s: float) -> None:
        """As many steps without prompts as go until something changes, or a beat is due."""
        count, context = len(self.decoding), self.decoding.context_tokens
        first_ms = self.machine.step_s(count, context) * 1e3
        growth_ms = self.machine.step_s(count, context + count) * 1e3 - first_ms
        steps = max(1, min(self.decoding.steps_to_next, int(ENGINE_LEASE.beat_s * 1e3 / first_ms)))
        self._running = True
        self._begin(_Batch(now_s, steps, first_ms, growth_ms, Planned(None)), steps)

    def _begin(self, batch: _Batch, steps: int) -> None:
        end = self._clock.at(batch.began_s + batch.took_s(steps), self._end_decode)
        self._batch = batch._replace(num_steps=steps, end=end)

    def _cut(self, batch: _Batch) -> None:
        """End the batch with the step under way."""
        passed_s = self._clock.now_s - batch.began_s
        steps = 1
        while batch.took_s(steps) < passed_s - 1e-9:
            steps += 1
        if steps < batch.num_steps:
            batch.end.cancel()
            self._begin(batch, steps)

    def _end_decode(self, now_s: float) -> None:
        batch = self._batch
        assert batch is not None
        self._batch = None
        steps, took_ms = batch.num_steps, batch.took_s(batch.num_steps) * 1e3
        self.busy_s += took_ms / 1e3
        self._count_gaps(steps * len(self.decoding), took_ms / steps)
        self.decoding.num_steps += steps
        self._observe([_DECODE_ROW], took_ms / steps)
        self._settle_due()
        self._report(now_s)
        self._turn(now_s)

    def _observe(self, rows: list[_Row], took_ms: float) -> None:
        self.pace.observe(StepPlan(0, cast(Any, rows)), took_ms)

    def _count_gaps(self, tokens: int, gap_ms: float) -> None:
        place = math.ceil(gap_ms)
        self.gaps_ms[place] = self.gaps_ms.get(place, 0) + tokens

    # ------------------------------------------------------------------ decoding sequences

    def _begin_decode(self, job: Job) -> None:
        if job.emitted < job.answer_tokens:
            self.decoding.add(job)
        else:
            self._end(job)

    def _settle_due(self) -> None:
        """Sequences that end with this step, and those whose next token needs a block."""
        while (job := self.decoding.take_due()) is not None:
            if self.decoding.num_steps >= self.decoding.end_of(job):
                self.decoding.remove(job)
                self._end(job)
            elif self._grow(job):
                self.decoding.plan(job)

    def _grow(self, job: Job) -> bool:
        """Take a block, preempting the last ones if necessary. False: the sequence itself was preempted."""
        while True:
            try:
                job.blocks += self.cache.pool.take(1)
            except OutOfBlocks:
                victim = max([*self.decoding, *(j for j in self.prefilling if not j.is_for_peer)], key=rank_of)
                self._preempt(victim)
                if victim is job:
                    return False
            else:
                return True

    def _preempt(self, job: Job) -> None:
        self.num_preemptions += 1
        if job in self.decoding:
            self.decoding.remove(job)
        else:
            self.prefilling.remove(job)
        self.cache.release(job)
        job.num_computed = job.likely_cached = 0
        self._wait(job)

    def _end(self, job: Job) -> None:
        self.cache.release(job)
        self._ended.append(job)

    # ------------------------------------------------------------------ to the router

    def _report(self, now_s: float, *, is_idle: bool = False) -> None:
        is_due = is_idle or bool(self.waiting) or now_s >= self._next_beat_s
        if is_due:
            self._next_beat_s = now_s + ENGINE_LEASE.beat_s
        stored, removed = self.cache.prefix.drain_events()
        if is_due or self._first or self._ended or stored or removed:
            first, self._first, ended, self._ended = self._first, [], self._ended, []
            self._tell(self, Report(first, ended, stored, removed, self.load() if is_due else None))
