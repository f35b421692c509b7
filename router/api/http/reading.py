"""Room for messages that are being read: a budget of bytes, who waits for a part of it, and who stays too long.

How long a message is, gRPC tells when all of it is here. So a read takes as much as a message may have, and gives back
what it did not need; until then no more than a stream's first window is taken from the client.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from ....core.errors import DeadlineExceeded, Overloaded
from ...config import RouterConfig

T = TypeVar("T")

READ_S = 30.0  # within which a message must be here
CONTENDED_READ_S = 1.0  # the same while others wait for room
WAIT_S = 10.0  # for room
MAX_WAITING = 512
INLINE_BYTES = 2048  # smaller messages are looked through on the event loop: less than a millisecond


class Lease:
    """A part of the room. Whoever has it gives it back, once or more often."""

    def __init__(self, room: Room, tenant: str, size_bytes: int) -> None:
        self.tenant = tenant
        self.size_bytes = size_bytes
        self.since_s = 0.0  # when its read began
        self.reading: asyncio.Timeout | None = None
        self._room = room

    def shrink(self, size_bytes: int) -> None:
        """The message is here and has so many bytes."""
        self._room.give_back(self, self.size_bytes - size_bytes)

    def give_back(self) -> None:
        """The message is not needed any more."""
        self.shrink(0)


class Room:
    """The budget of one router. Leases are given in the order of asking; no tenant of several gets more than half."""

    def __init__(self, size_bytes: int, *, one_tenant: bool) -> None:
        self._free_bytes = size_bytes
        self._most_bytes = size_bytes if one_tenant else size_bytes // 2
        self._used_bytes: Counter[str] = Counter()
        self._leases: set[Lease] = set()
        self._waiting: deque[tuple[Lease, asyncio.Future[None]]] = deque()

    @property
    def free_bytes(self) -> int:
        """What nobody has."""
        return self._free_bytes

    async def take(self, tenant: str, size_bytes: int) -> Lease:
        """A lease, as soon as there is room.

        Raises:
            Overloaded: there is none in time, or too many wait already.
        """
        loop = asyncio.get_running_loop()
        lease = Lease(self, tenant, size_bytes)
        if self._fits(lease) and not any(other.tenant == tenant for other, _ in self._waiting):
            self._give(lease)
            return lease
        if len(self._waiting) >= MAX_WAITING:
            raise Overloaded(f"{MAX_WAITING} messages wait to be read, the most that may", retry_after_s=1.0)
        turn: asyncio.Future[None] = loop.create_future()
        self._waiting.append((lease, turn))
        self._hurry(loop.time())
        try:
            async with asyncio.timeout(WAIT_S):
                await turn
        except BaseException as error:
            self._waiting = deque(pair for pair in self._waiting if pair[0] is not lease)
            lease.give_back()  # its turn may have come in the same moment
            if isinstance(error, TimeoutError):
                raise Overloaded(f"no room to read the message within {WAIT_S:g} s", retry_after_s=1.0) from None
            raise
        return lease

    async def read(self, lease: Lease, receive: Callable[[], Awaitable[T]], patience_s: float | None = None) -> T:
        """What `receive` returns: the message of a lease, in `patience_s` (`READ_S`), less where others wait for room.

        Raises:
            DeadlineExceeded: it was not here in time.
        """
        loop = asyncio.get_running_loop()
        lease.since_s = loop.time()
        try:
            async with asyncio.timeout(CONTENDED_READ_S if self._waiting else patience_s or READ_S) as lease.reading:
                return await receive()
        except TimeoutError:
            waited_s = loop.time() - lease.since_s
            raise DeadlineExceeded(f"the message was not here within {waited_s:.3g} s", retry_after_s=1.0) from None
        finally:
            lease.reading = None

    def give_back(self, lease: Lease, size_bytes: int) -> None:
        """For leases: so much is not needed any more."""
        if lease not in self._leases:
            return
        self._free_bytes += size_bytes
        self._used_bytes[lease.tenant] -= size_bytes
        lease.size_bytes -= size_bytes
        if not lease.size_bytes:
            self._leases.discard(lease)
            if not self._used_bytes[lease.tenant]:
                del self._used_bytes[lease.tenant]
        self._admit()

    def _fits(self, lease: Lease) -> bool:
        used = self._used_bytes.get(lease.tenant, 0)
        is_within = not used or used + lease.size_bytes <= self._most_bytes  # one message always is
        return is_within and lease.size_bytes <= self._free_bytes

    def _give(self, lease: Lease) -> None:
        self._free_bytes -= lease.size_bytes
        self._used_bytes[lease.tenant] += lease.size_bytes
        self._leases.add(lease)

    def _admit(self) -> None:
        """Let in who waited longest and fits; one tenant's part that is used up keeps no other one waiting."""
        for lease, turn in list(self._waiting):
            if not turn.done() and self._fits(lease):
                self._give(lease)
                turn.set_result(None)
        self._waiting = deque(pair for pair in self._waiting if not pair[1].done())

    def _hurry(self, now_s: float) -> None:
        """Somebody waits: whoever has read for long ends."""
        for lease in self._leases:
            if lease.reading is not None and not lease.reading.expired():
                soon_s = max(now_s, lease.since_s + CONTENDED_READ_S)
                when_s = lease.reading.when()
                if when_s is None or soon_s < when_s:
                    lease.reading.reschedule(soon_s)


def room_of(config: RouterConfig) -> Room:
    """The room of one router, for the messages of both faces: at least a packed body and what it becomes."""
    return Room(max(config.max_bodies_bytes, 2 * config.max_body_bytes), one_tenant=False)


class Workbench:
    """One thread for work on long messages, so that several of them never hold the interpreter back to back."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "messages")

    async def run(self, size_bytes: int, work: Callable[[], T]) -> T:
        """The result of `work` on a message of this length: at once where that is quick."""
        if size_bytes <= INLINE_BYTES:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def close(self) -> None:
        """Take no more work."""
        self._thread.shutdown(wait=False, cancel_futures=True)
