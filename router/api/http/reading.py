"""Room for messages that are being read: a budget of bytes, with a waiting queue and deadlines.

gRPC reports the length of a message only after all of it has arrived. So a read takes room for the longest message and
gives the unused part back; until it has room, only a stream's first window is received from the client.
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

READ_S = 30.0  # longest time to receive a message
CONTENDED_READ_S = 1.0  # the same, while other messages wait for room
WAIT_S = 10.0  # longest wait for room
MAX_WAITING = 128  # each holds up to 128 KiB that the server has received
INLINE_BYTES = 2048  # smaller messages are parsed on the event loop, which takes less than a millisecond


class Lease:
    """A part of the room. Its owner must give it back; repeated calls have no effect."""

    def __init__(self, room: Room, tenant: str, size_bytes: int) -> None:
        self.tenant = tenant
        self.size_bytes = size_bytes
        self.since_s = 0.0  # when its read began
        self.reading: asyncio.Timeout | None = None
        self._room = room

    def shrink(self, size_bytes: int) -> None:
        """Reduce the lease to the bytes of the received message."""
        self._room.give_back(self, self.size_bytes - size_bytes)

    def give_back(self) -> None:
        """End the lease: the message is no longer needed."""
        self.shrink(0)


class Room:
    """The budget of one router. Leases are given in order of request; of several tenants none gets more than half."""

    def __init__(self, size_bytes: int, *, one_tenant: bool) -> None:
        self._free_bytes = size_bytes
        self._most_bytes = size_bytes if one_tenant else size_bytes // 2
        self._used_bytes: Counter[str] = Counter()
        self._leases: set[Lease] = set()
        self._waiting: deque[tuple[Lease, asyncio.Future[None]]] = deque()

    @property
    def free_bytes(self) -> int:
        """Bytes without a lease."""
        return self._free_bytes

    async def take(self, tenant: str, size_bytes: int) -> Lease:
        """Wait for a lease.

        Raises:
            Overloaded: there was no room in time, or too many wait already.
        """
        loop = asyncio.get_running_loop()
        lease = Lease(self, tenant, size_bytes)
        if self._fits(lease) and not any(one.tenant == tenant or self._is_within(one) for one, _ in self._waiting):
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
            lease.give_back()  # it may have been given at the same time
            self._admit()  # those behind it
            if isinstance(error, TimeoutError):
                raise Overloaded(f"no room to read the message within {WAIT_S:g} s", retry_after_s=1.0) from None
            raise
        return lease

    async def read(self, lease: Lease, receive: Callable[[], Awaitable[T]], patience_s: float | None = None) -> T:
        """Receive the message of a lease within `patience_s` (default `READ_S`), or less while others wait for room.

        Raises:
            DeadlineExceeded: the message did not arrive in time.
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
        """Free a part of a lease; called by leases."""
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

    def _is_within(self, lease: Lease) -> bool:
        """Whether its tenant may have it: one message per tenant is always allowed."""
        used = self._used_bytes.get(lease.tenant, 0)
        return not used or used + lease.size_bytes <= self._most_bytes

    def _fits(self, lease: Lease) -> bool:
        return self._is_within(lease) and lease.size_bytes <= self._free_bytes

    def _give(self, lease: Lease) -> None:
        self._free_bytes -= lease.size_bytes
        self._used_bytes[lease.tenant] += lease.size_bytes
        self._leases.add(lease)

    def _admit(self) -> None:
        """Give leases to waiting messages that fit, in order.

        A tenant at its limit does not block other tenants. A long message keeps shorter ones behind it from taking the
        room that it waits for: else two tenants with many short ones could keep a third from being read.
        """
        for lease, turn in list(self._waiting):
            if not turn.done() and self._is_within(lease):
                if lease.size_bytes > self._free_bytes:
                    break
                self._give(lease)
                turn.set_result(None)
        self._waiting = deque(pair for pair in self._waiting if not pair[1].done())

    def _hurry(self, now_s: float) -> None:
        """A message waits for room: shorten the deadlines of running reads."""
        for lease in self._leases:
            if lease.reading is not None and not lease.reading.expired():
                soon_s = max(now_s, lease.since_s + CONTENDED_READ_S)
                when_s = lease.reading.when()
                if when_s is None or soon_s < when_s:
                    lease.reading.reschedule(soon_s)


def room_of(config: RouterConfig) -> Room:
    """The room of one router, for the messages of both APIs: at least a packed and an unpacked body."""
    return Room(max(config.max_bodies_bytes, 2 * config.max_body_bytes), one_tenant=False)


class Workbench:
    """One thread for work on long messages, so that they do not hold the interpreter one after the other."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "messages")

    async def run(self, size_bytes: int, work: Callable[[], T]) -> T:
        """Run `work` on a message of this length: small ones at once, others in the thread."""
        if size_bytes <= INLINE_BYTES:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def close(self) -> None:
        """Take no more work."""
        self._thread.shutdown(wait=False, cancel_futures=True)
