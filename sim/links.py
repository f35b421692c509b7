"""A router's connections to one life of one worker in virtual time: router/workers/links.py without an event loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..protos import worker_pb2
from ..router.routing.facts import WorkerKey
from .network import End

if TYPE_CHECKING:
    from .router import RouterNode

RECONNECT_S = 0.05


class Link:
    """Session and watch to one life of one worker, opened again after a break, as in router/workers/links.py."""

    def __init__(self, router: RouterNode, key: WorkerKey) -> None:
        self.key = key
        self.is_up = False
        self.is_closed = False
        self.watch: End | None = None
        self._router = router
        self._session: End | None = None
        self._sequence = 0
        self._open_session()
        self._open_watch()
        self._beat()

    @property
    def session(self) -> End | None:
        """The router's end of the session, if it is up."""
        return self._session if self.is_up else None

    def send(self, **body: Any) -> bool:
        """Send an order or a cancel. False: the session is down."""
        if not self.is_up:
            return False
        self._say(**body)
        return True

    def reset(self) -> None:
        """Break the session; it is opened again later."""
        if self._session is not None:
            self._session.abort()
            self._lost("reset")

    def close(self) -> None:
        """Close session and watch for good."""
        self.is_closed = True
        self.is_up = False
        for end in (self._session, self.watch):
            if end is not None:
                end.abort()

    # ------------------------------------------------------------------ inside

    def _connect(self, what: str) -> End:
        router = self._router
        node = router.find(self.key.worker_id)
        near, far = router.network.connect(router.process, node.process, f"{what}>{self.key.worker_id}")
        far.on_message = lambda message: node.accept(far, message)
        return near

    def _open_session(self) -> None:
        if self.is_closed:
            return
        end = self._session = self._connect("session")
        end.on_message, end.on_end = self._hear, lambda: self._lost("broke")
        self._sequence = 0
        hello = worker_pb2.SessionHello(
            router_id=self._router.process.name, router_incarnation=self._router.incarnation
        )
        self._say(hello=hello)
        # The first message may be lost, or never be answered.
        self._router.after(self._router.setting.session_lease.silence_s, lambda: self._give_up(end))

    def _give_up(self, end: End) -> None:
        if self._session is end and not self.is_up and not self.is_closed:
            self.reset()

    def _say(self, **body: Any) -> None:
        assert self._session is not None
        self._sequence += 1
        self._session.send(worker_pb2.SessionUp(sequence=self._sequence, **body))

    def _beat(self) -> None:
        if not self.is_closed:
            if self.is_up:
                self._say(beat=worker_pb2.Beat())
            self._router.after(self._router.setting.session_lease.beat_s, self._beat)

    def _hear(self, message: worker_pb2.SessionDown) -> None:
        body = message.WhichOneof("body")
        if not self.is_up:
            if body != "welcome" or message.welcome.incarnation != self.key.incarnation:
                self.reset()
                return
            self.is_up = True
            self._router.roster.session_up(self.key, None, self._router.world.now_s())
            return
        self._router.hear(self.key, message)

    def _lost(self, reason: str) -> None:
        was_up, self.is_up, self._session = self.is_up, False, None
        if was_up:
            self._router.roster.session_down(self.key, reason, self._router.world.now_s())
        self._router.after(RECONNECT_S, self._open_session_again)

    def _open_session_again(self) -> None:
        if self._session is None:
            self._open_session()

    def _open_watch(self) -> None:
        if self.is_closed:
            return
        end = self.watch = self._connect("watch")
        self._router.roster.watching(self.key)

        def hear(event: worker_pb2.WatchEvent) -> None:
            if self.watch is not end:
                return
            if not self._router.roster.take_event(self.key, event, self._router.world.now_s()):
                end.abort()
                again()

        def again() -> None:
            if self.watch is end:
                self.watch = None
                self._router.after(RECONNECT_S, self._open_watch)

        end.on_message, end.on_end = hear, again
        end.send(worker_pb2.WatchRequest(router_id=self._router.process.name))
