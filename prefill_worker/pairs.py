"""Serves the paired channels that decode workers have opened to this prefill worker, on an event loop."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Protocol

from google.protobuf.message import DecodeError

from ..kv.handover.plane_channel import SendingEnd, TransportPolicy
from ..kv.handover.transports.grpc import ByteStream, ServerContext, ServerStream
from ..protos import handover_pb2 as pb
from .paired_peers import AcceptedChannels

log = logging.getLogger(__name__)

HELLO_S = 5.0  # longest time for a hello, and for its answer


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


class PairService(AcceptedChannels[PairedEnd]):
    """All channels of one worker. The guard has checked before that the caller is a worker."""

    def __init__(
        self, make: MakePair, policy: TransportPolicy, max_bytes: int, counters: Counter[str], *, has_certificates: bool
    ) -> None:
        """`max_bytes` bounds the memory of all channels together.

        `has_certificates`: calls inside the cluster are encrypted, and a paired channel would not be.
        """
        super().__init__(policy, max_bytes, counters, has_certificates=has_certificates)
        self._make = make

    async def pair(self, _requests: AsyncIterator[bytes], context: ServerContext) -> None:
        """Handler of Handover.Pair."""
        await self.serve(ServerStream(context))

    async def serve(self, stream: ByteStream) -> None:
        """Serve one channel, from its hello to its end."""
        try:
            async with asyncio.timeout(HELLO_S):
                raw = await stream.receive()
                hello = pb.PairMessage.FromString(raw or b"").hello
        except (TimeoutError, DecodeError, ConnectionError) as error:
            log.warning("a paired channel did not open: %s", error or "silence")
            return
        answer = self.answer(hello)
        try:
            await self._served(stream, hello, answer)
        finally:
            if answer.HasField("accepted"):
                self.over(hello)

    async def _served(self, stream: ByteStream, hello: pb.PairHello, answer: pb.PairMessage) -> None:
        try:
            async with asyncio.timeout(HELLO_S):
                await stream.send(answer.SerializeToString())
        except (TimeoutError, ConnectionError) as error:
            log.warning("a paired channel did not open: %s", error or "silence")
            return
        if answer.HasField("refused"):
            log.info("paired channel of %s refused: %s", hello.worker_id, answer.refused.reason)
            return
        end = self._make(hello.slots, hello.slot_bytes)
        self.began(hello, end)
        try:
            await end.run(stream)
        finally:
            log.info("paired channel of %s: %s", hello.worker_id, end.reason)
