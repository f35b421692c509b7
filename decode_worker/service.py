"""Decode service of a worker's face: sessions of routers, runs of choices. One per worker, on one event loop."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable

from ..core.errors import InternalError, Overloaded, RequestNotFound, TwostrokeError, Unavailable
from ..core.lease import ORPHAN_GRACE_S
from ..core.request import FinishReason, SequenceKey
from ..engine.link.draining import Draining
from ..kv.messages import epoch_from_wire, error_to_wire
from ..kv.recent_prompts import RecentPrompts
from ..protos import common_pb2, worker_pb2
from ..text.tokenizer import Tokenizer
from .choice import ChoiceText
from .ledger import Ledger, Standing
from .order import Order, key_of, order_from_wire
from .report import known_end_message, refusal_message
from .router_session import RouterSession, SessionContext, SessionTiming
from .task import DecodeTask
from .tools import DecodeTaskTools

log = logging.getLogger(__name__)

DRAIN_RETRY_S = 1.0


class DecodeService:
    """All sessions and runs of one worker.

    An order with a lower epoch than the running one is dropped, one with the same epoch is a duplicate and ignored, one
    with a higher epoch ends the older run; runs of other routers are not changed (ledger.py). When a session is lost,
    its runs continue for `orphan_grace_s`, with bounded output, and are cancelled then.
    """

    def __init__(
        self,
        tools: DecodeTaskTools,
        tokenizer: Tokenizer,
        orphan_grace_s: float = ORPHAN_GRACE_S,
        timing: SessionTiming | None = None,
    ) -> None:
        self.draining = Draining()
        self._tools = tools
        self._tokenizer = tokenizer
        self._orphan_grace_s = orphan_grace_s
        self._timing = timing or SessionTiming()
        self._counters: Counter[str] = tools.pull.counters
        self._ledger: Ledger[DecodeTask, RouterSession] = Ledger()
        self._num_orders = 0
        self._prompts = RecentPrompts(tools.facts.namer)
        self._timers: set[asyncio.TimerHandle] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        tools.pull.dispatcher.on_step(self._at_step)

    @property
    def is_draining(self) -> bool:
        """True if new orders are refused."""
        return self.draining.is_on

    def undrain(self) -> None:
        """Take orders again. What a drain has handed back by now stays with others."""
        self.draining.undo()

    @property
    def num_running(self) -> int:
        """Number of runs that have not ended."""
        return len(self._ledger)

    @property
    def runs(self) -> tuple[DecodeTask, ...]:
        """Runs that have not ended."""
        return self._ledger.runs

    async def session(self, context: SessionContext, info: common_pb2.WorkerInfo) -> None:
        """Serve one router until its stream ends; its runs continue for the grace period."""
        session = RouterSession(self, self._timing, lambda: self._tools.pull.dispatcher.last_load)
        self.open(session)
        try:
            await session.run(context, info)
        finally:
            self.lose(session)

    async def drain(self, timeout_s: float, gave_back: Callable[[list[SequenceKey]], None] | None = None) -> int:
        """Refuse new orders and let runs end for `timeout_s`; returns the number cancelled then.

        `gave_back` is called with those, since their routers have other workers go on with them.
        """
        return self.hand_back(gave_back) if await self.draining.until(self._idle, timeout_s) else 0

    def hand_back(self, gave_back: Callable[[list[SequenceKey]], None] | None = None) -> int:
        """Cancel all runs while draining: their routers send them to other workers. Returns their number."""
        if gave_back is not None:
            gave_back([run.order.key for run in self._ledger.runs])
        return self.cancel_all("draining")

    def cancel_all(self, reason: str) -> int:
        """Cancel all runs; returns their number."""
        for run in self._ledger.runs:
            run.cancel(reason)
        return len(self._ledger)

    def close(self) -> None:
        """Stop the timers."""
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()

    # ------------------------------------------------------------------ from the sessions

    def open(self, session: RouterSession) -> None:
        """A router opened a session; `lose` must follow."""
        self._ledger.open(session)

    def submit(self, session: RouterSession, message: worker_pb2.Submit) -> None:
        """Implements `SessionOwner.submit`."""
        router, key, epoch = session.router, key_of(message), epoch_from_wire(message.epoch)
        standing = self._ledger.standing(router, key, epoch)
        if standing is not Standing.NEW:
            self._counters[f"orders_{standing.value}"] += 1
            return
        older = self._ledger.older(router, key)
        if older is not None:
            older.cancel("a newer dispatch")
        try:
            run = self._begin(session, message)
        except TwostrokeError as error:
            self._counters["orders_refused"] += 1
            self._ledger.refuse(router, key, epoch)
            session.outbox.add_end(refusal_message(message, error))
            return
        if isinstance(run, worker_pb2.RequestEnd):
            self._counters["orders_ended_already"] += 1
            self._ledger.refuse(router, key, epoch)
            session.outbox.add_end(run)
            return
        self._ledger.begin(run, session, router, key, epoch)
        self._idle.clear()

    def has_others_suspect(self, session: RouterSession) -> bool:
        """Implements `SessionOwner.has_others_suspect`. Routers do not know each other's suspects."""
        router_of = self._ledger.router_of
        return any(run.is_suspect and router_of(run) != session.router for run in self._ledger.runs)

    def cancel(self, session: RouterSession, message: worker_pb2.CancelRequest) -> None:
        """Implements `SessionOwner.cancel`. A cancel with an older epoch does not end a newer run."""
        named = self._ledger.named(session.router, message.request_id, epoch_from_wire(message.epoch))
        self._counters["cancels_stale"] += named.num_stale
        for run in named.runs:
            run.cancel(message.reason or "cancelled")

    def attach(self, session: RouterSession, message: worker_pb2.Attach) -> None:
        """Implements `SessionOwner.attach`. Not supported yet: every choice that was asked for gets a typed error."""
        error = RequestNotFound(
            f"request {message.request_id} cannot be attached to on this worker", param="request_id"
        )
        for choice in range(max(1, len(message.cursor))):
            session.outbox.add_end(
                worker_pb2.RequestEnd(
                    request_id=message.request_id,
                    choice=choice,
                    epoch=message.epoch,
                    reason=common_pb2.FINISH_REASON_ERROR,
                    error=error_to_wire(error),
                )
            )

    def lose(self, session: RouterSession) -> None:
        """A router is lost: its runs continue for the grace period and are cancelled then."""
        orphans = self._ledger.lose(session)
        if not orphans:
            return
        self._counters["sessions_lost"] += 1
        grace_s = self._orphan_grace_s
        log.warning("router %s lost; %d requests run on for %.1f s", session.router_id, len(orphans), grace_s)
        self._after(grace_s, lambda: self._end_orphans(orphans))

    # ------------------------------------------------------------------ inside

    def _begin(self, session: RouterSession, message: worker_pb2.Submit) -> DecodeTask | worker_pb2.RequestEnd:
        """Start the run of an order; returns the end of one that needs no run.

        Raises:
            TwostrokeError: the order cannot be carried out.
        """
        if self.is_draining:
            raise Unavailable("the worker is draining", retry_after_s=DRAIN_RETRY_S)
        if message.confirm and self.has_others_suspect(session):
            what = "a request of another router that may have killed a worker is computed here"
            raise Overloaded(what, retry_after_s=DRAIN_RETRY_S)
        try:
            self._num_orders += 1
            order = order_from_wire(message, self._tools.facts.model, self._prompts, self._num_orders)
            choice, tools = self._choice(order), self._tools
            end = known_end_message(order, choice, tools.pull.clock.now_s(), tools.facts.model.kv_spec)
            if end is not None:
                return end
            run = self._start(session, order, choice)
        except TwostrokeError:
            raise
        except Exception as error:
            self._broken(message, error)
            raise InternalError("this order could not be taken; the worker's log has more") from error
        return run

    def _start(self, session: RouterSession, order: Order, choice: ChoiceText) -> DecodeTask:
        adapters = self._tools.adapters
        slot = adapters.hold(order.scope.adapter)
        try:
            run = DecodeTask(order, choice, session.outbox, self._tools, self._on_end, adapter_slot=slot)
            run.start()
        except BaseException:
            adapters.release(slot)
            raise
        return run

    def _broken(self, message: worker_pb2.Submit, error: Exception) -> None:
        """Log an internal error in one order; the other orders of its session are not affected."""
        log.error("the order of %s#%d could not be taken", message.request_id, message.choice, exc_info=error)

    def _choice(self, order: Order) -> ChoiceText:
        start = len(order.prompt_ids) - order.num_emitted
        prompt, emitted = order.prompt_ids[:start], order.prompt_ids[start:]
        return ChoiceText(self._tokenizer, order.params, self._tools.facts.model.eos_ids, emitted, prompt_ids=prompt)

    def _on_end(self, run: DecodeTask) -> None:
        self._tools.adapters.release(run.adapter_slot)
        self._ledger.end(run)
        if not len(self._ledger):
            self._idle.set()

    def _at_step(self, step: int) -> None:
        for session in self._ledger.sessions:
            session.outbox.at_step(step)

    def _end_orphans(self, orphans: tuple[DecodeTask, ...]) -> None:
        for run in orphans:
            if run in self._ledger:
                self._counters["orphans_cancelled"] += 1
                run.cancel("router lost", FinishReason.CANCELLED)

    def _after(self, delay_s: float, act: Callable[[], None]) -> None:
        def fire() -> None:
            self._timers.discard(timer)
            act()

        timer = asyncio.get_running_loop().call_later(delay_s, fire)
        self._timers.add(timer)
