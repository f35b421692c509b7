"""The step loop: commands in, plan, run, events out. core.py decides, model/runner.py computes.

One thread owns core, runner and store. It sleeps on the link when no sequence can run, and wakes for commands,
deadlines and its own beat.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from ..core.clock import Clock
from ..core.errors import InternalError, InvalidRequest, RankLost
from ..core.lease import ENGINE_LEASE
from ..core.request import FinishReason, SequenceKey
from ..kv.section import HeldTokens, SectionData
from ..kv.store.host_store import HostStore
from ..kv.store.store import KvStore
from .core import EngineCore
from .guard.idle import IdleGuard
from .link.messages import AdapterCommand, AdapterRefused, DropAdapter, Ended, Event, LoadAdapter, LoadNews, Submit
from .link.thread_link import ThreadLink
from .plan import StepPlan, StepResult
from .speculation.draft_model.plan import DraftPlan, DraftResult, all_failed
from .step_times import StepTimeModel
from .store_ops import FetchOp, ReadOp, StoreOp, SwapInOp, SwapOp, SwapOutOp, WriteOp
from .turn import Store, Turn

INTEGRITY_S = 5.0
CHECKED_BLOCKS = 4096  # per integrity check: a million blocks would take a quarter of a second
COMMANDS_PER_TURN = 256
FAILURES_TO_BREAK = 3
PEER_WAIT_S = 0.005  # after a step for a peer, wait for the face's read; else it would wait for the whole next step

_log = logging.getLogger(__name__)


class StepRunner(Protocol):
    """Computes plans: model/runner.py, or a replacement without weights."""

    def warm_up(self) -> None:
        """Prepare for the first step; called once, in the engine's thread."""
        ...

    def run(self, plan: StepPlan) -> StepResult:
        """Compute one step."""
        ...


class Drafter(Protocol):
    """Computes the work of a draft model: model/drafter.py, or a replacement without weights."""

    def warm_up(self) -> None:
        """Prepare for the first step; called once, in the engine's thread."""
        ...

    def catch_up(self, plan: DraftPlan) -> frozenset[SequenceKey]:
        """Compute `plan.catch_up`; returns the sequences whose KV is not to be used."""
        ...

    def guess(self, plan: DraftPlan) -> DraftResult:
        """Compute `plan.guesses`."""
        ...


class AdapterHost(Protocol):
    """Loads adapters for a runner: model/adapters/loading.py."""

    def load(self, command: LoadAdapter, tell: Callable[[Sequence[Event]], None]) -> None:
        """Begin to load an adapter, and return at once; `tell` gets the answer, in another thread."""
        ...

    def drop(self, slot: int) -> None:
        """Forget the adapter of a slot."""
        ...


class EngineStore:
    """Executes store operations on the device's store and the host store. Implements `Store` of engine/turn.py."""

    def __init__(self, store: KvStore, host: HostStore | None) -> None:
        self._store = store
        self._host = host

    def read(self, op: ReadOp | FetchOp) -> tuple[SectionData, ...]:
        """Implements `Store.read`."""
        into = op.into if isinstance(op, ReadOp) else None
        return self._store.read_tokens(_held(op), into, without_windows=op.without_windows)

    def write(self, op: WriteOp) -> None:
        """Implements `Store.write`."""
        self._store.write_tokens(_held(op), op.sections)

    def swap_out(self, op: SwapOutOp) -> None:
        """Implements `Store.swap_out`."""
        assert self._host is not None, "the core swaps and the engine has no host store"
        self._host.swap_out(_held(op), _on_host(op))

    def swap_in(self, op: SwapInOp) -> bool:
        """Implements `Store.swap_in`."""
        assert self._host is not None, "the core swaps and the engine has no host store"
        return self._host.swap_in(_on_host(op), _held(op))


class Engine:
    """One worker's engine in its own thread. `start` it once; it ends by a `Stop` command, or by its own fault."""

    def __init__(
        self,
        core: EngineCore,
        runner: StepRunner,
        store: KvStore,
        link: ThreadLink,
        clock: Clock,
        *,
        host: HostStore | None = None,
        over_ranks: Callable[[Store], Store] | None = None,
        adapters: AdapterHost | None = None,
        drafter: Drafter | None = None,
        guard: IdleGuard | None = None,
    ) -> None:
        """`host` has as many blocks as the core's limits say; None: no swapping. `adapters` None: each is refused.

        `guard`: of the cache's codec; None: it is not watched.
        `over_ranks`: makes the store of all ranks from that of rank 0. None: there is one rank.
        `drafter`: the draft model, if the core plans for one.
        """
        self.is_broken = False  # ended by its own fault: the process should end too, and be restarted
        self._core = core
        self._runner = runner
        self._store = EngineStore(store, host)
        whole: Store = self._store if over_ranks is None else over_ranks(self._store)
        self._drafter = drafter
        self._catch_up_ms = 0.0  # of the present turn
        self._turns = Turn(core, whole, link.emit, _log_refusal, None if drafter is None else self._draft)
        self._link = link
        self._adapters = adapters
        self._guard = guard
        self._clock = clock
        self._pace = StepTimeModel()
        self._phase = "loading"
        self._failures_in_a_row = 0
        self._is_for_peers = False  # the last step computed a prompt for a decode worker
        self._next_beat_s = 0.0
        self._next_check_s = 0.0
        self._next_checked = 0
        self._fault: Exception | None = None  # from outside
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # ------------------------------------------------------------------ for tests, while no step runs

    @property
    def core(self) -> EngineCore:
        """The decisions."""
        return self._core

    @property
    def runner(self) -> StepRunner:
        """The computation of steps."""
        return self._runner

    @property
    def store(self) -> EngineStore:
        """The operations on stored bytes."""
        return self._store

    # ------------------------------------------------------------------ from other threads

    def start(self) -> None:
        """Start the thread. The first `LoadNews` with a phase other than "loading" reports that it is ready."""
        self._thread.start()

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread's end; returns True if it has ended."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def fail(self, error: Exception) -> None:
        """End the engine as by its own fault: it lost something that it cannot compute without."""
        self._fault = error
        self._link.wake()

    # ------------------------------------------------------------------ the thread

    def _run(self) -> None:
        try:
            self._beat(self._clock.now_s())
            self._runner.warm_up()
            if self._drafter is not None:
                self._drafter.warm_up()
            self._phase = "idle"
            self._beat(self._clock.now_s())
            while not (self._core.stopped and self._core.num_live == 0):
                self._turn()
            self._phase = "stopped"
            self._link.close((self._load(self._clock.now_s()),))
        except Exception:
            _log.exception("the engine is broken and ends")
            self._break()

    def _turn(self) -> None:
        """One turn: commands, time, one step, and the beat."""
        for command in self._link.take(COMMANDS_PER_TURN, self._wait_s()):
            if isinstance(command, AdapterCommand):
                self._change_adapters(command)
            else:
                if self._guard is not None and isinstance(command, Submit) and not command.adapter_slot:
                    self._guard.saw(command.prompt_ids)
                self._turns.take(command, self._clock.now_s())
        if self._fault is not None:
            raise self._fault
        now_s, self._catch_up_ms = self._clock.now_s(), 0.0
        plan = self._turns.plan(now_s)
        if plan is None:
            self._phase = "idle"
            self._check(now_s)
            if self._guard is not None:
                self._guard.turn()
        else:
            self._step(plan, now_s)
        now_s = self._clock.now_s()
        if now_s >= self._next_beat_s:
            self._beat(now_s)

    def _change_adapters(self, command: AdapterCommand) -> None:
        if isinstance(command, DropAdapter):
            if self._adapters is not None:
                self._adapters.drop(command.slot)
        elif self._adapters is None:
            why = "adapters are not served by workers of several tensor-parallel ranks"
            self._link.emit((AdapterRefused(command.slot, InvalidRequest.code, why),))
        else:
            self._adapters.load(command, self._link.emit)

    def _wait_s(self) -> float:
        """Longest wait for commands, in seconds: short or zero while steps run, else until the beat or a deadline."""
        if self._phase != "idle":
            return PEER_WAIT_S if self._is_for_peers else 0.0
        deadline_s = self._core.next_deadline_s()
        wake_s = self._next_beat_s if deadline_s is None else min(self._next_beat_s, deadline_s)
        guarded_s = None if self._guard is None else self._guard.wake_s()
        if guarded_s is not None:
            wake_s = min(wake_s, guarded_s)
        return max(wake_s - self._clock.now_s(), 0.0)

    def _step(self, plan: StepPlan, planned_s: float | None = None) -> None:
        """Run a plan. A failure ends the sequences that cause it; steps without a result, in a row, end the engine.

        `planned_s`: when planning began; None: now.
        """
        began_s = self._clock.now_s()
        self._phase = _phase(plan)
        self._is_for_peers = self._core.is_for_peers(plan)
        try:
            result = self._runner.run(plan)
        except RankLost:
            raise
        except Exception as error:
            _log.exception("step %d failed with %d sequences", plan.step, len(plan.sequences))
            found = self._one_by_one(plan)
            if found is None:
                self._failures_in_a_row += 1
                self._turns.fail(plan, InternalError.code, _failure(error))
                if self._failures_in_a_row >= FAILURES_TO_BREAK:
                    raise
                return
            result = found
        self._failures_in_a_row = 0
        now_s = self._clock.now_s()
        self._pace.observe(plan, (now_s - began_s) * 1000)
        self._core.set_times(self._pace.times)
        since_s = began_s if planned_s is None else planned_s
        self._core.time_step(plan, result, (now_s - since_s) * 1000 - self._catch_up_ms)
        self._turns.apply(plan, result, now_s)
        if self._guard is not None:
            self._guard.worked()
        if self._core.num_waiting:
            self._beat(now_s)

    def _draft(self, plan: DraftPlan) -> DraftResult:
        """Let the draft model guess. If it fails, its sequences go on without guesses: no request depends on it."""
        assert self._drafter is not None
        try:
            unusable = frozenset[SequenceKey]()
            if plan.catch_up.sequences:
                began_s = self._clock.now_s()
                unusable = self._drafter.catch_up(plan)
                self._catch_up_ms = (self._clock.now_s() - began_s) * 1000
                self._core.time_catch_up(plan, self._catch_up_ms)
            result = self._drafter.guess(plan)
            return result._replace(unusable=result.unusable | unusable)
        except Exception:
            _log.exception("the draft model failed with %d sequences", len(all_failed(plan).unusable))
            return all_failed(plan)

    def _one_by_one(self, plan: StepPlan) -> StepResult | None:
        """Repeat a failed step one sequence at a time, to find the sequences that fail. None: all of them fail.

        The repetition overwrites the KV and the states that the failed step has stored, with the same bits.
        """
        if len(plan.sequences) == 1:
            return None
        results: list[StepResult] = []
        failed: dict[SequenceKey, str] = {}
        for index, step in enumerate(plan.sequences):
            try:
                results.append(self._runner.run(plan.alone(index)))
            except RankLost:
                raise
            except Exception as error:
                _log.warning("%s fails alone too: it ends with %r", step.key, error)
                failed[step.key] = _failure(error)
                results.append(StepResult(plan.step, ((),)))
        return None if len(failed) == len(results) else _joined(plan.step, results, failed)

    # ------------------------------------------------------------------ beat and checks between steps

    def _load(self, now_s: float) -> LoadNews:
        news = self._core.load(now_s)
        if self._guard is not None:
            counters = dict(news.counters) | dict(self._guard.counters)
            spreads = (*news.spreads, ("kv_guard_nats", self._guard.spread))
            news = replace(news, counters=tuple(sorted(counters.items())), spreads=spreads)
        return replace(
            news,
            phase=self._phase,
            prefill_ms_per_token=self._pace.prefill_ms_per_token,
            prefill_ms_per_token_pair=self._pace.prefill_ms_per_token_pair,
            decode_step_ms=self._pace.decode_step_ms,
        )

    def _beat(self, now_s: float) -> None:
        self._next_beat_s = now_s + ENGINE_LEASE.beat_s
        self._link.emit((self._load(now_s),))

    def _check(self, now_s: float) -> None:
        if now_s >= self._next_check_s:
            self._next_check_s = now_s + INTEGRITY_S
            first, num_blocks = self._next_checked, self._core.num_blocks
            last = min(first + CHECKED_BLOCKS, num_blocks)
            self._core.check_integrity(None if num_blocks <= CHECKED_BLOCKS else range(first, last))
            self._next_checked = last % num_blocks

    def _break(self) -> None:
        """Report the engine's failure: every sequence ends with an error, and a last beat has the phase "broken"."""
        self.is_broken = True
        self._phase = "broken"
        message = "this worker's engine failed; its log has more"
        last: list[Event] = [Ended(key, FinishReason.ERROR, InternalError.code, message) for key in self._core.states()]
        try:
            last.append(self._load(self._clock.now_s()))
        except Exception:
            _log.exception("not even the load can be told")
        self._link.close(last)


def _failure(error: Exception) -> str:
    return f"a step failed: {type(error).__name__}; the worker's log has more"


def _joined(step: int, results: Sequence[StepResult], failed: dict[SequenceKey, str]) -> StepResult:
    """The result of a step whose sequences were computed one by one, in the plan's order."""
    for result in results:
        failed = {**result.failed, **failed}
    return StepResult(
        step,
        tuple(tokens for result in results for tokens in result.tokens),
        frozenset(key for result in results for key in result.non_finite),
        {key: told for result in results for key, told in result.logprobs.items()},
        {key: told for result in results for key, told in result.prompt_logprobs.items()},
        failed,
        {key: why for result in results for key, why in result.refused.items()},
        frozenset(key for result in results for key in result.deferred),
    )


def _phase(plan: StepPlan) -> str:
    decodes = sum(1 for step in plan.sequences if len(step.token_ids) == 1 and step.samples)
    if decodes == len(plan.sequences):
        return "decode"
    return "mixed" if decodes else "prefill"


def _held(op: StoreOp) -> HeldTokens:
    return HeldTokens(op.block_table, op.generations, op.token_start, op.token_count)


def _on_host(op: SwapOp) -> HeldTokens:
    return HeldTokens(op.host_table, op.host_generations, op.token_start, op.token_count)


def _log_refusal(op: StoreOp, error: Exception | None) -> None:
    what = f"{type(op).__name__} of tokens {op.token_start} + {op.token_count}"
    if error is None:
        _log.warning("%s came back damaged: computed again", what)
    else:
        _log.error("the store refused %s", what, exc_info=error)
