"""What carries frames' planes beside their stream, and the choice between it and the stream. Pure.

The *plane channel* of a hand-over is the stream itself ("grpc": planes follow their header), a ring of slots in
memory that both processes map ("shm": the header names a slot), or a paired channel ("gloo": the header names a
transfer). Decode makes ring and channel and offers them in Open; prefill answers in Started.
`transports/shared_memory.py` has the real memory, `paired_transfers.py` the ends of a paired channel: it belongs
to two workers and carries the planes of all their hand-overs. When it fails, frames take the stream again, and those
that were on their way are asked for once more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from ...protos import handover_pb2 as pb

Transport = Literal["grpc", "shm", "gloo"]
GRPC: Transport = "grpc"
SHM: Transport = "shm"
GLOO: Transport = "gloo"

DISTRUSTED = 100  # hand-overs from a peer that use the stream after shared memory gave wrong bytes
MAX_DISTRUSTED = 1024  # peers
WRONG_BYTES = "shared memory gave wrong bytes"
ALL_USED = "all shared memory for hand-overs is in use"


class UnusableMemory(Exception):
    """The offered memory cannot be mapped by this process. The text is the reason, for `explain`."""


class PlaneMemory(Protocol):
    """A ring of slots; slots are numbered from 0, and each holds the planes of one frame."""

    @property
    def slots(self) -> int:
        """Number of slots."""
        ...

    @property
    def slot_bytes(self) -> int:
        """Size of a slot."""
        ...

    def slot(self, index: int) -> memoryview:
        """Writable bytes of a slot. A view keeps the memory mapped, also after `close`."""
        ...

    def close(self) -> None:
        """Give the memory up here; it is unmapped when the last view is gone. Idempotent."""
        ...


class OfferedMemory(PlaneMemory, Protocol):
    """The ring on the side that made it."""

    @property
    def is_gone(self) -> bool:
        """True if it was closed and no view is left, so that this process does not hold its bytes any more."""
        ...

    def offer(self) -> pb.SharedMemory:
        """The message by which the peer finds the memory."""
        ...


OpenMemory = Callable[[pb.SharedMemory], PlaneMemory]
"""Map an offered ring. Raises UnusableMemory."""


class PlaneSlot(NamedTuple):
    """One slot of a ring."""

    number: int
    memory: memoryview


@dataclass(frozen=True, slots=True)
class TransportPolicy:
    """Which plane channels a worker may use."""

    wanted: Literal["auto", "grpc", "shm", "gloo"] = "auto"  # auto: shared memory where both sides can, else gRPC
    is_required: bool = False  # refuse a hand-over that would use less than `wanted`

    @property
    def required(self) -> str:
        """The transport without which a hand-over is refused; empty: any."""
        return self.wanted if self.is_required and self.wanted != "auto" else ""

    @property
    def may_share(self) -> bool:
        """True if planes may go through shared memory."""
        return self.wanted in ("auto", SHM)

    @property
    def may_pair(self) -> bool:
        """True if planes may go through a paired channel that decode offers."""
        return self.wanted in ("auto", GLOO)

    @property
    def offers_pair(self) -> bool:
        """True if this worker, as decode, offers paired channels."""
        return self.wanted == GLOO


Planes = Sequence[bytes | memoryview]
"""Planes of one frame, with the padding between them, in parts."""


class SendingEnd(Protocol):
    """Prefill's end of a paired channel. Called on the loop; returns at once."""

    @property
    def is_open(self) -> bool:
        """True if both ranks have joined and nothing has failed."""
        ...

    def send(self, key: int, planes: Planes, num_bytes: int) -> int | None:
        """Send planes for the hand-over `key`; returns the transfer's number for the frame's header.

        None: the channel is not usable, or its slots are too small; the planes must take the stream.
        """
        ...


class ReceivingEnd(Protocol):
    """Decode's end of a paired channel. Called on the loop; returns at once."""

    @property
    def number(self) -> int:
        """Its number in Open."""
        ...

    @property
    def is_open(self) -> bool:
        """True if both ranks have joined and nothing has failed."""
        ...

    def open_key(self, most: int) -> int:
        """Begin a hand-over that has at most `most` transfers under way; returns its key. `close_key` must follow."""
        ...

    def close_key(self, key: int) -> None:
        """The hand-over is over: what still comes for it is dropped. Idempotent."""
        ...

    def claim(self, key: int, transfer: int, took: Callable[[memoryview | None], None]) -> None:
        """Pass the planes of a transfer to `took` when they are here; None: they will not come, or came before.

        `took` is never called inside this call.
        """
        ...


class PairedPeers(Protocol):
    """The paired channels of one decode worker."""

    def get(self, peer: str) -> ReceivingEnd | None:
        """The open channel to a prefill worker. None: there is none now; one is made beside, if that may help."""
        ...

    def why_none(self, peer: str) -> str:
        """Why `get` gave none."""
        ...

    def when_known(self, peer: str, act: Callable[[], None]) -> None:
        """Call `act` when a channel that is being made is open or has failed; soon, if none is being made."""
        ...


class LentRing:
    """A ring while one hand-over has it."""

    def __init__(self, pool: RingPool, memory: OfferedMemory, peer: str) -> None:
        self.memory = memory
        self._pool = pool
        self._peer = peer
        self._is_back = False

    def give_back(self, *, is_orderly: bool, has_failed: bool = False) -> None:
        """Give the ring back: the hand-over is over, or does not use it. Later calls have no effect.

        `is_orderly`: the peer can have no write under way. `has_failed`: what came through it was wrong.
        """
        if not self._is_back:
            self._is_back = True
            self._pool.take_back(self.memory, self._peer, is_orderly=is_orderly)
            if has_failed:
                self._pool.distrust(self._peer)


class RingPool:
    """The rings of one decode worker: decides which hand-over gets one and which ring is used again.

    A ring serves one hand-over at a time. It is used again, for the same peer only, after the hand-over ended in order:
    then all frames have arrived, and the peer has nothing left to write. After any other end a write of the peer may
    still be under way, so the ring is closed. Its bytes count until its last view is gone. After wrong bytes, the next
    hand-overs from that peer get none: they use the stream.
    """

    def __init__(self, make: Callable[[], OfferedMemory], ring_bytes: int, max_bytes: int) -> None:
        """`make` raises OSError if the system has no memory. `max_bytes` bounds all rings together."""
        self._make = make
        self._max_rings = max_bytes // ring_bytes if ring_bytes else 0
        self._idle: list[tuple[str, OfferedMemory]] = []  # with the peer that knows it; used longest ago first
        self._used: dict[int, OfferedMemory] = {}  # by id()
        self._leaving: list[OfferedMemory] = []  # closed, and perhaps still viewed
        self._distrusted: dict[str, int] = {}  # hand-overs without a ring that a peer has before it

    @property
    def used(self) -> tuple[OfferedMemory, ...]:
        """Rings that hand-overs have now."""
        return tuple(self._used.values())

    @property
    def idle(self) -> tuple[OfferedMemory, ...]:
        """Rings that wait to be used again; used longest ago first."""
        return tuple(ring for _, ring in self._idle)

    @property
    def num_rings(self) -> int:
        """Number of rings whose bytes this process holds."""
        self._leaving = [ring for ring in self._leaving if not ring.is_gone]
        return len(self._idle) + len(self._used) + len(self._leaving)

    def distrust(self, peer: str) -> None:
        """Shared memory with this peer gave wrong bytes: the next DISTRUSTED hand-overs from it get no ring."""
        self._distrusted[peer] = DISTRUSTED
        while len(self._distrusted) > MAX_DISTRUSTED:
            del self._distrusted[next(iter(self._distrusted))]

    def why_none(self, peer: str) -> str:
        """Reason why `take` gives this peer no ring; empty if there never is one: the peer then says so."""
        if not self._max_rings:
            return ""
        return WRONG_BYTES if peer in self._distrusted else ALL_USED

    def take(self, peer: str) -> LentRing | None:
        """A ring for a hand-over from this peer, to be given back.

        None: it is distrusted, or the bound or the system allows no other; `why_none` said which, before the call.
        """
        if peer in self._distrusted:
            self._distrusted[peer] -= 1
            if not self._distrusted[peer]:
                del self._distrusted[peer]
            return None
        known = [place for place, (other, _) in enumerate(self._idle) if other == peer]
        ring = self._idle.pop(known[-1])[1] if known else self._make_one()
        if ring is None:
            return None
        self._used[id(ring)] = ring
        return LentRing(self, ring, peer)

    def take_back(self, ring: OfferedMemory, peer: str, *, is_orderly: bool) -> None:
        """A hand-over is over. `is_orderly`: the peer can have no write under way."""
        del self._used[id(ring)]
        if is_orderly:
            self._idle.append((peer, ring))
        else:
            self._close(ring)

    def close(self) -> None:
        """Close all rings."""
        for ring in (*self.idle, *self.used):
            ring.close()
        self._idle.clear()
        self._max_rings = 0

    def _make_one(self) -> OfferedMemory | None:
        while self._idle and self.num_rings >= self._max_rings:
            self._close(self._idle.pop(0)[1])
        if self.num_rings >= self._max_rings:
            return None
        try:
            return self._make()
        except OSError:
            return None

    def _close(self, ring: OfferedMemory) -> None:
        ring.close()
        self._leaving.append(ring)
