"""All HTTP connections of a server: how many there may be, who makes room, and the recurring look at each."""

from __future__ import annotations

import asyncio
import resource
import ssl
from collections import deque
from collections.abc import Iterable
from typing import Any

from .connection import Connection
from .handshake import Handshake
from .selector import TieredSelector

LOOK_S = 1.0  # between two looks at the same connection
LOOKS_AT_ONCE = 32  # connections that are looked at in one turn of the loop
ACCEPTS_PER_WINDOW = 128  # new connections; more wait in the listening socket's queue
ACCEPT_WINDOW_S = 0.1
HANDSHAKES_PER_WINDOW = 24  # the same with TLS: a handshake takes 1 ms of the event loop
SLOW_HEAD_S = 1.0  # a head that takes longer makes room before an idle connection, which its client may use again
RESERVED_FILES = 256  # of the process, for anything but HTTP connections


def raise_file_limit() -> int:
    """Let this process open as many files as it may; returns how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (ValueError, OSError):  # where the hard limit is "none", some systems still have one
        return soft
    return hard


def connections_within(asked: int, num_files: int) -> int:
    """Connections that a process of `num_files` files accepts: `asked`, if files are left for the rest."""
    if num_files < 0:  # RLIM_INFINITY
        return asked
    return max(1, min(asked, max(num_files - RESERVED_FILES, num_files // 2)))


class Connections:
    """All connections of one server."""

    def __init__(
        self,
        most: int,
        stall_s: float,
        selector: TieredSelector | None = None,
        context: ssl.SSLContext | None = None,
    ) -> None:
        """`stall_s`: how long a client may take nothing of what is written for it. `selector`: the loop's own.

        `context`: every connection begins with TLS; None: without.
        """
        self.stall_s = stall_s
        self._most = most
        self._selector = selector
        self._context = context
        self._looks: deque[tuple[float, Connection]] = deque()  # when each is to be looked at; the next one first
        self._look_timer: asyncio.TimerHandle | None = None
        self._all: set[Connection | Handshake] = set()
        self._idle: dict[Connection | Handshake, None] = {}  # the longest idle one first
        self._heads: dict[
            Connection | Handshake, None
        ] = {}  # in a head, the longest first: one that is in earnest is short
        self._listeners: list[int] = []
        self._num_new = 0  # connections of this window
        self._window_end_s = 0.0

    def __len__(self) -> int:
        return len(self._all)

    def pace(self, listeners: Iterable[int]) -> None:
        """Accept at most `ACCEPTS_PER_WINDOW` connections of these listening sockets in `ACCEPT_WINDOW_S`.

        Opening and closing one takes 0.15 ms of the event loop: thousands at once would slow down all streams.
        """
        self._listeners = list(listeners)

    def protocol(self, **known: Any) -> Connection | Handshake:
        """For `uvicorn.Config(http=...)`: the protocol of a new connection."""
        self._count_new(asyncio.get_running_loop())
        connection = Connection(self, **known)
        return connection if self._context is None else Handshake(self, connection, self._context)

    def close_handshakes(self) -> None:
        """Close the connections that are in their handshakes: the server under them does not know them yet."""
        for each in [each for each in self._all if isinstance(each, Handshake)]:
            each.give_up()

    def _count_new(self, loop: asyncio.AbstractEventLoop) -> None:
        now_s = loop.time()
        if now_s >= self._window_end_s:
            self._num_new, self._window_end_s = 0, now_s + ACCEPT_WINDOW_S
        self._num_new += 1
        most = ACCEPTS_PER_WINDOW if self._context is None else HANDSHAKES_PER_WINDOW
        if self._num_new == most and self._selector is not None and self._listeners:
            for fd in self._listeners:
                self._selector.mute(fd)
            loop.call_at(self._window_end_s, self._listen_again)

    def _listen_again(self) -> None:
        assert self._selector is not None
        for fd in self._listeners:
            self._selector.unmute(fd)

    def add(self, connection: Connection | Handshake) -> bool:
        """A new connection; another makes room for it. False: there is no room, and all have whole requests."""
        if len(self._all) >= self._most:
            victim = self._victim()
            if victim is None:
                return False
            victim.give_up()
        self._all.add(connection)
        self._idle[connection] = None
        return True

    def _victim(self) -> Connection | Handshake | None:
        """The connection that makes room: the longest slow head, the longest idle one, or the longest head."""
        head = next(iter(self._heads), None)
        if head is not None and head.age_s > SLOW_HEAD_S:
            return head
        return next(iter(self._idle), head)

    def demote(self, transport: asyncio.Transport) -> None:
        """Events of a new connection wait behind those of the router's own work."""
        if self._selector is not None:
            self._selector.demote(transport.get_extra_info("socket").fileno())

    def forget(self, transport: asyncio.Transport) -> None:
        """The connection's socket is about to be closed."""
        if self._selector is not None:
            self._selector.forget(transport.get_extra_info("socket").fileno())

    def forget_number(self, number: int) -> None:
        """The same, by the number of the socket, where the transport does not know it any more."""
        if self._selector is not None:
            self._selector.forget(number)

    def look_later(self, connection: Connection, loop: asyncio.AbstractEventLoop) -> None:
        """Look at the connection in `LOOK_S`. One timer looks at all, some at a time: they may be thousands."""
        self._looks.append((loop.time() + LOOK_S, connection))
        if self._look_timer is None:
            self._look_timer = loop.call_later(LOOK_S, self._look, loop)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        now_s = loop.time()
        try:
            for _ in range(min(LOOKS_AT_ONCE, len(self._looks))):
                due_s, connection = self._looks[0]
                if due_s > now_s:
                    break
                self._looks.popleft()
                if not connection.is_lost:
                    self.look_later(connection, loop)
                    connection.look(now_s)
        finally:  # also if a look raised: without the timer no connection would ever be looked at again
            self._look_timer = loop.call_at(self._looks[0][0], self._look, loop) if self._looks else None

    def note_idle(self, connection: Connection | Handshake) -> None:
        """A connection begins to be idle."""
        self.note_busy(connection)
        if connection in self._all:
            self._idle[connection] = None

    def note_head(self, connection: Connection | Handshake) -> None:
        """A head begins on a connection that has no other request."""
        self.note_busy(connection)
        if connection in self._all:
            self._heads[connection] = None

    def note_busy(self, connection: Connection | Handshake) -> None:
        """A request is here."""
        self._idle.pop(connection, None)
        self._heads.pop(connection, None)

    def remove(self, connection: Connection | Handshake) -> None:
        """A connection that is gone."""
        self._all.discard(connection)
        self.note_busy(connection)
