"""The decode service of a simulated worker: production's, with simulated timers and streams, and checks of its runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ...core.request import Epoch, SequenceKey
from ...decode_worker.fetch import FetchHost
from ...decode_worker.ledger import RouterKey
from ...decode_worker.router_session import RouterSession
from ...decode_worker.service import DecodeService
from ...decode_worker.task import DecodeTask
from ...decode_worker.tools import DecodeTaskTools
from ...kv.handover.carrier import StreamHost
from ...kv.messages import epoch_from_wire
from ...protos import worker_pb2
from ..invariants import Violation

if TYPE_CHECKING:
    from .node import WorkerNode

NO_EPOCH = Epoch(0, 0)
ORPHAN_SLACK_S = 0.5  # time for commands under way, and for the running step to end


class SimService(DecodeService):
    """The production decode service, with simulated timers."""

    node: WorkerNode
    highest: dict[tuple[RouterKey, SequenceKey], Epoch]  # newest epoch of each choice ever run

    def _broken(self, message: worker_pb2.Submit, error: Exception) -> None:
        raise error

    def _after(self, delay_s: float, act: Callable[[], None]) -> None:
        self.node.world.after(delay_s, self.node.process, act)

    def submit(self, session: RouterSession, message: worker_pb2.Submit) -> None:
        """Submit as in production, and check R6: no choice runs twice under one epoch, or again under an older one."""
        before = set(self.runs)
        super().submit(session, message)
        for run in self.runs:
            if run not in before:
                place = session.router, run.order.key
                if run.order.epoch <= self.highest.get(place, NO_EPOCH):
                    raise Violation("R6", f"{run.order.key} runs under {run.order.epoch}, which is not its newest")
                self.highest[place] = run.order.epoch

    def cancel(self, session: RouterSession, message: worker_pb2.CancelRequest) -> None:
        """Cancel as in production, and check R6: no run of another router or of a newer dispatch ends."""
        epoch, router_of = epoch_from_wire(message.epoch), self._ledger.router_of
        others = [run for run in self.runs if run.order.epoch > epoch or router_of(run) != session.router]
        others = [run for run in others if run._verdict is None]
        super().cancel(session, message)
        for run in others:
            if run._verdict is not None:
                raise Violation("R6", f"{run.order.key} under {run.order.epoch} was cancelled by a word about {epoch}")

    def lose(self, session: RouterSession) -> None:
        """Lose a session as in production, and check R7: after the grace none of its runs continues."""
        orphans = [run for run in self.runs if run._outbox is session.outbox]
        super().lose(session)
        self._after(self._orphan_grace_s, lambda: self._check_cancelled(orphans))

    def _check_cancelled(self, orphans: list[DecodeTask]) -> None:
        if any(run in self.runs and run._verdict is None for run in orphans):
            raise Violation("R7", f"{self.node.process}: requests of a lost router run on")
        self._check_gone_later(orphans)

    def _check_gone_later(self, orphans: list[DecodeTask]) -> None:
        frozen_s = self.node.process.frozen_s
        self._after(ORPHAN_SLACK_S, lambda: self._check_gone(orphans, frozen_s))

    def _check_gone(self, orphans: list[DecodeTask], frozen_s: float) -> None:
        if self.node.process.frozen_s != frozen_s:  # the process stood still meanwhile: its engine had no turn
            self._check_gone_later(orphans)
            return
        if any(run in self.runs for run in orphans):
            raise Violation("R7", f"{self.node.process}: requests of a lost router do not end")


@dataclass(frozen=True)
class SimRunTools(DecodeTaskTools):
    """The production tools of a run, with simulated streams."""

    node: WorkerNode = field(kw_only=True)

    def connect(self, key: SequenceKey, address: str) -> StreamHost:
        """Implements `DecodeTaskTools.connect`."""
        return self.node.connect_peer(key, address)

    def connect_source(self, key: SequenceKey, address: str, timeout_s: float) -> FetchHost:
        """Implements `DecodeTaskTools.connect_source`."""
        return self.node.connect_source(key, address)
