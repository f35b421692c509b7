"""Makes and serves the paired channels of a decode worker on an event loop. `paired_peers.py` decides when."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import Counter
from collections.abc import Callable
from typing import Protocol

from google.protobuf.message import DecodeError

from ..core.clock import Clock
from ..kv.handover.plane_channel import ReceivingEnd
from ..kv.handover.transports.grpc import ByteStream, OpenedStream
from ..protos import handover_pb2 as pb
from .paired_peers import PairedChannels, PairShape

log = logging.getLogger(__name__)

HELLO_S = 5.0  # longest time for the hello and the peer's answer


class PairedEnd(ReceivingEnd, Protocol):
    """Decode's end with its life: `PairedDestination`."""

    @property
    def reason(self) -> str:
        """Why it is over; empty if it is not."""
        ...

    async def run(self, stream: ByteStream, opened: Callable[[], None]) -> None:
        """Serve it until it is over. `opened` is called once, if ever."""
        ...


MakePair = Callable[[int, PairShape], PairedEnd]
"""Make the end of a channel with a number. Called when the peer has accepted it."""


class Pairs(PairedChannels):
    """All channels of one worker, each served by a task."""

    def __init__(
        self,
        make: MakePair,
        open_stream: Callable[[str], OpenedStream],
        clock: Clock,
        counters: Counter[str],
        *,
        shape: PairShape,
        max_bytes: int,
        worker_id: str,
    ) -> None:
        """`max_bytes` bounds the memory of all channels together. `worker_id`: of this worker, for the peers' logs."""
        super().__init__(clock, counters, shape=shape, max_bytes=max_bytes, worker_id=worker_id)
        self._make = make
        self._open_stream = open_stream
        self._tasks: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """End all channels."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # ------------------------------------------------------------------ inside

    def _soon(self, act: Callable[[], None]) -> None:
        asyncio.get_running_loop().call_soon(act)

    def _serve(self, peer: str) -> None:
        task = asyncio.create_task(self._served(peer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _served(self, address: str) -> None:
        stream = self._open_stream(address)
        why = "the worker ends"
        try:
            why = await self._life(stream, address)
        except (ConnectionError, TimeoutError, DecodeError) as error:
            why = str(error) or "the peer does not answer"
        finally:
            stream.close()
            log.info("paired channel to %s: %s", address, why)
            self.over(address, why)

    async def _life(self, stream: OpenedStream, address: str) -> str:
        """Make a channel and serve it; returns why it is over."""
        number = secrets.randbits(63) | 1
        async with asyncio.timeout(HELLO_S):
            await stream.send(pb.PairMessage(hello=self.hello(number)).SerializeToString())
            raw = await stream.receive()
        why_not = self.why_not(None if raw is None else pb.PairMessage.FromString(raw))
        if why_not:
            return why_not
        end = self._make(number, self.shape)
        self.made(address, end)
        await end.run(stream, lambda: self.opened(address))
        return end.reason
