"""Paired channels of a decode worker, one per prefill worker. Knows no hand-over and no library.

The first hand-over to a peer begins to make a channel and goes by the stream; later ones use the channel when it is
open. So a peer whose library hangs holds up nobody. After a failure the next attempt waits RETRY_S.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from google.protobuf.message import DecodeError

from ..core.clock import Clock
from ..kv.handover.plane_channel import GLOO, ReceivingEnd
from ..kv.handover.transports.grpc import ByteStream, OpenedStream
from ..protos import handover_pb2 as pb

log = logging.getLogger(__name__)

HELLO_S = 5.0  # longest time for the hello and the peer's answer
RETRY_S = 30.0
JOINING = "the paired channel is being made"
TOO_MANY = "no memory for another paired channel"


class PairedEnd(ReceivingEnd, Protocol):
    """Decode's end with its life: `PairedDestination`."""

    @property
    def reason(self) -> str:
        """Why it is over; empty if it is not."""
        ...

    async def run(self, stream: ByteStream, opened: Callable[[], None]) -> None:
        """Serve it until it is over. `opened` is called once, if ever."""
        ...


@dataclass(frozen=True, slots=True)
class PairShape:
    """Size of an end's memory."""

    slots: int
    slot_bytes: int


MakePair = Callable[[int, PairShape], PairedEnd]
"""Make the end of a channel with a number. Called when the peer has accepted it."""


@dataclass(slots=True)
class _Peer:
    end: PairedEnd | None = None
    task: asyncio.Task[None] | None = None  # while a channel is made or open
    why_none: str = JOINING
    retry_at_s: float = 0.0
    waiting: list[Callable[[], None]] = field(default_factory=list)  # until it is known whether it opens


class Pairs:
    """All channels of one worker. Implements `PairedPeers`."""

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
        self._make = make
        self._open_stream = open_stream
        self._shape = shape
        self._max_channels = max_bytes // (shape.slots * shape.slot_bytes)
        self._clock = clock
        self._counters = counters
        self._worker_id = worker_id
        self._peers: dict[str, _Peer] = {}

    @property
    def num_open(self) -> int:
        """Channels that carry planes now."""
        return sum(peer.end is not None and peer.end.is_open for peer in self._peers.values())

    @property
    def num_channels(self) -> int:
        """Channels that are open or being made."""
        return sum(peer.task is not None for peer in self._peers.values())

    def get(self, peer: str) -> ReceivingEnd | None:
        """Implements `PairedPeers.get`."""
        known = self._peers.get(peer)
        if known is not None and known.end is not None and known.end.is_open:
            return known.end
        if known is None or (known.task is None and self._clock.now_s() >= known.retry_at_s):
            self._begin(peer)
        return None

    def why_none(self, peer: str) -> str:
        """Implements `PairedPeers.why_none`."""
        known = self._peers.get(peer)
        return TOO_MANY if known is None else known.why_none

    def when_known(self, peer: str, act: Callable[[], None]) -> None:
        """Implements `PairedPeers.when_known`."""
        known = self._peers.get(peer)
        if known is None or known.task is None or (known.end is not None and known.end.is_open):
            asyncio.get_running_loop().call_soon(act)
        else:
            known.waiting.append(act)

    async def close(self) -> None:
        """End all channels."""
        tasks = [peer.task for peer in self._peers.values() if peer.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # ------------------------------------------------------------------ inside

    def _begin(self, address: str) -> None:
        if self.num_channels >= self._max_channels:
            return
        for gone in [other for other, peer in self._peers.items() if peer.task is None and other != address]:
            if len(self._peers) > self._max_channels:
                del self._peers[gone]
        peer = self._peers[address] = _Peer()
        peer.task = asyncio.create_task(self._serve(address, peer))

    async def _serve(self, address: str, peer: _Peer) -> None:
        stream = self._open_stream(address)
        why = "the worker ends"
        try:
            why = await self._made(stream, peer)
        except (ConnectionError, TimeoutError, DecodeError) as error:
            why = str(error) or "the peer does not answer"
        finally:
            stream.close()
            peer.task, peer.end, peer.why_none = None, None, why
            peer.retry_at_s = self._clock.now_s() + RETRY_S
            self._counters["paired_channels_ended"] += 1
            log.info("paired channel to %s: %s", address, why)
            self._known(peer)

    async def _made(self, stream: OpenedStream, peer: _Peer) -> str:
        """Make a channel and serve it; returns why it is over."""
        number, shape = secrets.randbits(63) | 1, self._shape
        hello = pb.PairHello(number=number, backend=GLOO, slots=shape.slots, slot_bytes=shape.slot_bytes)
        hello.worker_id = self._worker_id
        async with asyncio.timeout(HELLO_S):
            await stream.send(pb.PairMessage(hello=hello).SerializeToString())
            raw = await stream.receive()
        answer = None if raw is None else pb.PairMessage.FromString(raw)
        if answer is None:
            return "the peer knows no paired channels, or is gone"
        if not answer.HasField("accepted"):
            return answer.refused.reason or "the peer did not accept"
        end = peer.end = self._make(number, shape)

        def opened() -> None:
            self._counters["paired_channels_opened"] += 1
            self._known(peer)

        await end.run(stream, opened)
        return end.reason

    def _known(self, peer: _Peer) -> None:
        waiting, peer.waiting = peer.waiting, []
        for act in waiting:
            act()
