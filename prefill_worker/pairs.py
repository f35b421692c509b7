"""Paired channels that decode workers have opened to this prefill worker. Knows no hand-over and no library."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Protocol

from google.protobuf.message import DecodeError

from ..kv.handover.plane_channel import GLOO, SendingEnd, TransportPolicy
from ..kv.handover.transports.grpc import ByteStream, ServerContext, ServerStream
from ..protos import handover_pb2 as pb

log = logging.getLogger(__name__)

HELLO_S = 5.0  # longest time for a hello, and for its answer
MAX_SLOTS = 256
MAX_SLOT_BYTES = 64 << 20


class PairedEnd(SendingEnd, Protocol):
    """Prefill's end with its life: `PairedSource`."""

    @property
    def reason(self) -> str:
        """Why it is over; empty if it is not."""
        ...

    async def run(self, stream: ByteStream) -> None:
        """Serve it until it is over."""
        ...


MakePair = Callable[[int, int], PairedEnd]
"""Make an end with so many slots of so many bytes."""


class PairService:
    """All channels of one worker. The guard has checked before that the caller is a worker."""

    def __init__(
        self, make: MakePair, policy: TransportPolicy, max_bytes: int, counters: Counter[str], *, has_certificates: bool
    ) -> None:
        """`max_bytes` bounds the memory of all channels together.

        `has_certificates`: calls inside the cluster are encrypted, and a paired channel would not be.
        """
        self._make = make
        self._has_certificates = has_certificates
        self._policy = policy
        self._max_bytes = max_bytes
        self._counters = counters
        self._held_bytes = 0
        self._ends: dict[int, PairedEnd] = {}
        self._taken: set[int] = set()  # numbers of those, and of channels that are being accepted

    @property
    def num_channels(self) -> int:
        """Channels that are open or being made."""
        return len(self._ends)

    @property
    def num_open(self) -> int:
        """Channels that carry planes now."""
        return sum(end.is_open for end in self._ends.values())

    def get(self, number: int) -> SendingEnd | None:
        """The open channel of a number; None: it is not known, not open yet, or over."""
        end = self._ends.get(number)
        return end if end is not None and end.is_open else None

    async def pair(self, _requests: AsyncIterator[bytes], context: ServerContext) -> None:
        """Handler of Handover.Pair."""
        await self.serve(ServerStream(context))

    async def serve(self, stream: ByteStream) -> None:
        """Serve one channel, from its hello to its end."""
        try:
            async with asyncio.timeout(HELLO_S):
                raw = await stream.receive()
                hello = pb.PairMessage.FromString(raw or b"").hello
                why = self._refusal(hello)
                if why:
                    refused = pb.PairMessage(refused=pb.PairRefused(reason=why))
                    await stream.send(refused.SerializeToString())
                    log.info("paired channel of %s refused: %s", hello.worker_id, why)
                    return
        except (TimeoutError, DecodeError, ConnectionError) as error:
            log.warning("a paired channel did not open: %s", error or "silence")
            return
        # Number and memory are taken before the answer is sent: other hellos come meanwhile.
        size = hello.slots * hello.slot_bytes
        self._held_bytes += size
        self._taken.add(hello.number)
        try:
            await self._accepted(stream, hello)
        finally:
            self._taken.remove(hello.number)
            self._held_bytes -= size

    async def _accepted(self, stream: ByteStream, hello: pb.PairHello) -> None:
        try:
            async with asyncio.timeout(HELLO_S):
                await stream.send(pb.PairMessage(accepted=pb.PairAccepted()).SerializeToString())
        except (TimeoutError, ConnectionError) as error:
            log.warning("a paired channel did not open: %s", error or "silence")
            return
        end = self._ends[hello.number] = self._make(hello.slots, hello.slot_bytes)
        try:
            await end.run(stream)
        finally:
            del self._ends[hello.number]
            self._counters["paired_channels_ended"] += 1
            log.info("paired channel of %s: %s", hello.worker_id, end.reason)

    def _refusal(self, hello: pb.PairHello) -> str:
        """Why a channel is refused; empty if it is not."""
        if not self._policy.may_pair:
            return f"this prefill worker's cache.transport is {self._policy.wanted}"
        if self._has_certificates and self._policy.wanted != GLOO:
            return (
                "a paired channel is not encrypted, and this cluster is: give the prefill worker cache.transport gloo"
            )
        if hello.backend != GLOO:
            return f"backend {hello.backend!r} is not known; gloo is"
        if not 0 < hello.slots <= MAX_SLOTS or not 0 < hello.slot_bytes <= MAX_SLOT_BYTES:
            return f"{hello.slots} slots of {hello.slot_bytes} bytes; at most {MAX_SLOTS} of {MAX_SLOT_BYTES}"
        if not hello.number or hello.number in self._taken:
            return f"channel {hello.number} is there already"
        if self._held_bytes + hello.slots * hello.slot_bytes > self._max_bytes:
            return f"no memory for another paired channel; cache.ring_bytes is {self._max_bytes}"
        return ""
