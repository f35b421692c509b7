"""Shared memory for planes between two processes of one host. Knows no message but the offer, no stream and no state.

    page 0: nonce, then zeros | slot 0 | slot 1 | …

Decode makes the memory (memfd_create: it has no name in any file system) and prefill opens it through
/proc/PID/fd/DESCRIPTOR, which the system allows to the same user in the same PID namespace. It is sealed against
resizing, so that no access can fail. It is gone when both processes have unmapped it or ended, also by kill -9.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import mmap
import os
import secrets
import stat
import weakref
from pathlib import Path

from ....protos import handover_pb2 as pb
from ..plane_channel import UnusableMemory

NAME = "twostroke-planes"
HEAD_BYTES = mmap.PAGESIZE
NONCE_BYTES = 16
MAX_SLOTS = 256  # upper bound of cache.frame_slots
MAX_SLOT_BYTES = 64 << 20

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_PID_NAMESPACE = Path("/proc/self/ns/pid")


@functools.cache
def host_identity() -> bytes:
    """Name of this boot and PID namespace, 16 bytes; empty if the system does not tell, or has no memfd."""
    if not hasattr(os, "memfd_create"):
        return b""
    try:
        named = _BOOT.read_text().strip() + os.readlink(_PID_NAMESPACE)
    except OSError:
        return b""
    return hashlib.blake2b(named.encode(), digest_size=16).digest()


class SharedRing:
    """One mapped ring."""

    def __init__(self, descriptor: int, slots: int, slot_bytes: int) -> None:
        self.slots = slots
        self.slot_bytes = slot_bytes
        memory = mmap.mmap(descriptor, ring_bytes(slots, slot_bytes))
        self._memory: memoryview | None = memoryview(memory)
        self._mapping = weakref.ref(memory)

    @property
    def nonce(self) -> bytes:
        """The nonce at the start of the memory."""
        assert self._memory is not None, "closed"
        return bytes(self._memory[:NONCE_BYTES])

    @property
    def is_gone(self) -> bool:
        """Implements `OfferedMemory.is_gone`."""
        return self._mapping() is None

    def slot(self, index: int) -> memoryview:
        """Implements `PlaneMemory.slot`."""
        assert self._memory is not None, "closed"
        assert 0 <= index < self.slots, index
        start = HEAD_BYTES + index * self.slot_bytes
        return self._memory[start : start + self.slot_bytes]

    def close(self) -> None:
        """Implements `PlaneMemory.close`."""
        self._memory = None


class OwnRing(SharedRing):
    """A ring that this process made."""

    def __init__(self, slots: int, slot_bytes: int) -> None:
        """Make and seal the memory. Pages take memory when they are first written.

        Raises:
            OSError: the system has no descriptor or memory left.
        """
        slot_bytes += -slot_bytes % mmap.PAGESIZE
        self._descriptor = os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self._descriptor, ring_bytes(slots, slot_bytes))
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            fcntl.fcntl(self._descriptor, fcntl.F_ADD_SEALS, seals)
            super().__init__(self._descriptor, slots, slot_bytes)
        except BaseException:
            os.close(self._descriptor)
            raise
        assert self._memory is not None
        self._memory[:NONCE_BYTES] = secrets.token_bytes(NONCE_BYTES)

    def offer(self) -> pb.SharedMemory:
        """Implements `OfferedMemory.offer`."""
        return pb.SharedMemory(
            host=host_identity(),
            pid=os.getpid(),
            descriptor=self._descriptor,
            nonce=self.nonce,
            slots=self.slots,
            slot_bytes=self.slot_bytes,
        )

    def close(self) -> None:
        """Implements `PlaneMemory.close`."""
        if self._memory is not None:
            os.close(self._descriptor)
        super().close()


def ring_bytes(slots: int, slot_bytes: int) -> int:
    """Size of a ring, its first page included."""
    return HEAD_BYTES + slots * slot_bytes


def open_ring(offer: pb.SharedMemory) -> SharedRing:
    """Map the ring that a peer offers.

    Raises:
        UnusableMemory: it is another host's, namespace's or user's, not what the offer says, or cannot be mapped.
    """
    if not offer.host or offer.host != host_identity():
        raise UnusableMemory("another host or PID namespace")
    if not 0 < offer.slots <= MAX_SLOTS or not 0 < offer.slot_bytes <= MAX_SLOT_BYTES:
        raise UnusableMemory(f"{offer.slots} slots of {offer.slot_bytes} bytes are beyond the limits")
    path = f"/proc/{offer.pid}/fd/{offer.descriptor}"
    try:
        if not os.readlink(path).startswith(f"/memfd:{NAME}"):  # opening a device can have effects
            raise UnusableMemory("the descriptor is another file's")
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise UnusableMemory(f"its memory cannot be opened: {error.strerror}") from None
    try:
        return _mapped(descriptor, offer)
    except (OSError, ValueError) as error:
        raise UnusableMemory(f"its memory cannot be mapped: {error}") from None
    finally:
        os.close(descriptor)  # the mapping has a descriptor of its own


def _mapped(descriptor: int, offer: pb.SharedMemory) -> SharedRing:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or not fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
        raise UnusableMemory("its memory is not sealed")
    if status.st_size != ring_bytes(offer.slots, offer.slot_bytes):
        raise UnusableMemory(f"its memory has {status.st_size} bytes, not those of the offer")
    ring = SharedRing(descriptor, offer.slots, offer.slot_bytes)
    if ring.nonce != offer.nonce:
        ring.close()
        raise UnusableMemory("its memory is another hand-over's")
    return ring
