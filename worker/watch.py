"""Worker.Watch: prefix cache events and load reports as one numbered, bounded stream per router. Knows no request."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from ..core.request import Role
from ..engine.link.client import EngineClient
from ..engine.link.messages import CacheDelta, CacheSnapshot, LoadNews
from ..kv.cache.reach import EVERYWHERE, Reach, bits_of
from ..kv.messages import role_to_wire
from ..protos import common_pb2, worker_pb2

PIECE_IDENTITIES = 16_384  # 256 KiB of a snapshot per message
MAX_PENDING_IDENTITIES = 65_536  # in deltas kept for one watcher; with more, a new snapshot is cheaper


@dataclass(slots=True)
class FaceLoad:
    """Facts of the face that are added to the engine's load report."""

    role: Role
    draining: bool = False
    handover_bytes_per_s: float = 0.0
    gpus: tuple[common_pb2.GpuState, ...] = ()


class Watchers:
    """All routers that watch this worker. They share snapshot requests if possible."""

    def __init__(
        self,
        dispatcher: EngineClient,
        incarnation: int,
        face: Callable[[], FaceLoad],
        counters: Counter[str],
        *,
        reach: Reach = EVERYWHERE,
        max_pending: int = MAX_PENDING_IDENTITIES,
        piece_identities: int = PIECE_IDENTITIES,
    ) -> None:
        """`reach`: where matches of this worker's cache end."""
        self._dispatcher = dispatcher
        self._incarnation = incarnation
        self._face = face
        self._counters = counters
        self._reach = reach
        self._max_pending = max_pending
        self._piece_identities = piece_identities
        self._open: dict[Watcher, None] = {}  # in the order they came
        dispatcher.on_cache(self._on_cache)
        dispatcher.on_load(self._on_load)

    def __len__(self) -> int:
        return len(self._open)

    async def watch(self) -> AsyncIterator[worker_pb2.WatchEvent]:
        """Yield a snapshot, then deltas and load reports, until the reader leaves.

        A snapshot that follows deltas replaces everything before it; it is sent when a watcher reads too slowly.
        """
        watcher = self.open()
        try:
            while True:
                await watcher.news.wait()
                for event in self.events(watcher):
                    yield event
        finally:
            self.leave(watcher)

    def open(self) -> Watcher:
        """Add a watcher; `leave` must follow."""
        watcher = Watcher(self._max_pending)
        self._open[watcher] = None
        if self._dispatcher.last_load is not None:
            watcher.hear_load(self._dispatcher.last_load)
        self._dispatcher.ask_snapshot()
        return watcher

    def leave(self, watcher: Watcher) -> None:
        """Remove a watcher."""
        self._open.pop(watcher, None)

    def events(self, watcher: Watcher) -> list[worker_pb2.WatchEvent]:
        """All waiting events of a watcher, in order and numbered; the newest load report last."""
        if watcher.lost_count:
            watcher.await_snapshot()
            self._counters["watch_resyncs"] += 1
            self._dispatcher.ask_snapshot()
        snapshot, deltas, load = watcher.take()
        events = []
        if snapshot is not None:
            events += [worker_pb2.WatchEvent(snapshot=piece) for piece in self._pieces(snapshot)]
        for delta in deltas:
            message = worker_pb2.BlocksDelta(
                stored=b"".join(delta.stored),
                removed=b"".join(delta.removed),
                lacking=bits_of(delta.stored, frozenset(delta.lacking)),
            )
            events.append(worker_pb2.WatchEvent(delta=message))
        if load is not None:
            events.append(worker_pb2.WatchEvent(load=self.report(load)))
        for event in events:
            watcher.sequence += event.HasField("load") is False
            event.incarnation, event.sequence = self._incarnation, watcher.sequence
        return events

    def report(self, load: LoadNews) -> worker_pb2.LoadReport:
        """Load report from the engine's beat and the facts of the face."""
        face = self._face()
        counters = Counter(dict(load.counters))
        counters.update(self._counters)
        return worker_pb2.LoadReport(
            role=role_to_wire(face.role),
            waiting=load.waiting,
            running=load.running,
            queued_prefill_tokens=load.queued_prefill_tokens,
            queued_prefill_pairs=load.queued_prefill_pairs,
            running_context_tokens=load.running_context_tokens,
            free_blocks=load.free_blocks,
            cached_blocks=load.cached_blocks,
            promised_blocks=load.promised_blocks,
            total_blocks=load.total_blocks,
            phase=load.phase,
            steps=load.steps,
            draining=face.draining,
            prefill_ms_per_token=load.prefill_ms_per_token,
            prefill_ms_per_token_pair=load.prefill_ms_per_token_pair,
            decode_step_ms=load.decode_step_ms,
            handover_bytes_per_s=face.handover_bytes_per_s,
            counters=dict(counters),
            gpus=face.gpus,
            spreads={name: worker_pb2.Spread(counts=s.counts, total=s.total) for name, s in load.spreads},
        )

    def _pieces(self, snapshot: CacheSnapshot) -> list[worker_pb2.BlocksSnapshot]:
        identities, size, lacking = snapshot.identities, self._piece_identities, frozenset(snapshot.lacking)
        parts = [identities[first : first + size] for first in range(0, max(1, len(identities)), size)]
        pieces = [
            worker_pb2.BlocksSnapshot(
                identities=b"".join(part),
                lacking=bits_of(part, lacking),
                block_tokens=self._reach.block_tokens,
                window_tokens=self._reach.window_tokens,
            )
            for part in parts
        ]
        pieces[-1].last = True
        return pieces

    def _on_cache(self, event: CacheDelta | CacheSnapshot) -> None:
        for watcher in self._open:
            watcher.hear_cache(event)

    def _on_load(self, load: LoadNews) -> None:
        for watcher in self._open:
            watcher.hear_load(load)


class Watcher:
    """Events that one router has not been sent yet."""

    def __init__(self, max_pending: int) -> None:
        self._max_pending = max_pending
        self._snapshot: CacheSnapshot | None = None
        self._known: int | None = (
            None  # number of the last delta (or snapshot) that was accepted; None: no snapshot yet
        )
        self._deltas: deque[CacheDelta] = deque()
        self._load: LoadNews | None = None
        self._num_pending = 0
        self.lost_count = False
        self.sequence = 0  # number of the last cache event; load reports repeat it
        self.news = asyncio.Event()

    def await_snapshot(self) -> None:
        """Drop all waiting cache events; the next one must be a snapshot."""
        self._snapshot, self._known, self._num_pending, self.lost_count = None, None, 0, False
        self._deltas.clear()

    def hear_cache(self, event: CacheDelta | CacheSnapshot) -> None:
        """Add a change of the cache, in order, up to the bound."""
        if isinstance(event, CacheSnapshot):
            if self._known is not None and event.sequence <= self._known:
                return  # another watcher asked for this snapshot, and it has nothing new for us
            self.await_snapshot()  # whatever waits is older
            self._snapshot, self._known = event, event.sequence
        elif self._known is None or self.lost_count or event.sequence <= self._known:
            return
        elif event.sequence != self._known + 1 or self._num_pending > self._max_pending:
            self.lost_count = True
        else:
            self._known = event.sequence
            self._deltas.append(event)
            self._num_pending += len(event.stored) + len(event.removed)
        self.news.set()

    def hear_load(self, load: LoadNews) -> None:
        """Replace the waiting load report."""
        self._load = load
        self.news.set()

    def take(self) -> tuple[CacheSnapshot | None, list[CacheDelta], LoadNews | None]:
        """Take all waiting events: snapshot, deltas, load report."""
        taken = self._snapshot, list(self._deltas), self._load
        self._snapshot, self._load, self._num_pending = None, None, 0
        self._deltas.clear()
        self.news.clear()
        return taken
