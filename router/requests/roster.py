"""Reactions to the messages of workers: connect, update, reset, forget. Pure.

Joins fleet and prefix map. The owner of the connections (router/workers/registry.py, sim/router.py) passes the messages
in and implements `Wires`.
"""

from __future__ import annotations

from typing import Protocol

from ...core.errors import InvalidRequest
from ...kv.cache.reach import told_reach
from ...kv.messages import role_from_wire
from ...protos import worker_pb2
from ..routing.facts import WorkerFacts, WorkerKey
from ..routing.fleet import Change, Fleet, FleetChange
from ..routing.prefixes import PrefixMap
from ..workers.wire import load_from_wire


class Wires(Protocol):
    """Actions of the roster, carried out by the owner of the connections to workers."""

    def connect(self, facts: WorkerFacts) -> None:
        """Open a session and a watch to a worker, and keep them open."""
        ...

    def reset(self, key: WorkerKey) -> None:
        """Break a worker's session; it is opened again."""
        ...

    def disconnect(self, facts: WorkerFacts) -> None:
        """Close all connections to a worker for good."""
        ...

    def lost(self, change: FleetChange) -> None:
        """Report that the requests on this worker are lost."""
        ...

    def changed(self) -> None:
        """Report that a worker came, went or changed."""
        ...


class Roster:
    """All workers of one router, from their announcement until they are gone."""

    def __init__(self, fleet: Fleet, prefixes: PrefixMap, wires: Wires) -> None:
        self.fleet = fleet
        self.prefixes = prefixes
        self._wires = wires
        self._connected: set[WorkerKey] = set()

    def announced(self, facts: WorkerFacts, now_s: float) -> None:
        """A message arrived on a worker's announce stream."""
        self._apply(self.fleet.announced(facts, now_s))

    def leaving(self, key: WorkerKey) -> None:
        """A worker announced that it leaves."""
        self.fleet.leaving(key)
        self._wires.changed()

    def announce_ended(self, key: WorkerKey, now_s: float) -> None:
        """A worker's announce stream ended."""
        self._apply(self.fleet.announce_ended(key, now_s))

    def session_up(self, key: WorkerKey, facts: WorkerFacts | None, now_s: float) -> None:
        """A worker's session is open; `facts` are those of its welcome."""
        self.fleet.session_up(key, facts, now_s)
        self._wires.changed()

    def session_down(self, key: WorkerKey, reason: str, now_s: float) -> None:
        """A worker's session broke."""
        self._apply(self.fleet.session_down(key, now_s, reason))

    def beat(self, key: WorkerKey, beat: worker_pb2.Beat | None, now_s: float) -> None:
        """A message arrived on a worker's session; None: it was no Beat."""
        phase, steps = (None, None) if beat is None else (beat.phase, beat.steps)
        if self.fleet.beat(key, now_s, phase, steps):
            self._wires.changed()

    def watching(self, key: WorkerKey) -> None:
        """A new watch begins: the numbers of its events start anew."""
        if key in self._connected:
            self.prefixes.join(key.worker_id)

    def take_event(self, key: WorkerKey, event: worker_pb2.WatchEvent, now_s: float) -> bool:
        """Apply an event of a worker's prefix cache or load. False: earlier events are missing; watch again."""
        if key not in self._connected or event.incarnation != key.incarnation:
            return False  # of an earlier incarnation
        match event.WhichOneof("body"):
            case "snapshot":
                piece = event.snapshot
                reach = told_reach(piece.block_tokens, piece.window_tokens)
                return self.prefixes.snapshot(
                    key.worker_id, event.sequence, piece.identities, piece.last, lacking=piece.lacking, reach=reach
                )
            case "delta":
                delta = event.delta
                return self.prefixes.delta(
                    key.worker_id, event.sequence, delta.stored, delta.removed, lacking=delta.lacking
                )
            case "load":
                self._take_load(key, event.load, now_s)
        return True  # also for an unknown event of a newer release

    def tick(self, now_s: float, sweep_entries: int) -> None:
        """Find silent workers, expire predictions, and remove at most `sweep_entries` entries of dead workers."""
        self._apply(self.fleet.tick(now_s))
        self.prefixes.tick(now_s)
        self.prefixes.sweep(sweep_entries)

    def _take_load(self, key: WorkerKey, report: worker_pb2.LoadReport, now_s: float) -> None:
        try:
            role = role_from_wire(report.role)
        except InvalidRequest:
            return  # a role of a newer release: keep the last report
        self.fleet.loaded(key, load_from_wire(report), role, now_s)

    def _apply(self, changes: list[FleetChange]) -> None:
        for change in changes:
            key = change.worker.key
            if change.change is Change.CONNECT:
                self._connected.add(key)
                self._wires.connect(change.worker)
                continue
            if change.change is Change.LOST:
                self._wires.reset(key)
            elif key in self._connected:
                self._connected.discard(key)
                self.prefixes.leave(key.worker_id)
                self._wires.disconnect(change.worker)
            self._wires.lost(change)
        if changes:
            self._wires.changed()
