"""The workers as the router has them: announced, linked, watched, heard. Knows no request's life.

Joins the pure parts (fleet, prefix map) with their wires (announce, sessions) and the clock.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc.aio

from ..core.clock import Clock
from ..core.errors import InvalidRequest
from ..core.request import Request
from ..kv.block import BlockIdentity
from ..kv.keys import Namer
from ..kv.messages import role_from_wire
from ..protos import worker_pb2, worker_pb2_grpc
from .announce import AnnounceHandlers, AnnounceService
from .coefficients import FIELDS, coefficients_of, guess
from .explain import explain_worker
from .facts import ModelFacts, WorkerFacts, WorkerKey
from .fleet import Change, Fleet, FleetChange
from .metrics import RouterMetrics
from .policy import WorkerView
from .prefixes import PrefixMap
from .sessions import LinkHandlers, WorkerLink
from .views import views_of
from .wire import load_from_wire

log = logging.getLogger(__name__)

TICK_S = 0.1
SWEEP_ENTRIES = 20_000  # a few milliseconds


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this router is to its workers."""

    router_id: str
    incarnation: int
    identity_key: bytes  # kv/keys.py: of the cluster's shared secret
    proof_key: bytes  # likewise


@dataclass(frozen=True, slots=True)
class MemberHandlers:
    """What the members tell the flow."""

    lost: Callable[[WorkerKey, str], None]  # the requests on this worker are lost
    step: Callable[[WorkerKey, worker_pb2.StepOutput], None]
    ticked: Callable[[float], None]


class Members:
    """All workers of this router, and what is known of each."""

    def __init__(self, identity: Identity, handlers: MemberHandlers, metrics: RouterMetrics, clock: Clock) -> None:
        self.fleet = Fleet()
        self.prefixes = PrefixMap()
        self._identity = identity
        self._handlers = handlers
        self._metrics = metrics
        self._clock = clock
        self._links: dict[WorkerKey, WorkerLink] = {}
        self._changed = asyncio.Event()
        self._ticker: asyncio.Task[None] | None = None
        self._num_lost = 0
        self._is_closed = False  # then what ends is of our own making
        self._closing: set[asyncio.Task[None]] = set()

    # ------------------------------------------------------------------ life

    def add_announce(self, server: grpc.aio.Server) -> None:
        """Register the Announce service."""
        handlers = AnnounceHandlers(self._on_announced, self._on_leaving, self._on_announce_ended)
        service = AnnounceService(self._identity.router_id, self._identity.incarnation, handlers)
        worker_pb2_grpc.add_AnnounceServicer_to_server(service, server)

    def start(self) -> None:
        """Begin to watch over silence."""
        self._ticker = asyncio.create_task(self._tick_for_ever(), name="router tick")

    async def close(self) -> None:
        """Leave all workers."""
        if self._ticker is not None:
            self._ticker.cancel()
            await asyncio.gather(self._ticker, return_exceptions=True)
        self._is_closed = True
        links, self._links = list(self._links.values()), {}
        await asyncio.gather(*(link.close() for link in links), *self._closing, return_exceptions=True)

    async def wait_for_change(self, timeout_s: float) -> None:
        """Return when a worker came, went or changed, or `wake` was called; at the latest after `timeout_s`."""
        changed = self._changed
        try:
            await asyncio.wait_for(changed.wait(), max(0.0, timeout_s))
        except TimeoutError:
            pass

    def wake(self) -> None:
        """Let everybody in `wait_for_change` look again."""
        self._changed.set()
        self._changed = asyncio.Event()

    # ------------------------------------------------------------------ for the flow

    def send(self, key: WorkerKey, message: worker_pb2.SessionUp) -> bool:
        """Queue an order to a worker. False: it has no session."""
        link = self._links.get(key)
        return link is not None and link.send(message)

    def views(self, model: str, excluded: set[WorkerKey]) -> list[WorkerView]:
        """The workers that may get new work of this model, as the policy sees them."""
        return views_of(w for w in self.fleet.serving(model) if w.facts.key not in excluded)

    def identities(self, request: Request, model: ModelFacts) -> tuple[BlockIdentity, ...]:
        """The prompt's chain as workers of this model name it."""
        namer = Namer(self._identity.identity_key, model.weights_fingerprint, model.identity_class)
        return namer.name(request.prompt_ids, request.isolation_domain).identities

    def facts(self, now_s: float) -> list[dict[str, Any]]:
        """All workers as `status` shows them, by name."""
        workers = sorted(self.fleet, key=lambda worker: worker.facts.worker_id)
        otherwise = guess(worker.load for worker in workers)
        return [explain_worker(worker, coefficients_of(worker.load, otherwise), now_s) for worker in workers]

    # ------------------------------------------------------------------ what the wires say

    def _on_announced(self, facts: WorkerFacts) -> None:
        self._apply(self.fleet.announced(facts, self._clock.now_s()))

    def _on_leaving(self, key: WorkerKey) -> None:
        self.fleet.leaving(key)
        self.wake()

    def _on_announce_ended(self, key: WorkerKey) -> None:
        self._apply(self.fleet.announce_ended(key))

    def _on_up(self, key: WorkerKey, facts: WorkerFacts) -> None:
        self.fleet.session_up(key, facts, self._clock.now_s())
        log.info("%s: session is up (%s, %s)", key.worker_id, facts.role.value, facts.address)
        self._metrics.know_worker(facts)
        self.wake()

    def _on_down(self, key: WorkerKey, reason: str) -> None:
        self._apply(self.fleet.session_down(key, self._clock.now_s(), reason))

    def _on_beat(self, key: WorkerKey, beat: worker_pb2.Beat | None) -> None:
        if beat is None:
            self.fleet.beat(key, self._clock.now_s())
        else:
            self.fleet.beat(key, self._clock.now_s(), beat.phase, beat.steps)

    def _on_watching(self, key: WorkerKey) -> None:
        if key in self._links:
            self.prefixes.join(key.worker_id)

    def _on_event(self, key: WorkerKey, event: worker_pb2.WatchEvent) -> bool:
        if key not in self._links:
            return False  # an earlier life's link, which is closing
        match event.WhichOneof("body"):
            case "snapshot":
                piece = event.snapshot
                heard = self.prefixes.snapshot(key.worker_id, event.sequence, piece.identities, piece.last)
            case "delta":
                delta = event.delta
                heard = self.prefixes.delta(key.worker_id, event.sequence, delta.stored, delta.removed)
            case "load":
                heard = self._on_load(key, event.load)
            case _:
                heard = True  # a newer release's event
        if not heard:
            self._metrics.resyncs.inc()
        return heard

    def _on_load(self, key: WorkerKey, report: worker_pb2.LoadReport) -> bool:
        load = load_from_wire(report)
        try:
            self.fleet.loaded(key, load, role_from_wire(report.role), self._clock.now_s())
        except InvalidRequest:
            log.warning("%s: a load report with an unknown role", key.worker_id)
        worker = self.fleet.get(key.worker_id)
        if worker is not None and worker.facts.key == key:
            self._metrics.engine(worker.facts, load)
        return True

    # ------------------------------------------------------------------ what follows from it

    def _apply(self, changes: list[FleetChange]) -> None:
        if self._is_closed:
            return
        for change in changes:
            key = change.worker.key
            if change.change is Change.CONNECT:
                self._connect(change.worker)
                continue
            log.warning("%s: %s (%s)", key.worker_id, change.change.value, change.reason)
            if change.change is Change.LOST and key in self._links:
                self._links[key].reset()
            elif change.change is Change.GONE:
                self._disconnect(change.worker)
            self._handlers.lost(key, change.reason)
        if changes:
            self._metrics.workers_lost.inc(self.fleet.num_lost - self._num_lost)
            self._num_lost = self.fleet.num_lost
            self.wake()

    def _connect(self, facts: WorkerFacts) -> None:
        hello = worker_pb2.SessionHello(
            router_id=self._identity.router_id, router_incarnation=self._identity.incarnation
        )
        handlers = LinkHandlers(
            self._on_up, self._on_down, self._on_beat, self._handlers.step, self._on_watching, self._on_event
        )
        link = WorkerLink(facts, hello, handlers, self._identity.proof_key)
        self._links[facts.key] = link
        link.open()

    def _disconnect(self, facts: WorkerFacts) -> None:
        key = facts.key
        link = self._links.pop(key, None)
        if link is not None:
            self.prefixes.leave(key.worker_id)
            self._metrics.forget_worker(facts)
            task = asyncio.create_task(link.close(), name=f"close {key.worker_id}")
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def _tick_for_ever(self) -> None:
        ticks = 0
        while True:
            await asyncio.sleep(TICK_S)
            now_s = self._clock.now_s()
            try:
                self._apply(self.fleet.tick(now_s))
                self.prefixes.tick(now_s)
                self.prefixes.sweep(SWEEP_ENTRIES)
                self._handlers.ticked(now_s)
                ticks += 1
                if ticks % 10 == 0:
                    self._export()
            except Exception:  # the watch over all workers must outlive one bad moment
                log.exception("the router's tick failed")

    def _export(self) -> None:
        metrics = self._metrics
        metrics.fleet((worker.role.value, worker.state) for worker in self.fleet)
        metrics.prefix_entries.set(len(self.prefixes))
        metrics.prefix_dropped.set(self.prefixes.num_dropped)
        otherwise = guess(worker.load for worker in self.fleet)
        for model in self.fleet.models():
            metrics.load(model, [worker.load for worker in self.fleet if worker.facts.model.name == model])
        for worker in self.fleet:
            coefficients = coefficients_of(worker.load, otherwise)
            for name in FIELDS:
                metrics.coefficient.labels(worker.facts.worker_id, name).set(getattr(coefficients, name))
