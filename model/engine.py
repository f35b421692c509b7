"""The step loop: commands in, plan, run, events out. Decides nothing (core.py does) and computes nothing (runner.py).

One thread owns core, runner and store. It sleeps on the link when nothing can run, and wakes for commands, deadlines
and its own beat.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from ..core.clock import Clock
from ..core.errors import InternalError, TwostrokeError
from ..core.request import FinishReason, SequenceKey
from ..kv.host_store import HostStore
from ..kv.spec import HASH_BLOCK_TOKENS
from ..kv.store import HeldTokens, KvStore
from .core import EngineCore
from .link import BlocksFetched, Ended, Event, KvRead, KvWritten, LoadNews
from .pace import Pace
from .plan import StepPlan, StepResult
from .policy import Policy
from .store_op import FetchOp, ReadOp, StoreOp, SwapInOp, SwapOp, SwapOutOp, WriteOp
from .thread_link import ThreadLink

BEAT_S = 0.1
INTEGRITY_S = 5.0
CHECKED_BLOCKS = 4096  # of a large pool, at each time: all of a million would take a quarter of a second
COMMANDS_PER_TURN = 256
FAILURES_TO_BREAK = 3

_log = logging.getLogger(__name__)


class StepRunner(Protocol):
    """What computes plans: model/runner.py, or a stand-in without weights."""

    def warm_up(self) -> None:
        """Prepare; called once, in the engine's thread."""
        ...

    def run(self, plan: StepPlan) -> StepResult:
        """Compute one step."""
        ...


class Engine:
    """One worker's engine in a thread of its own. `start` it once; it ends by a `Stop` command, or broken."""

    def __init__(
        self,
        core: EngineCore,
        runner: StepRunner,
        store: KvStore,
        link: ThreadLink,
        clock: Clock,
        *,
        host: HostStore | None = None,
    ) -> None:
        """`host` has as many blocks as the core's limits say; None: it swaps nothing."""
        self.is_broken = False  # ended by its own fault: the process should end too, and be started anew
        self._core = core
        self._runner = runner
        self._store = store
        self._host = host
        self._link = link
        self._clock = clock
        self._pace = Pace()
        self._phase = "loading"
        self._failures_in_a_row = 0
        self._next_policy: Policy | None = None
        self._next_beat_s = 0.0
        self._next_check_s = 0.0
        self._next_checked = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # ------------------------------------------------------------------ from other threads

    def start(self) -> None:
        """Begin; the first `LoadNews` with a phase other than "loading" says that it is ready."""
        self._thread.start()

    def join(self, timeout_s: float) -> bool:
        """Wait for the end; whether it came."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def set_policy(self, policy: Policy) -> None:
        """Take another role's policy from the next step on."""
        self._next_policy = policy
        self._link.wake()

    # ------------------------------------------------------------------ the thread

    def _run(self) -> None:
        try:
            self._beat(self._clock.now_s())
            self._runner.warm_up()
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
        """Commands, time, one step, and the beat."""
        for command in self._link.take(COMMANDS_PER_TURN, self._wait_s()):
            self._say(self._core.handle(command, self._clock.now_s()))
        policy, self._next_policy = self._next_policy, None
        if policy is not None:
            self._core.set_policy(policy)
        now_s = self._clock.now_s()
        self._say(self._core.tick(now_s))
        plan = self._core.plan(now_s)
        self._say(self._core.drain())
        if plan is None:
            self._phase = "idle"
            self._check(now_s)
        else:
            self._step(plan)
        now_s = self._clock.now_s()
        if now_s >= self._next_beat_s:
            self._beat(now_s)

    def _wait_s(self) -> float:
        """How long to sleep for commands: not at all while steps run, else until the beat or a deadline."""
        if self._phase != "idle":
            return 0.0
        deadline_s = self._core.next_deadline_s()
        wake_s = self._next_beat_s if deadline_s is None else min(self._next_beat_s, deadline_s)
        return max(wake_s - self._clock.now_s(), 0.0)

    def _step(self, plan: StepPlan) -> None:
        """Run a plan. A failure ends the sequences that cause it; steps without any result, in a row, the engine."""
        began_s = self._clock.now_s()
        self._phase = _phase(plan)
        try:
            result = self._runner.run(plan)
        except Exception as error:
            _log.exception("step %d failed with %d sequences", plan.step, len(plan.sequences))
            found = self._one_by_one(plan)
            if found is None:
                self._failures_in_a_row += 1
                self._say(self._core.fail_step(plan, InternalError.code, _failure(error)))
                if self._failures_in_a_row >= FAILURES_TO_BREAK:
                    raise
                return
            result = found
        self._failures_in_a_row = 0
        now_s = self._clock.now_s()
        self._pace.observe(plan, (now_s - began_s) * 1000)
        self._say(self._core.apply(plan, result, now_s))
        if self._core.num_waiting:
            self._beat(now_s)

    def _one_by_one(self, plan: StepPlan) -> StepResult | None:
        """Take a failed step again, a sequence at a time, to know whose failure it is. None: nobody's comes through.

        Whatever the failed step left in the store is written again, with the same bits.
        """
        if len(plan.sequences) == 1:
            return None
        results: list[StepResult] = []
        failed: dict[SequenceKey, str] = {}
        for step in plan.sequences:
            try:
                results.append(self._runner.run(StepPlan(plan.step, (step,))))
            except Exception as error:
                _log.warning("%s fails alone too: it ends with %r", step.key, error)
                failed[step.key] = _failure(error)
                results.append(StepResult(plan.step, ((),)))
        return None if len(failed) == len(results) else _joined(plan.step, results, failed)

    # ------------------------------------------------------------------ store and face

    def _say(self, outbox: Sequence[Event | StoreOp]) -> None:
        """Execute the store's operations where they stand, and give the face all events in order."""
        events: list[Event] = []
        for item in outbox:
            if isinstance(item, ReadOp | WriteOp | FetchOp):
                events += self._execute(item)
            elif isinstance(item, SwapOutOp | SwapInOp):
                if not self._swap(item):
                    self._link.emit(events)
                    events = []
                    self._say(self._core.swap_failed(item.key))
            else:
                events.append(item)
        self._link.emit(events)

    def _swap(self, op: SwapOp) -> bool:
        """Copy out or back; false: it failed or came back damaged."""
        assert self._host is not None, "the core swaps and the engine has no host store"
        held = HeldTokens(op.block_table, op.generations, op.token_start, op.token_count)
        host = HeldTokens(op.host_table, op.host_generations, op.token_start, op.token_count)
        try:
            if isinstance(op, SwapOutOp):
                self._host.swap_out(held, host)
                return True
            if self._host.swap_in(host, held):
                return True
            _log.warning("swapped tokens %d + %d came back damaged: computed again", op.token_start, op.token_count)
        except Exception:
            _log.exception("the store refused to swap tokens %d + %d: computed again", op.token_start, op.token_count)
        return False

    def _execute(self, op: ReadOp | WriteOp | FetchOp) -> list[Event]:
        held = HeldTokens(op.block_table, op.generations, op.token_start, op.token_count)
        try:
            if isinstance(op, ReadOp):
                return [KvRead(op.key, op.token_start, op.token_count, self._store.read_tokens(held))]
            if isinstance(op, WriteOp):
                self._store.write_tokens(held, op.sections)
                return [KvWritten(op.key, op.token_start, op.token_count)]
            sections = self._store.read_tokens(held)
            return [BlocksFetched(op.fetch_id, op.token_count // HASH_BLOCK_TOKENS, sections)]
        except Exception as error:
            _log.exception("the store refused %s of tokens %d + %d", type(op).__name__, op.token_start, op.token_count)
            if isinstance(op, FetchOp):
                return [BlocksFetched(op.fetch_id, 0, ())]
            code = error.code if isinstance(error, TwostrokeError) else InternalError.code
            answer: list[Event] = []
            if isinstance(op, ReadOp):
                answer.append(KvRead(op.key, op.token_start, op.token_count, None))
            failed = self._core.fail(op.key, code, f"the KV store refused tokens of this request: {error}")
            return answer + [event for event in failed if not isinstance(event, StoreOp)]

    def _load(self, now_s: float) -> LoadNews:
        return replace(
            self._core.load(now_s),
            phase=self._phase,
            prefill_ms_per_token=self._pace.prefill_ms_per_token,
            prefill_ms_per_token_pair=self._pace.prefill_ms_per_token_pair,
            decode_step_ms=self._pace.decode_step_ms,
        )

    def _beat(self, now_s: float) -> None:
        self._next_beat_s = now_s + BEAT_S
        self._link.emit((self._load(now_s),))

    def _check(self, now_s: float) -> None:
        if now_s >= self._next_check_s:
            self._next_check_s = now_s + INTEGRITY_S
            first, num_blocks = self._next_checked, self._core.num_blocks
            last = min(first + CHECKED_BLOCKS, num_blocks)
            self._core.check_integrity(None if num_blocks <= CHECKED_BLOCKS else range(first, last))
            self._next_checked = last % num_blocks

    def _break(self) -> None:
        """Say the last words without trusting anything: every sequence ends, and the beat says "broken"."""
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
    )


def _phase(plan: StepPlan) -> str:
    decodes = sum(1 for step in plan.sequences if step.num_tokens == 1 and step.samples)
    if decodes == len(plan.sequences):
        return "decode"
    return "mixed" if decodes else "prefill"
