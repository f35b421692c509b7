"""When a decode worker makes a paired channel to a prefill worker, and who uses it. Pure.

The first hand-over to a peer begins to make a channel and goes by the stream; later ones use the channel when it is
open. So a peer whose library hangs holds up nobody. After a failure the next attempt waits RETRY_S.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from ..core.clock import Clock
from ..kv.handover.plane_channel import GLOO, ReceivingEnd
from ..protos import handover_pb2 as pb

RETRY_S = 30.0
JOINING = "the paired channel is being made"
TOO_MANY = "no memory for another paired channel"


@dataclass(frozen=True, slots=True)
class PairShape:
    """Size of an end's memory."""

    slots: int
    slot_bytes: int


@dataclass(slots=True)
class _Peer:
    end: ReceivingEnd | None = None
    is_served: bool = True  # a channel is made or open
    why_none: str = JOINING
    retry_at_s: float = 0.0
    waiting: list[Callable[[], None]] = field(default_factory=list)  # until it is known whether it opens


class PairedChannels(ABC):
    """All channels of one worker, by the address of the peer. Implements `PairedPeers`; a subclass makes them."""

    def __init__(
        self,
        clock: Clock,
        counters: Counter[str],
        *,
        shape: PairShape,
        max_bytes: int,
        worker_id: str,
        retry_s: float = RETRY_S,
    ) -> None:
        """`max_bytes` bounds the memory of all channels together. `worker_id`: of this worker, for the peers' logs."""
        self.shape = shape
        self._max_channels = max_bytes // (shape.slots * shape.slot_bytes)
        self._clock = clock
        self._counters = counters
        self._worker_id = worker_id
        self._retry_s = retry_s
        self._peers: dict[str, _Peer] = {}

    @property
    def num_open(self) -> int:
        """Channels that carry planes now."""
        return sum(peer.end is not None and peer.end.is_open for peer in self._peers.values())

    @property
    def num_channels(self) -> int:
        """Channels that are open, being made, or over while the library can still reach their memory."""
        return sum(peer.is_served for peer in self._peers.values())

    def get(self, peer: str) -> ReceivingEnd | None:
        """Implements `PairedPeers.get`."""
        known = self._peers.get(peer)
        if known is not None and known.end is not None and known.end.is_open:
            return known.end
        if known is None or (not known.is_served and self._clock.now_s() >= known.retry_at_s):
            self._begin(peer)
        return None

    def why_none(self, peer: str) -> str:
        """Implements `PairedPeers.why_none`."""
        known = self._peers.get(peer)
        return TOO_MANY if known is None else known.why_none

    def when_known(self, peer: str, act: Callable[[], None]) -> None:
        """Implements `PairedPeers.when_known`."""
        known = self._peers.get(peer)
        if known is None or not known.is_served or (known.end is not None and known.end.is_open):
            self._soon(act)
        else:
            known.waiting.append(act)

    # ------------------------------------------------------------------ for who makes them

    def hello(self, number: int) -> pb.PairHello:
        """The first word to a peer, of a channel with a number that nobody can guess."""
        size = self.shape
        hello = pb.PairHello(number=number, backend=GLOO, slots=size.slots, slot_bytes=size.slot_bytes)
        hello.worker_id = self._worker_id
        return hello

    def why_not(self, answer: pb.PairMessage | None) -> str:
        """Why the answer to a hello (None: the stream ended) begins no channel; empty: it does."""
        if answer is None:
            return "the peer knows no paired channels, or is gone"
        return "" if answer.HasField("accepted") else answer.refused.reason or "the peer did not accept"

    def made(self, peer: str, end: ReceivingEnd) -> None:
        """The peer has accepted a channel, and this is our end."""
        self._peers[peer].end = end

    def opened(self, peer: str) -> None:
        """The channel is open."""
        self._counters["paired_channels_opened"] += 1
        self._known(self._peers[peer])

    def over(self, peer: str, why: str) -> None:
        """The channel is over, and the library cannot reach its memory any more; or it was not made."""
        known = self._peers[peer]
        known.is_served, known.end, known.why_none = False, None, why
        known.retry_at_s = self._clock.now_s() + self._retry_s
        self._counters["paired_channels_ended"] += 1
        self._known(known)

    @abstractmethod
    def _serve(self, peer: str) -> None:
        """Begin to make a channel and serve it: say `hello`, then `made`, `opened`, and at the end `over`."""

    @abstractmethod
    def _soon(self, act: Callable[[], None]) -> None:
        """Call `act` when the current call is over."""

    # ------------------------------------------------------------------ inside

    def _begin(self, address: str) -> None:
        if self.num_channels >= self._max_channels:
            return
        for gone in [other for other, peer in self._peers.items() if not peer.is_served and other != address]:
            if len(self._peers) > self._max_channels:
                del self._peers[gone]
        self._peers[address] = _Peer()
        self._serve(address)

    def _known(self, peer: _Peer) -> None:
        waiting, peer.waiting = peer.waiting, []
        for act in waiting:
            act()
