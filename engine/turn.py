"""What an engine does around its core, in the order that the core's contract wants. Pure: knows no thread, no clock.

    command ─▶ core.handle ─▶ say
    now     ─▶ core.tick ─▶ say ─▶ core.plan ─▶ say(core.drain) ─▶ the step ─▶ core.apply ─▶ say

`say` carries out the store's operations where they stand, decides what follows from their outcome, and gives the face
all events in order. engine/loop.py drives it in a thread with a real store, sim/ in virtual time with a checking one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from ..core.errors import InternalError, TwostrokeError
from ..kv.section import SectionData
from ..kv.spec import HASH_BLOCK_TOKENS
from .core import EngineCore
from .link.messages import BlocksFetched, Command, Event, KvRead, KvWritten
from .plan import StepPlan, StepResult
from .store_ops import FetchOp, ReadOp, StoreOp, SwapInOp, SwapOutOp, WriteOp


class Store(Protocol):
    """The KV memory of one worker, as far as the core's operations concern it. Every method may raise."""

    def read(self, op: ReadOp | FetchOp) -> tuple[SectionData, ...]:
        """Copies of planes with their seals."""
        ...

    def write(self, op: WriteOp) -> None:
        """Store planes that were verified."""
        ...

    def swap_out(self, op: SwapOutOp) -> None:
        """Copy to host memory."""
        ...

    def swap_in(self, op: SwapInOp) -> bool:
        """Copy back; whether everything holds there what was sealed."""
        ...


class Turn:
    """One engine's core, its store, and the way to its face."""

    def __init__(
        self,
        core: EngineCore,
        store: Store,
        emit: Callable[[Sequence[Event]], None],
        refused: Callable[[StoreOp, Exception | None], None],
    ) -> None:
        """`emit` takes events for the face; `refused` hears of operations that failed (None: damaged), to log them."""
        self._core = core
        self._store = store
        self._emit = emit
        self._refused = refused

    def take(self, command: Command, now_s: float) -> None:
        """One command of the face."""
        self._say(self._core.handle(command, now_s))

    def plan(self, now_s: float) -> StepPlan | None:
        """Let time pass and plan the next step; the blocks it will use are as they must be. None: nothing can run."""
        self._say(self._core.tick(now_s))
        plan = self._core.plan(now_s)
        self._say(self._core.drain())
        return plan

    def apply(self, plan: StepPlan, result: StepResult, now_s: float) -> None:
        """The step that was planned came back."""
        self._say(self._core.apply(plan, result, now_s))

    def fail(self, plan: StepPlan, code: str, message: str) -> None:
        """The step that was planned did not come back."""
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
        """Carry an operation out: its answer, and what the core makes of a failure."""
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
        """Nothing that was not written, copied or verified is served: the sequence ends, or is computed again."""
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
