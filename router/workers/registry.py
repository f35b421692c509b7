"""The router's connections to its workers: announce streams, sessions, watches, and the tick. Knows no request.

router/requests/roster.py decides the reactions to their messages.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import grpc.aio

from ...core.clock import Clock
from ...core.request import Request
from ...core.tls.identity import TlsIdentity
from ...kv.block import BlockIdentity
from ...kv.keys import PromptHasher
from ...protos import worker_pb2, worker_pb2_grpc
from ..metrics import RouterMetrics
from ..requests.explain import explain_cordoned, explain_worker
from ..requests.roster import Roster
from ..requests.surroundings import Order
from ..routing.coefficients import FIELDS, coefficients_of, guess
from ..routing.facts import ModelFacts, WorkerFacts, WorkerKey
from ..routing.fleet import Fleet, FleetChange, FleetLimits
from ..routing.prefixes import PrefixMap
from .announce import AnnounceHandlers, AnnounceService
from .links import LinkHandlers, WorkerLink
from .supervision import Supervision

log = logging.getLogger(__name__)

TICK_S = 0.1
SWEEP_ENTRIES = 20_000  # a few milliseconds


@dataclass(frozen=True, slots=True)
class Identity:
    """Identity of this router towards its workers."""

    router_id: str
    incarnation: int
    identity_key: bytes  # kv/keys.py, derived from the cluster's shared secret
    proof_key: bytes  # kv/keys.py, too
    tls: TlsIdentity | None = None  # its certificates


@dataclass(frozen=True, slots=True)
class RegistryHandlers:
    """Callbacks of the registry to the flow."""

    lost: Callable[[FleetChange], None]  # the requests on this worker are lost
    step: Callable[[WorkerKey, worker_pb2.StepOutput], None]
    changed: Callable[[], None]  # a worker came, went or changed
    ticked: Callable[[float], None]


class WorkerRegistry:
    """All workers of this router, with their connections and facts."""

    def __init__(
        self,
        identity: Identity,
        handlers: RegistryHandlers,
        metrics: RouterMetrics,
        clock: Clock,
        limits: FleetLimits | None = None,
    ) -> None:
        self.fleet = Fleet(limits)
        self.prefixes = PrefixMap()
        self.supervision = Supervision()
        self.roster = Roster(self.fleet, self.prefixes, self)
        self._identity = identity
        self._handlers = handlers
        self._metrics = metrics
        self._clock = clock
        self._links: dict[WorkerKey, WorkerLink] = {}
        self._changed = asyncio.Event()
        self._ticker: asyncio.Task[None] | None = None
        self._num_lost = 0
        self._is_closed = False  # after `close`, ends of streams are our own and are not reported
        self._closing: set[asyncio.Task[None]] = set()
        self.on_up: Callable[[WorkerKey], None] = lambda key: None  # called when a session is up
        # Called with what was known of a worker and what it announced, if its adapters are others.
        self.on_adapters: Callable[[WorkerFacts | None, WorkerFacts], None] = lambda before, after: None

    @property
    def links(self) -> Mapping[WorkerKey, WorkerLink]:
        """The open connections to workers."""
        return self._links

    # ------------------------------------------------------------------ life

    def add_announce(self, server: grpc.aio.Server) -> None:
        """Register the Announce service."""
        handlers = AnnounceHandlers(self._on_announced, self.roster.leaving, self._on_announce_ended, self._on_report)
        service = AnnounceService(self._identity.router_id, self._identity.incarnation, handlers)
        worker_pb2_grpc.add_AnnounceServicer_to_server(service, server)

    def start(self) -> None:
        """Start the tick, which detects silent workers."""
        self._ticker = asyncio.create_task(self._tick_for_ever(), name="router tick")

    async def close(self) -> None:
        """Disconnect from all workers."""
        if self._ticker is not None:
            self._ticker.cancel()
            await asyncio.gather(self._ticker, return_exceptions=True)
        self._is_closed = True
        links, self._links = list(self._links.values()), {}
        await asyncio.gather(*(link.close() for link in links), *self._closing, return_exceptions=True)

    async def wait_for_change(self, timeout_s: float) -> None:
        """Wait until a worker came, went or changed, or `wake` was called, for at most `timeout_s`."""
        changed = self._changed
        try:
            async with asyncio.timeout(max(0.0, timeout_s)):
                await changed.wait()
        except TimeoutError:
            pass

    def wake(self) -> None:
        """Wake all callers of `wait_for_change`."""
        self._changed.set()
        self._changed = asyncio.Event()

    # ------------------------------------------------------------------ for the flow

    def send(self, key: WorkerKey, order: Order) -> bool:
        """Queue an order to a worker. False: it has no session, or its queue is full."""
        link = self._links.get(key)
        if link is None:
            return False
        if isinstance(order, worker_pb2.Submit):
            return link.send(worker_pb2.SessionUp(submit=order))
        return link.send(worker_pb2.SessionUp(cancel=order))

    def identities(self, request: Request, model: ModelFacts) -> tuple[BlockIdentity, ...]:
        """The prompt's chain as workers of this model name it."""
        hasher = PromptHasher.of(self._identity.identity_key, model)
        return hasher.name(request.prompt_ids, request.cache_scope).identities

    def facts(self, now_s: float) -> list[dict[str, Any]]:
        """Reports of all workers for `status`, sorted by name."""
        workers = sorted(self.fleet, key=lambda worker: worker.facts.worker_id)
        otherwise = guess(worker.load for worker in workers)
        return [explain_worker(worker, coefficients_of(worker.load, otherwise), now_s) for worker in workers]

    def cordoned(self, now_s: float) -> list[dict[str, Any]]:
        """Reports of cordoned GPUs for `status`, oldest first."""
        return [explain_cordoned(found, now_s) for found in self.fleet.cordoned.all()]

    # ------------------------------------------------------------------ events of the connections

    def _on_announced(self, facts: WorkerFacts) -> None:
        if self._is_closed:
            return
        known = self.fleet.get(facts.worker_id)
        before = None if known is None else known.facts
        self.roster.announced(facts, self._clock.now_s())
        if facts.adapters != (() if before is None else before.adapters):
            self.on_adapters(before, facts)
            self.changed()

    def _on_announce_ended(self, key: WorkerKey) -> None:
        if not self._is_closed:
            self.roster.announce_ended(key, self._clock.now_s())

    def _on_report(self, report: worker_pb2.SupervisorReport) -> None:
        if self.supervision.take(report, self._clock.now_s()):
            self._metrics.planned(self.supervision)

    def _on_up(self, key: WorkerKey, facts: WorkerFacts) -> None:
        log.info("%s: session is up (%s, %s)", key.worker_id, facts.role.value, facts.address)
        self._metrics.know_worker(facts)
        self.roster.session_up(key, facts, self._clock.now_s())
        self.on_up(key)

    def _on_down(self, key: WorkerKey, reason: str) -> None:
        if not self._is_closed:
            self.roster.session_down(key, reason, self._clock.now_s())

    def _on_beat(self, key: WorkerKey, beat: worker_pb2.Beat | None) -> None:
        self.roster.beat(key, beat, self._clock.now_s())

    def _on_event(self, key: WorkerKey, event: worker_pb2.WatchEvent) -> bool:
        heard = self.roster.take_event(key, event, self._clock.now_s())
        if not heard:
            self._metrics.resyncs.inc()
        elif event.HasField("load"):
            worker = self.fleet.get(key.worker_id)
            if worker is not None and worker.facts.key == key:
                self._metrics.engine(worker.facts, worker.load)
        return heard

    # ------------------------------------------------------------------ Wires

    def connect(self, facts: WorkerFacts) -> None:
        """Implements `Wires.connect`."""
        hello = worker_pb2.SessionHello(
            router_id=self._identity.router_id, router_incarnation=self._identity.incarnation
        )
        handlers = LinkHandlers(
            self._on_up, self._on_down, self._on_beat, self._handlers.step, self.roster.watching, self._on_event
        )
        link = WorkerLink(facts, hello, handlers, self._identity.proof_key, self._identity.tls)
        self._links[facts.key] = link
        link.open()

    def reset(self, key: WorkerKey) -> None:
        """Implements `Wires.reset`."""
        if key in self._links:
            self._links[key].reset()

    def disconnect(self, facts: WorkerFacts) -> None:
        """Implements `Wires.disconnect`."""
        link = self._links.pop(facts.key, None)
        if link is not None:
            self._metrics.forget_worker(facts)
            task = asyncio.create_task(link.close(), name=f"close {facts.worker_id}")
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    def lost(self, change: FleetChange) -> None:
        """Implements `Wires.lost`."""
        key = change.worker.key
        log.warning("%s: %s (%s)", key.worker_id, change.change.value, change.reason)
        self._handlers.lost(change)

    def changed(self) -> None:
        """Implements `Wires.changed`."""
        self._metrics.workers_lost.inc(self.fleet.num_lost - self._num_lost)
        self._num_lost = self.fleet.num_lost
        self._handlers.changed()
        self.wake()

    # ------------------------------------------------------------------ time

    async def _tick_for_ever(self) -> None:
        ticks = 0
        while True:
            await asyncio.sleep(TICK_S)
            now_s = self._clock.now_s()
            try:
                self.roster.tick(now_s, SWEEP_ENTRIES)
                self._handlers.ticked(now_s)
                ticks += 1
                if ticks % 10 == 0:
                    self._export()
            except Exception:  # the tick must continue after a failure
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
