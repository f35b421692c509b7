"""The decode worker's face: sessions of routers, runs of choices. One per worker, on one event loop."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, OrderedDict

from ..core.errors import InternalError, RequestNotFound, TwostrokeError, Unavailable
from ..core.request import Epoch, FinishReason, SequenceKey
from ..kv.messages import epoch_from_wire, error_to_wire
from ..protos import common_pb2, worker_pb2
from ..text.tokenizer import Tokenizer
from .choice import Choice
from .order import key_of, order_from_wire
from .outbox import Outbox
from .report import refusal_message
from .run import Run, RunTools
from .session import Session, SessionContext, SessionTiming

log = logging.getLogger(__name__)

REMEMBERED_ENDS = 4_096  # of ended choices, so that a late duplicate of their order is not run again
DRAIN_RETRY_S = 1.0


class DecodeService:
    """All sessions and runs of one worker.

    An order with a lower epoch than the one that runs is dropped, one with the same epoch is a duplicate and ignored, a
    higher one ends the older run. When a session is lost its runs go on for `orphan_grace_s`, unheard but bounded, and
    are cancelled then.
    """

    def __init__(
        self,
        tools: RunTools,
        tokenizer: Tokenizer,
        orphan_grace_s: float = 5.0,
        timing: SessionTiming | None = None,
    ) -> None:
        self.is_draining = False
        self._tools = tools
        self._tokenizer = tokenizer
        self._orphan_grace_s = orphan_grace_s
        self._timing = timing or SessionTiming()
        self._counters: Counter[str] = tools.pull.counters
        self._run_by_key: dict[SequenceKey, Run] = {}
        self._ended_epochs: OrderedDict[SequenceKey, Epoch] = OrderedDict()
        self._running: set[Run] = set()  # also older epochs that are still ending
        self._sessions: dict[Session, set[Run]] = {}
        self._session_of: dict[Run, Session] = {}
        self._timers: set[asyncio.TimerHandle] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        tools.pull.dispatcher.on_step(self._at_step)

    @property
    def num_running(self) -> int:
        """Choices that have not ended."""
        return len(self._running)

    async def session(self, context: SessionContext, info: common_pb2.WorkerInfo) -> None:
        """Serve one router until it is gone; what it started runs on for the grace."""
        session = Session(self, self._timing, lambda: self._tools.pull.dispatcher.last_load)
        self._sessions[session] = set()
        try:
            await session.run(context, info)
        finally:
            self._lost(session)

    async def drain(self, timeout_s: float) -> int:
        """Take no orders any more, let what runs end. How many were cancelled at the deadline."""
        self.is_draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            pass
        return self.cancel_all("draining")

    def cancel_all(self, reason: str) -> int:
        """End everything that runs; how many that were."""
        for run in list(self._running):
            run.cancel(reason)
        return len(self._running)

    def close(self) -> None:
        """Stop the timers."""
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()

    # ------------------------------------------------------------------ from the sessions

    def submit(self, session: Session, message: worker_pb2.Submit) -> None:
        """See SessionOwner."""
        key, epoch = key_of(message), epoch_from_wire(message.epoch)
        known = self._known_epoch(key)
        if known is not None and epoch <= known:
            self._counters["orders_duplicate" if epoch == known else "orders_stale"] += 1
            return
        older = self._run_by_key.get(key)
        if older is not None:
            older.cancel("a newer dispatch")
        try:
            if self.is_draining:
                raise Unavailable("the worker is draining", retry_after_s=DRAIN_RETRY_S)
            run = self._run_of(message, session.outbox)
        except Exception as error:
            self._counters["orders_refused"] += 1
            self._remember(key, epoch)
            session.outbox.add_end(refusal_message(message, _refusal(key, error)))
            return
        self._run_by_key[key] = run
        self._running.add(run)
        self._idle.clear()
        self._sessions[session].add(run)
        self._session_of[run] = session
        run.start()

    def cancel(self, message: worker_pb2.CancelRequest) -> None:
        """See SessionOwner. A cancel of an older epoch means a run that is ending anyway."""
        epoch = epoch_from_wire(message.epoch)
        for run in [r for r in self._run_by_key.values() if r.order.key.request_id == message.request_id]:
            if epoch < run.order.epoch:
                self._counters["cancels_stale"] += 1
            else:
                run.cancel(message.reason or "cancelled")

    def attach(self, session: Session, message: worker_pb2.Attach) -> None:
        """See SessionOwner. Nothing can be taken over yet: a typed end says so for every choice that was asked for."""
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

    # ------------------------------------------------------------------ inside

    def _run_of(self, message: worker_pb2.Submit, outbox: Outbox) -> Run:
        """Raises TwostrokeError where the order cannot be carried out."""
        order = order_from_wire(message, self._tools.facts.model)
        start = len(order.prompt_ids) - order.num_emitted
        prompt, emitted = order.prompt_ids[:start], order.prompt_ids[start:]
        eos_ids = self._tools.facts.model.eos_ids
        choice = Choice(self._tokenizer, order.params, eos_ids, emitted, prompt_ids=prompt)
        return Run(order, choice, outbox, self._tools, self._on_end)

    def _known_epoch(self, key: SequenceKey) -> Epoch | None:
        run = self._run_by_key.get(key)
        return run.order.epoch if run is not None else self._ended_epochs.get(key)

    def _remember(self, key: SequenceKey, epoch: Epoch) -> None:
        self._ended_epochs[key] = epoch
        self._ended_epochs.move_to_end(key)
        while len(self._ended_epochs) > REMEMBERED_ENDS:
            self._ended_epochs.popitem(last=False)

    def _on_end(self, run: Run) -> None:
        key = run.order.key
        if self._run_by_key.get(key) is run:
            del self._run_by_key[key]
            self._remember(key, run.order.epoch)
        self._running.discard(run)
        session = self._session_of.pop(run)
        self._sessions.get(session, set()).discard(run)
        if not self._running:
            self._idle.set()

    def _at_step(self, step: int) -> None:
        for session in self._sessions:
            session.outbox.at_step(step)

    def _lost(self, session: Session) -> None:
        """The router is gone: its runs go on for the grace, unless nobody could take them over anyway."""
        runs = self._sessions.pop(session)
        if not runs:
            return
        self._counters["sessions_lost"] += 1
        log.warning("router %s lost; %d requests run on for %.1f s", session.router_id, len(runs), self._orphan_grace_s)
        loop = asyncio.get_running_loop()

        def end() -> None:
            self._timers.discard(timer)
            for run in list(runs & self._running):
                self._counters["orphans_cancelled"] += 1
                run.cancel("router lost", FinishReason.CANCELLED)

        timer = loop.call_later(self._orphan_grace_s, end)
        self._timers.add(timer)


def _refusal(key: SequenceKey, error: Exception) -> TwostrokeError:
    """What is told of an order that could not be begun: its own trouble must not end the session of all."""
    if isinstance(error, TwostrokeError):
        return error
    log.error("%s: the order could not be begun", key, exc_info=error)
    return InternalError("this choice could not be begun on its worker, whose log has more")
