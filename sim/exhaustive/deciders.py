"""The production deciders of a dispatch as automata: a decode worker's service and ledger, and a router's lifecycle."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

from ...core.errors import TwostrokeError
from ...core.request import Epoch, FinishReason, Request, Role
from ...core.timeline import Instant, Timeline
from ...decode_worker.ledger import RouterKey
from ...decode_worker.order import key_of, order_from_wire
from ...decode_worker.report import known_end_message
from ...decode_worker.service import DecodeService
from ...engine.adapters import AdapterTable
from ...kv.block import BlockIdentity
from ...kv.keys import PromptHasher
from ...kv.messages import epoch_from_wire
from ...kv.recent_prompts import RecentPrompts
from ...protos import worker_pb2
from ...router.requests.lifecycle import Lifecycle
from ...router.requests.roster import Roster
from ...router.requests.state import RequestState, Stage
from ...router.requests.surroundings import LifeLimits, Order
from ...router.routing.candidates import PolicyLimits
from ...router.routing.facts import ModelFacts, WorkerFacts, WorkerKey
from ...router.routing.fleet import Fleet, FleetChange, FleetLimits
from ...router.routing.prefixes import PrefixMap
from ..invariants import Violation
from ..workers.cells import SPEC
from ..workers.engine import IDENTITY_KEY
from ..workers.facts import MODEL, ROUTER_MODEL
from .automaton import Event
from .given import DOMAIN, FACTS, PARAMS, PROMPT_IDS, TIMEOUT_S, TOKENS
from .silent import SilentChoice

ROUTER = RouterKey("router", 1)
PATIENCE_S = 2.0

# ------------------------------------------------------------------ a decode worker


class _Run:
    """Stands for the task of an order, which is an automaton of its own."""

    adapter_slot = 0  # no request of this small world has an adapter

    def __init__(self, name: tuple[str, int], actions: Callable[[Any], None]) -> None:
        self.name = name
        self.is_cancelled = False
        self._act = actions

    def cancel(self, reason: str, verdict: FinishReason = FinishReason.CANCELLED) -> None:
        """Cancel the task."""
        self.is_cancelled = True
        self._act(("cancel", *self.name, reason, verdict))


class Service(DecodeService):
    """Production's service and ledger of a decode worker; tasks are outside."""

    def __init__(self) -> None:
        self.actions: list[Any] = []
        client = SimpleNamespace(on_step=lambda _: None)
        pull = SimpleNamespace(dispatcher=client, counters=Counter())
        tools = SimpleNamespace(facts=FACTS, pull=pull, adapters=AdapterTable())
        super().__init__(cast(Any, tools), cast(Any, None))
        self._opened: list[Any] = []
        self._graces: list[Callable[[], None]] = []
        self.feed(("open",))

    def feed(self, event: Event) -> None:
        """Handle a message of a session, its begin or end, the end of a task, or the end of a grace."""
        match event:
            case ("open",):
                outbox = SimpleNamespace(add_end=partial(self._say, len(self._opened)))
                session = SimpleNamespace(router=ROUTER, router_id=ROUTER.router_id, outbox=outbox)
                self._opened.append(_ByIdentity(session))
                self.open(cast(Any, self._opened[-1]))
            case ("lose",):
                self.lose(cast(Any, self._opened[-1]))
            case ("submit", order):
                self.submit(cast(Any, self._opened[-1]), worker_pb2.Submit.FromString(order))
            case ("cancel", order):
                self.cancel(cast(Any, self._opened[-1]), worker_pb2.CancelRequest.FromString(order))
            case ("ended", request_id, counter):
                (run,) = [one for one in self.runs if cast(Any, one).name == (request_id, counter)]
                self._on_end(run)
            case ("grace",):
                self._graces.pop(0)()

    def _begin(self, session: Any, message: worker_pb2.Submit) -> Any:
        name = (message.request_id, message.epoch.counter)
        runs = [one for one in self.runs if cast(Any, one).name == name or self._newest(one, key_of(message), message)]
        if runs:
            raise Violation("R6", f"{name} begins beside {[cast(Any, one).name for one in runs]}")
        order = order_from_wire(message, FACTS.model, RecentPrompts(FACTS.namer), 1)
        emitted = order.prompt_ids[len(order.prompt_ids) - order.num_emitted :]
        if emitted != TOKENS[: len(emitted)]:
            raise Violation("R3", f"{name} is to go on after {emitted}")
        end = known_end_message(order, SilentChoice(order.params, emitted), 0.0, SPEC)
        if end is not None:
            return end
        peers = tuple(peer.worker_id for peer in message.prefill_peers)
        self.actions.append(("begin", *name, len(self._opened) - 1, peers, order.num_emitted))
        return _Run(name, self._add)

    def _say(self, session: int, end: worker_pb2.RequestEnd) -> None:
        end.ClearField("timeline")
        end.ClearField("handover")
        self.actions.append(("says", session, worker_pb2.StepOutput(ends=[end]).SerializeToString()))

    def _add(self, action: Any) -> None:
        self.actions.append(action)

    def _newest(self, run: Any, key: Any, message: worker_pb2.Submit) -> bool:
        """True if a run is of the same or a newer dispatch of the order's choice, or not told to end."""
        entry = self._ledger._entries[run]
        return entry.key == key and (entry.epoch >= epoch_from_wire(message.epoch) or not run.is_cancelled)

    def _after(self, delay_s: float, act: Callable[[], None]) -> None:
        self._graces.append(act)

    def state(self) -> Hashable:
        """Canonical state."""
        places = {id(session): place for place, session in enumerate(self._opened)}
        ledger = self._ledger
        entries = [
            (e.key, e.epoch, places[id(e.session)], cast(Any, run).is_cancelled) for run, e in ledger._entries.items()
        ]
        newest = sorted(cast(Any, run).name for runs in ledger._newest.values() for run in runs.values())
        graces = len(self._graces)
        opened = len(self._opened), len(ledger._sessions)
        return tuple(sorted(entries)), tuple(newest), tuple(sorted(ledger._ended.items())), opened, graces

    def place(self) -> str:
        """No hand-over machine is inside."""
        return ""

    def label(self, event: Event) -> str:
        """No event is one of a hand-over machine."""
        return ""

    def facts(self) -> tuple[bool, bool]:
        """Two flags: a task is left; a grace is running."""
        return len(self._ledger) > 0, bool(self._graces)


class _ByIdentity:
    """A session: hashable by identity, with the attributes that the service reads."""

    def __init__(self, values: SimpleNamespace) -> None:
        self.router, self.router_id, self.outbox = values.router, values.router_id, values.outbox


# ------------------------------------------------------------------ the router


class _Later:
    def __init__(self, act: Callable[[float], None]) -> None:
        self.act: Callable[[float], None] | None = act

    def cancel(self) -> None:
        """Implements `Timer.cancel`."""
        self.act = None

    def fire(self, now_s: float) -> None:
        """Make the call, unless it was cancelled or made."""
        act, self.act = self.act, None
        if act is not None:
            act(now_s)


class Router:
    """Production's lifecycle, roster and fleet of one router, with clients that read at once."""

    def __init__(self, num_requests: int, num_prefill: int, num_decode: int) -> None:
        self.actions: list[Any] = []
        self._up: set[str] = set()
        self._soon: deque[_Later] = deque()
        self._now_s = 0.0
        self._waits: dict[int, _Later] = {}
        fleet = Fleet(FleetLimits(return_s=PATIENCE_S))  # one timer ends both waits: for a free worker, for a lost one
        self.roster = Roster(fleet, PrefixMap(max_entries=200), cast(Any, self))
        self._workers = [_worker(f"d{index}", Role.DECODE) for index in range(num_decode)]
        self._workers += [_worker(f"p{index}", Role.PREFILL) for index in range(num_prefill)]
        limits = LifeLimits(PATIENCE_S, PATIENCE_S, policy=PolicyLimits(local_prefill=False))
        self.life = Lifecycle(ROUTER.incarnation, limits, self.roster, self, cast(Any, self))
        self.requests = [_request(index) for index in range(num_requests)]
        self.runs: list[RequestState] = []
        self._given = [0] * num_requests
        self._outcome: list[str | None] = [None] * num_requests
        for facts in self._workers:
            self.roster.announced(facts, 0.0)
            self._session(facts.key.worker_id, is_up=True)

    def feed(self, event: Event) -> None:
        """Handle the clients' requests, a worker's output, a session's begin or end, an abort, or a timer."""
        self._now_s = 0.0
        match event:
            case ("begin",):
                self._begin()
            case ("step", worker_id, output):
                self.life.take_step(self._key(worker_id), worker_pb2.StepOutput.FromString(output), 0.0)
            case ("session", worker_id, is_up):
                self._session(worker_id, is_up=is_up)
            case ("abort", index):
                self.life.abort(DOMAIN, self.requests[index].request_id, 0.0)
            case ("expire", index):
                deadline = self.runs[index].deadline
                assert isinstance(deadline, _Later)
                deadline.fire(TIMEOUT_S)
            case ("patience", index):
                self._now_s = PATIENCE_S
                timer = self.life._waiting.timers[self.runs[index].name]
                assert isinstance(timer, _Later)
                timer.fire(PATIENCE_S)
        while self._soon:
            self._soon.popleft().fire(self._now_s)
        self._deliver()
        self._check()

    def _begin(self) -> None:
        for request in self.requests:
            timeline = Timeline()
            timeline.mark(Instant.ARRIVED, 0.0)
            self.runs.append(self.life.admit(request, timeline, 0.0))
        for run in self.runs:
            self.life.begin(run, 0.0)

    def _session(self, worker_id: str, *, is_up: bool) -> None:
        if is_up:
            self._up.add(worker_id)
            self.roster.session_up(self._key(worker_id), None, 0.0)
        else:
            self._up.discard(worker_id)
            self.roster.session_down(self._key(worker_id), "gone", 0.0)

    def _key(self, worker_id: str) -> WorkerKey:
        return WorkerKey(worker_id, 1)

    def _deliver(self) -> None:
        """Give each client its pieces, and check R2 and R3."""
        for index, run in enumerate(self.runs):
            while (piece := run.take_piece()) is not None:
                given = self._given[index]
                if piece.first_index != given or piece.token_ids != TOKENS[given : given + len(piece.token_ids)]:
                    raise Violation("R3", f"{run.name}: tokens {piece.token_ids} come at {given}")
                self._given[index] += len(piece.token_ids)
            if run.is_over and self._outcome[index] is None:
                self._outcome[index] = run.error.code if run.error is not None else "finished"
                if run.error is None and self._given[index] != len(TOKENS):
                    raise Violation("R1", f"{run.name} finished after {self._given[index]} tokens")
                self.life.conclude(run)

    def _check(self) -> None:
        """Check R1 of the counts, and R7: a request that no worker has is waiting for one."""
        admission, active = self.life.admission, self.life.runs.active
        if len(admission) != len(active):
            raise Violation("R1", f"{len(admission)} requests are admitted, {len(active)} are under way")
        for run in active.values():
            if run.stage is Stage.ROUTING and run.name not in self.life._waiting and run.name not in self.life.entrance:
                raise Violation("R7", f"{run.name} belongs to no worker, and none is looked for")
        if self.life.is_idle and any(worker.in_flight for worker in self.roster.fleet):
            raise Violation("R1", "work is still counted after every request ended")

    def state(self) -> Hashable:
        """Canonical state."""
        life = self.life
        runs = tuple(
            (
                run.stage.value,
                tuple((c.epoch, c.next_index, c.finish) for c in run.delivery._choices),
                None if run.living is None else (run.living.decode.worker_id, run.living.epoch.counter),
                None if run.living is None else run.living.prefill,
                run.suspicion,
                len(run.dispatches),
                tuple(sorted((worker, left.error.code) for worker, left in run._failed_by.items())),
                run.error.code if run.error else None,
                run.cause.code if run.cause else None,
                run.name in life._waiting,
                self._outcome[index],
            )
            for index, run in enumerate(self.runs)
        )
        fleet = tuple(
            (worker.facts.worker_id, worker.state.value, tuple(sorted(worker.in_flight)))
            for worker in self.roster.fleet
        )
        return runs, fleet, life._orders.num_dispatched, life._waiting.wake_due is None

    def place(self) -> str:
        """No hand-over machine is inside."""
        return ""

    def label(self, event: Event) -> str:
        """No event is one of a hand-over machine."""
        return ""

    def facts(self) -> tuple[tuple[str | None, ...], tuple[bool, ...], tuple[int, ...], bool]:
        """Outcomes; which requests wait for a worker; the epochs that live (0: none); whether nothing is under way."""
        waiting = tuple(run.name in self.life._waiting for run in self.runs)
        living = tuple(0 if run.living is None else run.living.epoch.counter for run in self.runs)
        return tuple(self._outcome), waiting, living, bool(self.runs) and self.life.is_idle

    # ------------------------------------------------------------------ what roster and life ask

    def send(self, key: WorkerKey, order: Order) -> bool:
        """Implements `Driver.send`."""
        if key.worker_id not in self._up:
            return False
        kind = "submit" if isinstance(order, worker_pb2.Submit) else "cancel"
        if isinstance(order, worker_pb2.Submit):
            order.timeout_ms = 0  # the same order at any time
        self.actions.append(("order", key.worker_id, kind, order.SerializeToString()))
        return True

    def later(self, delay_s: float, act: Callable[[float], None]) -> _Later:
        """Implements `Driver.later`."""
        timer = _Later(act)
        if delay_s == 0.0:
            self._soon.append(timer)
        return timer

    def identities(self, request: Request, model: ModelFacts) -> Sequence[BlockIdentity]:
        """Implements `Driver.identities`."""
        return PromptHasher.of(IDENTITY_KEY, model).name(request.prompt_ids, request.cache_scope).identities

    def lost(self, change: FleetChange) -> None:
        """Implements `Wires.lost`."""
        self.life.lost(change.worker.key, change.reason, self._now_s, has_left=change.has_left)

    def changed(self) -> None:
        """Implements `Wires.changed`."""
        if hasattr(self, "life"):
            self.life.workers_changed()

    def choosing(self) -> AbstractContextManager[object]:
        """Implements `Observer.choosing`."""
        return nullcontext()

    def heard(self, run: RequestState, epoch: Epoch, num_tokens: int) -> None:
        """Check R6: tokens are accepted only from the current dispatch."""
        if run.living is None or run.living.epoch != epoch:
            raise Violation("R6", f"{run.name}: epoch {epoch} was heard, another lives")

    def usage_differs(self, run: RequestState, said: int, had: int) -> None:
        """Check R5."""
        raise Violation("R5", f"{run.name}: the worker says {said} tokens, {had} were delivered")

    def refused(self, request: Request, error: TwostrokeError) -> None:
        """No request of this scope may be refused."""
        raise Violation("R1", f"{request.request_id} is refused: {error}")

    def _nothing(self, *_: Any) -> None:
        """Events of Wires and Observer that need no answer here."""

    connect = reset = disconnect = dispatched = dropped = first_token = sent_again = settled = _nothing


def _worker(worker_id: str, role: Role) -> WorkerFacts:
    return WorkerFacts(worker_id, 1, role, f"{worker_id}:1", ROUTER_MODEL, 3, 16, 8, 64)


def _request(index: int) -> Request:
    ids = tuple(token + index for token in PROMPT_IDS)
    return Request(f"r{index}", MODEL, ids, PARAMS, 1, DOMAIN, TIMEOUT_S)
