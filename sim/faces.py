"""What a router has of a worker in virtual time: its session and its watch. Knows no engine and no hand-over.

The session's words and its outbox are production's (decode_worker/session.py); streams and timers are ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..decode_worker.outbox import Outbox
from ..decode_worker.session import Session
from ..model import link
from ..protos import worker_pb2
from .network import End
from .world import Timer

if TYPE_CHECKING:
    from .workers import WorkerNode


class SessionFace:
    """A router's session on the worker: the production session's words, with our stream and timers."""

    def __init__(self, node: WorkerNode, end: End) -> None:
        self._node = node
        self._end = end
        self._sequence = 0
        self.session = Session(node.service, node.session_timing, node.engine.load)
        self.session.outbox = Outbox(max_message_bytes=node.setting.message_bytes)
        self._heard_s = node.world.now_s()
        self._is_over = False
        self._flush_due: Timer | None = None
        end.on_message, end.on_end = self.hear, self._over
        self._sent_s = node.world.now_s()
        self._beat()

    def hear(self, message: worker_pb2.SessionUp) -> None:
        """A word of the router."""
        if self._is_over:
            return
        self._heard_s = self._node.world.now_s()
        if message.HasField("hello"):
            if self._sequence:
                return  # said twice
            self.session.greet(message.hello)
            self._node.service.open(self.session)
            self._send(welcome=self._node.info())
        elif self._sequence:
            self.session.take(message)
        self.flush()

    def flush(self) -> None:
        """Everything that waits leaves."""
        while not self._is_over and (output := self.session.outbox.take()) is not None:
            self._send(step=output)

    def _send(self, **body: Any) -> None:
        self._sequence += 1
        self._sent_s = self._node.world.now_s()
        self._end.send(worker_pb2.SessionDown(sequence=self._sequence, **body))

    def _beat(self) -> None:
        node = self._node
        if self._is_over:
            return
        now_s = node.world.now_s()
        if now_s - self._heard_s >= node.setting.session_silence_s:
            self._over()
            return
        if now_s - self._sent_s >= node.setting.session_beat_s * 0.99 and self._sequence:
            # As production's engine counts: a loop that turns is alive.
            self._send(beat=worker_pb2.Beat(phase="idle", steps=node.engine.num_turns))
        node.world.after(node.setting.session_beat_s, node.process, self._beat)

    def _over(self) -> None:
        if not self._is_over:
            self._is_over = True
            self._end.abort()
            self._node.sessions.remove(self)
            self._node.service.lose(self.session)


class WatchFace:
    """A router's watch: a snapshot in pieces, then numbered deltas, and load reports between."""

    def __init__(self, node: WorkerNode, end: End) -> None:
        self._node = node
        self._end = end
        self._sequence = 0
        self._has_snapshot = False
        end.on_end = self._over
        node.dispatcher.ask_snapshot()

    def hear_cache(self, event: link.CacheDelta | link.CacheSnapshot) -> None:
        """News of the prefix cache."""
        if isinstance(event, link.CacheDelta):
            if self._has_snapshot:
                delta = worker_pb2.BlocksDelta(stored=b"".join(event.stored), removed=b"".join(event.removed))
                self._send(delta=delta)
            return
        self._has_snapshot = True
        identities = event.identities
        pieces = [identities[i : i + 3] for i in range(0, len(identities), 3)] or [()]
        for piece in pieces:
            is_last = piece is pieces[-1]
            self._send(snapshot=worker_pb2.BlocksSnapshot(identities=b"".join(piece), last=is_last))

    def _send(self, **body: Any) -> None:
        self._sequence += 1
        self._end.send(worker_pb2.WatchEvent(incarnation=self._node.process.life, sequence=self._sequence, **body))

    def _over(self) -> None:
        if self in self._node.watches:
            self._node.watches.remove(self)
