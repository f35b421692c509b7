"""Orders and cancels of requests, under epochs, and the work that is counted for them against workers. Pure."""

from __future__ import annotations

from ...core.request import Epoch, SequenceKey
from ..routing.candidates import RoutingDecision
from ..routing.fleet import Fleet
from ..routing.views import count_work
from ..workers.wire import cancel_to_wire, peer_to_wire, submit_to_wire
from .attempts import Dispatch
from .state import RequestState
from .surroundings import Driver, Observer
from .suspects import PROOF_TOKENS


class Orders:
    """What one router sends to its workers about requests."""

    def __init__(self, incarnation: int, fleet: Fleet, driver: Driver, observer: Observer) -> None:
        """`incarnation`: of the router; epochs of a later one are higher."""
        self.num_dispatched = 0
        self._incarnation = incarnation
        self._fleet = fleet
        self._driver = driver
        self._observer = observer

    def dispatch(self, run: RequestState, choice: RoutingDecision, now_s: float) -> bool:
        """Order every unfinished choice from the chosen worker, under a new epoch, after what its client has of it.

        False: the worker takes no orders, and perhaps has some of these; `cancel` must follow.
        """
        dispatch = Dispatch(self._next_epoch(run), choice, now_s)
        unfinished = run.dispatched(dispatch)
        self._observer.dispatched(run)
        for index in unfinished:
            left_s = run.left_s(now_s)
            key, peers, emitted_ids = SequenceKey(run.name, index), choice.prefill_peers, run.delivery.ids_of(index)
            sources = choice.winner.sources
            order = submit_to_wire(
                key,
                run.request,
                dispatch.epoch,
                peers,
                left_s,
                emitted_ids=emitted_ids,
                sources=sources,
                returns=choice.returns,
            )
            order.confirm = PROOF_TOKENS if run.suspicion is not None else 0
            if choice.buddy is not None:
                order.buddy.CopyFrom(peer_to_wire(choice.buddy))
            if not self._driver.send(dispatch.decode, order):
                return False
            count_work(self._fleet, run.facts, index, choice, now_s, is_leading=index == unfinished[0])
        return True

    def cancel(self, run: RequestState, reason: str) -> None:
        """Cancel a request on the worker that computes it, if there is one."""
        if run.living is not None:
            self._driver.send(run.living.decode, cancel_to_wire(run.name, run.living.epoch, reason))

    def forget(self, run: RequestState) -> None:
        """Count no work of a request against any worker."""
        for index in range(run.request.num_choices):
            self._fleet.ended(SequenceKey(run.name, index))

    def _next_epoch(self, run: RequestState) -> Epoch:
        """The next epoch; the counter runs over all requests of this router."""
        self.num_dispatched += 1
        return Epoch(self._incarnation, self.num_dispatched)
