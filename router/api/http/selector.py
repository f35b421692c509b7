"""Event selection in two tiers: many client connections cannot delay the other events of the loop.

asyncio runs every event that is ready before it looks again. Six thousand connections that are closed at once are six
thousand events: for a quarter of a second no stream gets its tokens. Here client connections wait in an epoll of their
own, which takes part as one event; a few of its events are taken at each turn of the loop.

    loop ─ select ─┬─ first tier: wake-ups of other threads, gRPC, listening sockets     all that are ready
                   └─ second tier: HTTP connections                                      MAX_EVENTS per turn

Knows no HTTP. Linux only: elsewhere `TieredLoop` is a plain loop.
"""

from __future__ import annotations

import asyncio
import select
import selectors
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import FileDescriptorLike

MAX_EVENTS = 8  # of the second tier per turn: about 0.3 ms of work
_ENTRIES = 256  # most events of the first tier per turn; the interpreter allocates room for them at each call


class TieredSelector(selectors.BaseSelector):
    """A selector over two epolls. A file descriptor belongs to the first tier unless `demote` named it.

    Within the second tier events are taken in the order in which they became ready (epoll's own order), so each
    connection has its turn.
    """

    def __init__(self) -> None:
        self._first = select.epoll()
        self._second = select.epoll()
        self._first.register(self._second.fileno(), select.EPOLLIN)
        self._keys: dict[int, selectors.SelectorKey] = {}
        self._tiers: dict[int, select.epoll] = {}  # of registered descriptors
        self._demoted: set[int] = set()

    def demote(self, fd: int) -> None:
        """Registrations of this descriptor go to the second tier, until `forget`. Call it before the first."""
        self._demoted.add(fd)

    def forget(self, fd: int) -> None:
        """The descriptor is about to be closed; its number may name another file afterwards."""
        self._demoted.discard(fd)

    def mute(self, fd: int) -> None:
        """Return no events of a registered descriptor until `unmute`."""
        if fd in self._keys:
            self._tiers[fd].modify(fd, 0)

    def unmute(self, fd: int) -> None:
        """Return events of the descriptor again; no effect if it is not registered any more."""
        if fd in self._keys:
            self._tiers[fd].modify(fd, _mask(self._keys[fd].events))

    def register(self, fileobj: FileDescriptorLike, events: int, data: object = None) -> selectors.SelectorKey:
        """Begin to watch `fileobj` for EVENT_READ and/or EVENT_WRITE.

        Raises:
            KeyError: it is registered already.
            ValueError: it is closed.
            OSError: epoll refuses the descriptor.
        """
        fd = self._fd_of(fileobj)
        if fd in self._keys:
            raise KeyError(f"{fileobj!r} (FD {fd}) is already registered")
        tier = self._second if fd in self._demoted else self._first
        tier.register(fd, _mask(events))
        self._tiers[fd] = tier
        key = self._keys[fd] = selectors.SelectorKey(fileobj, fd, events, data)
        return key

    def unregister(self, fileobj: FileDescriptorLike) -> selectors.SelectorKey:
        """Watch `fileobj` no more. It may be closed already.

        Raises:
            KeyError: it is not registered.
            ValueError: it is closed and not registered.
        """
        fd = self._fd_of(fileobj)
        key = self._keys.pop(fd)
        try:
            self._tiers.pop(fd).unregister(fd)
        except OSError:
            pass  # the descriptor was closed before; epoll has removed it by itself
        return key

    def modify(self, fileobj: FileDescriptorLike, events: int, data: object = None) -> selectors.SelectorKey:
        """Change the events or the data of a registration.

        Raises:
            KeyError: it is not registered.
            ValueError: it is closed and not registered.
            OSError: it is closed, or its number names another file now. It is not registered any more.
        """
        fd = self._fd_of(fileobj)
        key = self._keys[fd]
        if events != key.events:
            try:
                self._tiers[fd].modify(fd, _mask(events))
            except OSError:
                del self._keys[fd], self._tiers[fd]  # else the number's next file could never be registered
                raise
        key = self._keys[fd] = key._replace(events=events, data=data)
        return key

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Wait for at most `timeout` seconds (None: for ever) and return (key, events) of what is ready."""
        try:
            ready = self._first.poll(timeout if timeout is None or timeout > 0 else 0, _ENTRIES)
            behind = self._second.fileno()
            if any(fd == behind for fd, _ in ready):
                ready += self._second.poll(0, MAX_EVENTS)
        except InterruptedError:
            return []
        found = []
        for fd, mask in ready:
            key = self._keys.get(fd)
            events = key.events & _events(mask) if key else 0
            if key and events:
                found.append((key, events))
        return found

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        """The registrations by descriptor."""
        return self._keys

    def get_key(self, fileobj: FileDescriptorLike) -> selectors.SelectorKey:
        """The registration of `fileobj`.

        Raises:
            KeyError: it is not registered.
            ValueError: it is closed and not registered.
        """
        return self._keys[self._fd_of(fileobj)]

    def close(self) -> None:
        """Close both epolls."""
        self._first.close()
        self._second.close()
        self._keys.clear()
        self._tiers.clear()

    def _fd_of(self, fileobj: FileDescriptorLike) -> int:
        """The descriptor of `fileobj`: of a closed object the one under which it is registered."""
        fd = fileobj if isinstance(fileobj, int) else fileobj.fileno()
        if fd < 0:
            for key in self._keys.values():
                if key.fileobj is fileobj:
                    return key.fd
            raise ValueError(f"{fileobj!r} is closed")
        return fd


class TieredLoop(asyncio.SelectorEventLoop):
    """The event loop of a router: over two tiers, where the system has epoll."""

    def __init__(self) -> None:
        self.tiers = TieredSelector() if hasattr(select, "epoll") else None
        super().__init__(self.tiers)


def running_tiers() -> TieredSelector | None:
    """The selector of the running loop; None if it is not a loop over two tiers."""
    loop = asyncio.get_running_loop()
    return loop.tiers if isinstance(loop, TieredLoop) else None


def _mask(events: int) -> int:
    reads = select.EPOLLIN if events & selectors.EVENT_READ else 0
    return reads | (select.EPOLLOUT if events & selectors.EVENT_WRITE else 0)


def _events(mask: int) -> int:
    """Events of an epoll mask; an error or a hang-up is both, as in the standard library."""
    reads = selectors.EVENT_READ if mask & ~select.EPOLLOUT else 0
    return reads | (selectors.EVENT_WRITE if mask & ~select.EPOLLIN else 0)
