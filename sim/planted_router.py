"""Planted bugs of the router: life of requests, prefix map, request names, choice of workers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from ..core.errors import WorkerLost
from ..core.request import Epoch, Request
from ..protos import worker_pb2
from ..router.requests import choosing, delivery, suspects
from ..router.requests.admission.entrance import Entrance
from ..router.requests.history import RequestHistory
from ..router.requests.lifecycle import Lifecycle
from ..router.requests.orders import Orders
from ..router.requests.roster import Roster
from ..router.requests.state import RequestState, RequestStates, Stage
from ..router.routing.candidates import PolicyLimits, RequestFacts, RoutingDecision, Source, WorkerView
from ..router.routing.facts import WorkerKey
from ..router.routing.policy import choose
from .planting import Planted, instead, losing_two_decoders

# ------------------------------------------------------------------ streams and epochs


def old_epochs_are_heard(*, while_it_waits: bool = False) -> AbstractContextManager[None]:
    """The router takes tokens of any dispatch of a request, from any worker.

    `while_it_waits`: also when the request has no dispatch now; a gap in such tokens is more than the code can bear.
    """

    def run_from(self: Lifecycle, key: WorkerKey, name: str) -> RequestState | None:
        run = self.runs.active.get(name)
        return run if run is not None and (while_it_waits or run.living is not None) else None

    def standing(self: delivery.Delivery, choice: int, epoch: Epoch) -> delivery.DeliveryVerdict:
        is_running = choice < len(self._choices) and self._choices[choice].finish is None
        return delivery.DeliveryVerdict.TAKE if is_running else delivery.DeliveryVerdict.AFTER_END

    return _both(instead(Lifecycle, "_run_from", run_from), instead(delivery.Delivery, "_standing", standing))


def gaps_are_closed() -> AbstractContextManager[None]:
    """The router accepts tokens after a gap."""

    def tokens(
        self: delivery.Delivery, choice: int, epoch: Epoch, first_index: int, token_ids: Sequence[int]
    ) -> delivery.DeliveryVerdict:
        verdict = self._standing(choice, epoch)
        if verdict is delivery.DeliveryVerdict.TAKE:
            self._choices[choice].token_ids.extend(token_ids)
        return verdict

    return instead(delivery.Delivery, "tokens", tokens)


def epochs_begin_anew_with_each_request() -> AbstractContextManager[None]:
    """A real bug once: a request id that is used again is dispatched under an epoch that its worker has seen."""

    def next_name(self: Lifecycle, request: Request) -> str:
        return f"{request.owner}/{request.request_id}"

    def next_epoch(self: Orders, run: RequestState) -> Epoch:
        return Epoch(self._incarnation, len(run.dispatches) + 1)

    return _both(instead(Lifecycle, "_next_name", next_name), instead(Orders, "_next_epoch", next_epoch))


# ------------------------------------------------------------------ dispatches


def old_worker_is_not_told() -> AbstractContextManager[None]:
    """A request that is sent elsewhere is not cancelled on the worker that had it."""
    return instead(Orders, "cancel", _telling(lambda reason: reason != "sent elsewhere"))


def worker_is_not_told_of_the_end() -> AbstractContextManager[None]:
    """A request that fails, or whose client leaves, is not cancelled on its worker."""
    return instead(Orders, "cancel", _telling(lambda reason: reason == "sent elsewhere"))


def _telling(tells: Any) -> Any:
    original = Orders.cancel

    def cancel(self: Orders, run: RequestState, reason: str) -> None:
        if tells(reason):
            original(self, run, reason)

    return cancel


def one_loss_is_two_dispatches() -> AbstractContextManager[None]:
    """A real bug once: a request that waits for a worker still counts as running on its last worker."""

    def lost(self: Lifecycle, key: WorkerKey, reason: str, now_s: float, **_: bool) -> None:
        for run in list(self.runs.active.values()):
            if run.current is not None and run.current.decode == key:
                run.stage = Stage.DISPATCHED
                self._send_again_or_fail(run, WorkerLost(reason, retry_after_s=1.0), now_s)

    return instead(Lifecycle, "lost", lost)


def work_is_counted_for_ever() -> AbstractContextManager[None]:
    """Dispatched work still counts against a worker after the request has left it."""
    return instead(Orders, "forget", lambda self, run: None)


def waiting_requests_are_forgotten() -> AbstractContextManager[None]:
    """A request that waits to be sent again is not retried before its deadline."""

    def look_again(self: Lifecycle, name: str, now_s: float) -> None:
        self._waiting.remove(name)

    return instead(Lifecycle, "_look_again", look_again)


def free_workers_are_not_noticed() -> AbstractContextManager[None]:
    """Requests that wait for a free worker are not started when one is."""
    return instead(Entrance, "wake", lambda self: None)


def who_left_the_queue_is_served() -> AbstractContextManager[None]:
    """A request that ended while it waited for a free worker keeps its place."""
    return instead(Entrance, "leave", lambda self, name, now_s: False)


def admission_keeps_what_failed() -> AbstractContextManager[None]:
    """A request that ends in an error still counts as admitted."""
    original = Lifecycle._settle

    def settle(self: Lifecycle, run: RequestState, now_s: float) -> None:
        offer = self.admission._under_way.get(run.name)
        original(self, run, now_s)
        if run.error is not None and offer is not None:
            self.admission._under_way[run.name] = offer

    return instead(Lifecycle, "_settle", settle)


def losses_blame_who_never_arrived() -> AbstractContextManager[None]:
    """A real bug once: a suspect is guilty of the loss of a worker that was dead already as it was sent there."""
    return instead(suspects, "_is_confirmed", lambda run, key: True)


# ------------------------------------------------------------------ names


def ids_are_names() -> AbstractContextManager[None]:
    """A real bug once: the client's request id is the request's name inside the cluster."""
    return instead(Lifecycle, "_next_name", lambda self, request: request.request_id)


def ids_in_use_are_everybodys() -> AbstractContextManager[None]:
    """A real bug once: a tenant may not use an id that a running request of another tenant has."""

    def find(self: RequestStates, tenant: str, request_id: str) -> RequestState | None:
        return next((run for (_, name), run in self.open.items() if name == request_id), None)

    return instead(RequestStates, "find", find)


def ids_in_use_are_taken() -> AbstractContextManager[None]:
    """A second request of a tenant under an id in use replaces the first one."""
    return instead(RequestStates, "find", lambda self, tenant, request_id: None)


def everybodys_requests_are_explained() -> AbstractContextManager[None]:
    """The request history ignores the tenant of a request."""

    def find(self: RequestHistory, tenant: str, request_id: str) -> dict[str, Any] | None:
        line = next((line for (_, name), line in self._entries.items() if name == request_id), None)
        entry: dict[str, Any] | None = None if line is None else json.loads(line)
        return entry

    return instead(RequestHistory, "find", find)


# ------------------------------------------------------------------ workers


def removals_are_not_heard() -> AbstractContextManager[None]:
    """The router records the blocks that a worker stores, but not those that it evicts."""
    original = Roster.take_event

    def take_event(self: Roster, key: WorkerKey, event: worker_pb2.WatchEvent, now_s: float) -> bool:
        if event.HasField("delta"):
            event = worker_pb2.WatchEvent.FromString(event.SerializeToString())
            event.delta.removed = b""
        return original(self, key, event, now_s)

    return instead(Roster, "take_event", take_event)


def other_numerics_are_paired() -> AbstractContextManager[None]:
    """The policy ignores the numerics classes of prefill and decode workers."""

    def choose_any(
        request: RequestFacts,
        workers: Sequence[WorkerView],
        held: Any,
        limits: PolicyLimits,
        sources: Sequence[Source] = (),
    ) -> RoutingDecision | None:
        known = {view.key: view for view in workers}
        choice = choose(request, [replace(view, numerics=b"") for view in workers], held, limits, sources)
        if choice is None:
            return None
        pair = choice.winner
        prefill = None if pair.prefill is None else known[pair.prefill.key]
        return replace(choice, winner=replace(pair, prefill=prefill, decode=known[pair.decode.key]))

    return instead(choosing, "choose", choose_any)


class _both(AbstractContextManager[None]):  # lower case: used like a function
    """Two planted changes at once."""

    def __init__(self, one: AbstractContextManager[None], other: AbstractContextManager[None]) -> None:
        self._changes = (one, other)

    def __enter__(self) -> None:
        for change in self._changes:
            change.__enter__()

    def __exit__(self, *raised: Any) -> None:
        for change in self._changes:
            change.__exit__(*raised)


BUGS = (
    Planted(old_epochs_are_heard, ("R6",), 250),
    Planted(gaps_are_closed, ("R2",), 150),
    Planted(epochs_begin_anew_with_each_request, ("L1", "R3"), 200),
    Planted(old_worker_is_not_told, ("R8",), 700),
    Planted(worker_is_not_told_of_the_end, ("R8",), 100),
    Planted(one_loss_is_two_dispatches, ("R9",), 700),
    Planted(losses_blame_who_never_arrived, ("R11",), 50, losing_two_decoders),
    Planted(work_is_counted_for_ever, ("R1",), 100),
    Planted(waiting_requests_are_forgotten, ("R7",), 100),
    Planted(free_workers_are_not_noticed, ("L1", "R1"), 300),
    Planted(who_left_the_queue_is_served, ("R1", "crash"), 300),
    Planted(admission_keeps_what_failed, ("R1",), 100),
    Planted(ids_are_names, ("crash",), 550),
    Planted(ids_in_use_are_everybodys, ("S1",), 300),
    Planted(ids_in_use_are_taken, ("R1", "crash"), 750),
    Planted(everybodys_requests_are_explained, ("S1",), 300),
    Planted(removals_are_not_heard, ("K5",), 100),
    Planted(other_numerics_are_paired, ("R10",), 150),
)
