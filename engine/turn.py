"""One turn of an engine: calls its core, in the order that the core requires. Pure: knows no thread, no clock.

    command ─▶ core.handle ─▶ say
    now     ─▶ core.tick ─▶ say ─▶ core.plan ─▶ say(core.drain) ─▶ the step ─▶ core.apply ─▶ say
    with a draft model, before core.plan:  core.plan_drafts ─▶ the draft model ─▶ core.take_drafts

`say` carries out store operations at their place in the order, handles their failures, and passes all events to the
face in order. engine/loop.py drives it in a thread with a real store, sim/ in virtual time with a checking store.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from ..core.errors import InternalError, TwostrokeError
from ..kv.section import SectionData
from ..kv.spec import HASH_BLOCK_TOKENS
from .core import EngineCore
from .link.messages import BlocksFetched, CoreCommand, Event, KvRead, KvWritten
from .plan import StepPlan, StepResult
from .speculation.draft_model.plan import DraftPlan, DraftResult
from .store_ops import FetchOp, ReadOp, StoreOp, SwapInOp, SwapOutOp, WriteOp


class Store(Protocol):
    """KV memory of one worker, with the operations that the core requests. Every method may raise."""

    def read(self, op: ReadOp | FetchOp) -> tuple[SectionData, ...]:
        """Copy planes out, with their seals."""
        ...

    def write(self, op: WriteOp) -> None:
        """Store planes that were verified."""
        ...

    def swap_out(self, op: SwapOutOp) -> None:
        """Copy to host memory."""
        ...

    def swap_in(self, op: SwapInOp) -> bool:
        """Copy back from host memory; returns True if all copied tokens match their seals."""
        ...


class Turn:
    """One engine's core and its store; passes events to the face."""

    def __init__(
        self,
        core: EngineCore,
        store: Store,
        emit: Callable[[Sequence[Event]], None],
        refused: Callable[[StoreOp, Exception | None], None],
        draft: Callable[[DraftPlan], DraftResult] | None = None,
    ) -> None:
        """`emit` takes events for the face; `refused` logs failed operations with the error (None: damaged data).

        `draft` computes what the core asks of a draft model, and does not raise. None: there is no draft model.
        """
        self._core = core
        self._store = store
        self._emit = emit
        self._refused = refused
        self._draft = draft

    def take(self, command: CoreCommand, now_s: float) -> None:
        """Apply one command of the face."""
        self._say(self._core.handle(command, now_s))

    def plan(self, now_s: float) -> StepPlan | None:
        """Advance time and plan the next step; its store operations are done. None: no sequence can run."""
        self._say(self._core.tick(now_s))
        if self._draft is not None:
            work = self._core.plan_drafts(now_s)
            if work is not None:
                self._core.take_drafts(work, self._draft(work))
        plan = self._core.plan(now_s)
        self._say(self._core.drain())
        return plan

    def apply(self, plan: StepPlan, result: StepResult, now_s: float) -> None:
        """Apply the result of the planned step."""
        self._say(self._core.apply(plan, result, now_s))

    def fail(self, plan: StepPlan, code: str, message: str) -> None:
        """Handle the failure of the planned step."""
        self._say(self._core.fail_step(plan, code, message))

    # ------------------------------------------------------------------ inside

    def _say(self, outbox: Sequence[Event | StoreOp]) -> None:
        events: list[Event] = []
        for item in outbox:
            if not isinstance(item, StoreOp):
                events.append(item)
                continue
            answer, follows = self._execute(item)
            events += answer
            if follows:
                self._emit(events)
                events = []
                self._say(follows)
        self._emit(events)

    def _execute(self, op: StoreOp) -> tuple[list[Event], list[Event | StoreOp]]:
        """Carry out an operation; returns its answer for the face, and the core's reaction to a failure."""
        try:
            return self._carry_out(op)
        except Exception as error:
            self._refused(op, error)
            return self._failed(op, error)

    def _carry_out(self, op: StoreOp) -> tuple[list[Event], list[Event | StoreOp]]:
        store = self._store
        match op:
            case ReadOp():
                return [KvRead(op.key, op.token_start, op.token_count, store.read(op))], []
            case WriteOp():
                store.write(op)
                return [KvWritten(op.key, op.token_start, op.token_count)], []
            case FetchOp():
                return [BlocksFetched(op.fetch_id, op.token_count // HASH_BLOCK_TOKENS, store.read(op))], []
            case SwapOutOp():
                store.swap_out(op)
                return [], []
            case SwapInOp():
                if store.swap_in(op):
                    return [], []
                self._refused(op, None)
                return self._failed(op, None)

    def _failed(self, op: StoreOp, error: Exception | None) -> tuple[list[Event], list[Event | StoreOp]]:
        """Handle a failed operation: the sequence ends or is recomputed, so that no unverified KV is used."""
        match op:
            case FetchOp():
                return [BlocksFetched(op.fetch_id, 0, ())], []
            case SwapOutOp() | SwapInOp():
                return [], self._core.swap_failed(op.key)
            case ReadOp() | WriteOp():
                code = error.code if isinstance(error, TwostrokeError) else InternalError.code
                answer: list[Event] = []
                if isinstance(op, ReadOp):
                    answer.append(KvRead(op.key, op.token_start, op.token_count, None))
                message = f"the KV store refused tokens of this request: {error}"
                return answer, self._core.fail(op.key, code, message)
