"""Shared memory of hand-overs in the simulator: rings in one address space, found by their nonce.

Slots are plain memory: a write that comes late changes what another hand-over reads, as in production.
"""

from __future__ import annotations

from weakref import ref

from ..kv.handover.plane_channel import UnusableMemory
from ..protos import handover_pb2
from .invariants import Violation

MAX_RINGS = (0, 1, 2, 8)  # of a decode worker


class SimRing:
    """One ring, on either side."""

    def __init__(self, host: Host, slots: int, slot_bytes: int) -> None:
        self.slots = slots
        self.slot_bytes = slot_bytes
        self.is_gone = False
        self._nonce = host.add(self)
        self._memory = memoryview(bytearray(slots * slot_bytes))
        self._peers_views: list[ref[memoryview]] = []  # of the peer's reads that may still write

    def slot(self, index: int) -> memoryview:
        """Implements `PlaneMemory.slot`."""
        assert 0 <= index < self.slots, index
        return self._memory[index * self.slot_bytes : (index + 1) * self.slot_bytes]

    def offer(self) -> handover_pb2.SharedMemory:
        """Implements `OfferedMemory.offer`. Checks K3: no write of an earlier hand-over is under way."""
        if any(view() is not None for view in self._peers_views):
            raise Violation("K3", "a ring is lent again while a peer may still write into it")
        self._peers_views.clear()
        return handover_pb2.SharedMemory(nonce=self._nonce, slots=self.slots, slot_bytes=self.slot_bytes)

    def mapped_slot(self, index: int) -> memoryview:
        """The same for the peer."""
        view = self.slot(index)
        self._peers_views.append(ref(view))
        return view

    def close(self) -> None:
        """Implements `OfferedMemory.close`. Writers that have mapped it can still reach the memory."""
        self.is_gone = True


class MappedRing:
    """A peer's ring, as the prefill worker maps it."""

    def __init__(self, ring: SimRing) -> None:
        self.slots = ring.slots
        self.slot_bytes = ring.slot_bytes
        self.slot = ring.mapped_slot

    def close(self) -> None:
        """Implements `PlaneMemory.close`."""


class Host:
    """All rings of the simulated machine."""

    def __init__(self, *, is_shared: bool) -> None:
        """`is_shared`: False puts every worker on a host of its own, so that none can map another's memory."""
        self._is_shared = is_shared
        self._rings: dict[bytes, SimRing] = {}

    def add(self, ring: SimRing) -> bytes:
        """Add a ring; returns its nonce."""
        nonce = len(self._rings).to_bytes(16, "little")
        self._rings[nonce] = ring
        return nonce

    def open(self, offer: handover_pb2.SharedMemory) -> MappedRing:
        """Implements `OpenMemory`."""
        ring = self._rings.get(offer.nonce)
        if not self._is_shared or ring is None or ring.is_gone:
            raise UnusableMemory("another host")
        return MappedRing(ring)
