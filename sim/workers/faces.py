"""A worker's side of a router's session and watch, in virtual time. Knows no engine and no hand-over.

Messages, outbox and watchers are production's (router_session.py, worker/watch.py); streams and timers are ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...core.request import Epoch
from ...decode_worker.outbox import Outbox
from ...decode_worker.router_session import RouterSession
from ...kv.block import IDENTITY_BYTES
from ...kv.messages import epoch_from_wire, epoch_to_wire
from ...protos import worker_pb2
from ..invariants import Violation
from ..network import ECHO_S, End

if TYPE_CHECKING:
    from .node import WorkerNode


class SessionFace:
    """A router's session on the worker: the production session, with our stream and timers."""

    def __init__(self, node: WorkerNode, end: End) -> None:
        self._node = node
        self._end = end
        self._sequence = 0
        self.session = RouterSession(node.service, node.session_timing, node.engine.load)
        self.session.outbox = Outbox(max_message_bytes=node.setting.message_bytes)
        self._heard_s = node.world.now_s()
        self._is_over = False
        self._ended: set[tuple[str, int, Epoch]] = set()
        end.on_message, end.on_end = self.hear, self._over
        end.peer.echo = node.setting.echo
        self._sent_s = node.world.now_s()
        self._beat()

    def hear(self, message: worker_pb2.SessionUp) -> None:
        """Take a message of the router."""
        if self._is_over:
            return
        self._heard_s = self._node.world.now_s()
        if message.HasField("hello"):
            if self._sequence:
                return  # a duplicate
            self.session.greet(message.hello)
            self._node.service.open(self.session)
            self._send(welcome=self._node.info())
        elif self._sequence:
            first = self.session.before(message)
            if first is not None and self._node.worker.confirms:
                self._send(step=first)
            self.session.take(message)
            if message.HasField("submit") and self._node.world.chance(self._node.setting.echo):
                self._hear_of_older(message.submit)
        self.flush()

    def _hear_of_older(self, order: worker_pb2.Submit) -> None:
        """Deliver a late message about an older dispatch of a choice: its order, or its cancel."""
        world, epoch = self._node.world, epoch_to_wire(Epoch(order.epoch.incarnation, order.epoch.counter - 1))
        if world.chance(0.5):
            older = worker_pb2.SessionUp(submit=order)
            older.submit.epoch.CopyFrom(epoch)
        else:
            older = worker_pb2.SessionUp(cancel=worker_pb2.CancelRequest(request_id=order.request_id, epoch=epoch))
        late_s = world.random.random() ** 3 * ECHO_S
        world.after(late_s, self._node.process, lambda: None if self._is_over else self.session.take(older))

    def flush(self) -> None:
        """Send everything that waits."""
        while not self._is_over and (output := self.session.outbox.take()) is not None:
            self._check(output)
            self._send(step=output)

    def _check(self, output: worker_pb2.StepOutput) -> None:
        """Check R1: no tokens of a choice leave after its end."""
        for tokens in output.tokens:
            if (tokens.request_id, tokens.choice, epoch_from_wire(tokens.epoch)) in self._ended:
                raise Violation("R1", f"{tokens.request_id}#{tokens.choice}: tokens leave after the end")
        self._ended.update((end.request_id, end.choice, epoch_from_wire(end.epoch)) for end in output.ends)

    def _send(self, **body: Any) -> None:
        self._sequence += 1
        self._sent_s = self._node.world.now_s()
        self._end.send(worker_pb2.SessionDown(sequence=self._sequence, **body))

    def _beat(self) -> None:
        node = self._node
        if self._is_over:
            return
        now_s = node.world.now_s()
        if now_s - self._heard_s >= node.setting.session_lease.silence_s:
            self._over()
            return
        beat_s = node.setting.session_lease.beat_s
        left_s = self._sent_s + beat_s - now_s
        if left_s <= beat_s * 0.01:
            if self._sequence:
                # As in production, the count of turns shows that the engine's loop is alive.
                self._send(beat=worker_pb2.Beat(phase="idle", steps=node.engine.num_turns))
            left_s = beat_s
        node.world.after(left_s, node.process, self._beat)

    def _over(self) -> None:
        if not self._is_over:
            self._is_over = True
            self._end.abort()
            self._node.sessions.remove(self)
            self._node.service.lose(self.session)


class WatchFace:
    """A router's watch: the production watcher, whose events go out on our stream."""

    def __init__(self, node: WorkerNode, end: End) -> None:
        self.told: set[bytes] = set()  # identities that the router must believe to be held
        self._node = node
        self._end = end
        # Routers hear of no load here: one old report, without those that follow in production, would count for ever.
        known, node.dispatcher.last_load = node.dispatcher.last_load, None
        self._watcher = node.watchers.open()
        node.dispatcher.last_load = known
        end.on_end = self._over

    @property
    def is_up_to_date(self) -> bool:
        """True when every change of the cache that the face knows has been sent."""
        return self._watcher.sequence > 0 and not self._watcher.news.is_set()

    def flush(self) -> None:
        """Send everything that waits."""
        if self._watcher.news.is_set():
            for event in self._node.watchers.events(self._watcher):
                self._remember(event)
                self._end.send(event)

    def _remember(self, event: worker_pb2.WatchEvent) -> None:
        if event.HasField("snapshot"):
            if self._begins:
                self.told.clear()
            self._begins = event.snapshot.last
            self.told.update(_split(event.snapshot.identities))
        else:
            self.told.update(_split(event.delta.stored))
            self.told.difference_update(_split(event.delta.removed))

    _begins = True  # the next piece of a snapshot is its first

    def _over(self) -> None:
        if self in self._node.watches:
            self._node.watches.remove(self)
            self._node.watchers.leave(self._watcher)


def _split(identities: bytes) -> list[bytes]:
    return [identities[i : i + IDENTITY_BYTES] for i in range(0, len(identities), IDENTITY_BYTES)]
