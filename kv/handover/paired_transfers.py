"""The two ends of a paired channel: whose planes are in which slot, and who waits for them. Pure.

    prefill: send ─▶ slot ─ Announce ─▶ ◀─ Ready ─ send ═══▶ slot ─▶ copied out ─▶ claim :decode

`paired_link.py` decides what is posted and when memory is free again. Knows no hand-over but its key, no stream but
its messages. `transports/paired_end.py` serves an end on an event loop.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ...protos import handover_pb2 as pb
from .paired_channel import PairedChannel
from .paired_library import Join, Patience, SlotMemory
from .paired_link import Announce, Deliver, DestinationEnd, Free, LinkState, Ready, SourceEnd
from .plane_channel import Planes

MAX_SLOTS = 256  # upper bound of cache.frame_slots
MAX_SLOT_BYTES = 64 << 20

Took = Callable[[memoryview | None], None]


class PairHost(Protocol):
    """Who serves an end."""

    def now_s(self) -> float:
        """Monotonic time."""
        ...

    def soon(self, act: Callable[[], None]) -> None:
        """Call `act` when the current call is over."""
        ...

    def say(self, message: pb.PairMessage) -> None:
        """Send a message on the control stream, in order."""
        ...

    def woken(self) -> None:
        """Call `turn` soon. Called in any thread."""
        ...


@dataclass(frozen=True, slots=True)
class PairSlots:
    """Memory of an end."""

    memory: SlotMemory  # as the library takes it
    views: Sequence[memoryview]  # the same memory by slot
    slot_bytes: int

    def __post_init__(self) -> None:
        assert 0 < len(self.views) <= MAX_SLOTS, len(self.views)
        assert 0 < self.slot_bytes <= MAX_SLOT_BYTES, self.slot_bytes


class _Transfers(ABC):
    """What both ends have in common. The owner calls `turn` when it is woken, and by `next_deadline_s`."""

    def __init__(
        self, end: SourceEnd | DestinationEnd, slots: PairSlots, join: Join, patience: Patience, host: PairHost
    ) -> None:
        self._end = end
        self._slots = slots
        self._host = host
        self._early: list[Announce | Ready] = []  # heard before the ranks have joined
        self._has_said_end = False
        self.channel = PairedChannel(
            end, slots.memory, join, patience, say=self._tell, told=self._told, woken=host.woken
        )

    @property
    def is_open(self) -> bool:
        """True if both ranks have joined and nothing has failed."""
        return self.channel.is_open and self._end.state is LinkState.OPEN

    @property
    def is_gone(self) -> bool:
        """True if the end is over and the library cannot reach its memory any more."""
        return self.channel.is_gone

    @property
    def reason(self) -> str:
        """Why the channel is over; empty if it is not."""
        return self._end.reason

    @property
    def quarantined(self) -> frozenset[int]:
        """Slots that the library can reach."""
        return self._end.quarantined

    @property
    def is_idle(self) -> bool:
        """True if no transfer is under way: every slot is usable."""
        return len(self.usable_slots) == len(self._slots.views)

    @property
    def next_deadline_s(self) -> float | None:
        """Latest time of the next `turn`; None: nothing is posted."""
        return self._end.next_deadline_s

    def stop(self, reason: str) -> None:
        """End the channel; it is gone when the library has let go of all memory. Idempotent."""
        self.channel.fail(reason)
        self._host.woken()

    def hear(self, message: pb.PairMessage) -> None:
        """A message of the peer. One that is out of place ends the channel."""
        body = message.WhichOneof("body")
        said = None if body == "refused" else self._said(message)
        if body == "refused":
            self.stop(f"the peer ended it: {message.refused.reason}")
        elif said is None:
            self.stop(f"a message of kind {body}")
        elif self.channel.is_open:
            self.channel.hear(said, self._host.now_s())
        else:
            self._early.append(said)
            if len(self._early) > MAX_SLOTS:
                self.stop("more transfers than slots before the ranks have joined")

    def turn(self) -> None:
        """Handle what the library reported and the passing of time, and do what has become possible."""
        self.channel.turn(self._host.now_s())
        if self.channel.is_open:
            early, self._early = self._early, []
            for message in early:
                self.channel.hear(message, self._host.now_s())
        self._turned()
        if self.reason and not self._has_said_end:
            self._has_said_end = True
            self._host.say(pb.PairMessage(refused=pb.PairRefused(reason=self.reason)))

    def leave(self) -> None:
        """The control stream is over, and nobody will call `turn`: nothing that waits here comes any more."""
        self.channel.fail("stopped")
        self._turned()

    # ------------------------------------------------------------------ of each side

    @property
    @abstractmethod
    def usable_slots(self) -> frozenset[int]:
        """Slots that this side may read or write now; the library must not reach them."""

    @abstractmethod
    def _said(self, message: pb.PairMessage) -> Announce | Ready | None:
        """The peer's word to the machine; None: the peer must not say this."""

    @abstractmethod
    def _tell(self, message: Announce | Ready) -> None:
        """Say the machine's word to the peer."""

    @abstractmethod
    def _told(self, action: Deliver | Free) -> None:
        """A slot was filled, or is out of the library's reach."""

    @abstractmethod
    def _turned(self) -> None:
        """The machine may have changed: do what has become possible."""


class SourceTransfers(_Transfers):
    """Prefill's end. Implements `SendingEnd`."""

    def __init__(self, slots: PairSlots, join: Join, patience: Patience, host: PairHost) -> None:
        self._free = list(range(len(slots.views)))
        self._waiting: deque[tuple[int, Planes, int]] = deque()  # for a slot; bounded by the hand-overs' credits
        self._keys: dict[int, int] = {}  # of the transfers that are about to be announced
        self._num_taken = self._num_offered = 0
        super().__init__(SourceEnd(patience.operation_s), slots, join, patience, host)

    @property
    def usable_slots(self) -> frozenset[int]:
        """Implements `_Transfers.usable_slots`: those that the next planes are written into."""
        return frozenset(self._free)

    @property
    def is_idle(self) -> bool:
        """Implements `_Transfers.is_idle`."""
        return super().is_idle and not self._waiting

    def send(self, key: int, planes: Planes, num_bytes: int) -> int | None:
        """Implements `SendingEnd.send`."""
        if not self.is_open or not 0 < num_bytes <= self._slots.slot_bytes:
            return None
        self._num_taken += 1
        self._waiting.append((key, planes, num_bytes))
        self._turned()
        return self._num_taken

    def _said(self, message: pb.PairMessage) -> Announce | Ready | None:
        return Ready(message.ready.id) if message.HasField("ready") else None

    def _tell(self, message: Announce | Ready) -> None:
        assert isinstance(message, Announce)
        said = pb.PairAnnounce(id=message.id, num_bytes=message.num_bytes, key=self._keys.pop(message.id))
        self._host.say(pb.PairMessage(announce=said))

    def _told(self, action: Deliver | Free) -> None:
        self._free.append(action.slot)
        self._host.woken()

    def _turned(self) -> None:
        while self._waiting and self._free and self.is_open:
            key, planes, num_bytes = self._waiting.popleft()
            slot, start = self._free.pop(), 0
            room = self._slots.views[slot]
            for part in planes:
                room[start : start + len(part)] = part
                start += len(part)
            self._num_offered += 1  # the machine counts its transfers in the same way
            self._keys[self._num_offered] = key
            self.channel.offer(slot, num_bytes)
        if not self.is_open and self.channel.is_open:
            self._waiting.clear()  # decode asks for them once more


@dataclass(slots=True)
class _Handover:
    """One hand-over that uses a channel."""

    most: int  # transfers under way
    here: dict[int, memoryview] = field(default_factory=dict)  # planes that nobody has claimed yet
    claims: dict[int, Took] = field(default_factory=dict)
    last_claimed: int = 0  # headers name transfers in their order, each once


class DestinationTransfers(_Transfers):
    """Decode's end. Implements `ReceivingEnd`. Planes are copied out, so a slot is free again at once."""

    def __init__(self, number: int, slots: PairSlots, join: Join, patience: Patience, host: PairHost) -> None:
        """`number`: that of the hello."""
        self._number = number
        self._counted = itertools.count(1)
        self._handovers: dict[int, _Handover] = {}
        self._keys: dict[int, int] = {}  # of the transfers that were announced
        self._filled: deque[Deliver] = deque()
        end = DestinationEnd(len(slots.views), slots.slot_bytes, patience.operation_s)
        super().__init__(end, slots, join, patience, host)

    @property
    def number(self) -> int:
        """Implements `ReceivingEnd.number`."""
        return self._number

    @property
    def num_keys(self) -> int:
        """Number of hand-overs that use it."""
        return len(self._handovers)

    @property
    def usable_slots(self) -> frozenset[int]:
        """Implements `_Transfers.usable_slots`: those that are read, or posted next."""
        assert isinstance(self._end, DestinationEnd)
        return self._end.free_slots | {filled.slot for filled in self._filled}

    def open_key(self, most: int) -> int:
        """Implements `ReceivingEnd.open_key`."""
        key = next(self._counted)
        self._handovers[key] = _Handover(most)
        return key

    def close_key(self, key: int) -> None:
        """Implements `ReceivingEnd.close_key`."""
        self._handovers.pop(key, None)

    def claim(self, key: int, transfer: int, took: Took) -> None:
        """Implements `ReceivingEnd.claim`."""
        handover = self._handovers[key]
        is_repeated = transfer <= handover.last_claimed
        handover.last_claimed = max(handover.last_claimed, transfer)
        planes = handover.here.pop(transfer, None)
        if planes is not None or is_repeated or self._end.state is not LinkState.OPEN:
            self._host.soon(lambda: took(planes))
        else:
            handover.claims[transfer] = took

    def _said(self, message: pb.PairMessage) -> Announce | Ready | None:
        if not message.HasField("announce"):
            return None
        announce = message.announce
        self._keys[announce.id] = announce.key
        return Announce(announce.id, announce.num_bytes)

    def _tell(self, message: Announce | Ready) -> None:
        self._host.say(pb.PairMessage(ready=pb.PairReady(id=message.id)))

    def _told(self, action: Deliver | Free) -> None:
        if isinstance(action, Deliver):
            self._filled.append(action)

    def _turned(self) -> None:
        while self._filled:
            filled = self._filled.popleft()
            handover = self._handovers.get(self._keys.pop(filled.id, 0))
            if handover is not None:
                self._take(handover, filled)
            if self._end.state is LinkState.OPEN:
                self.channel.release(filled.slot, self._host.now_s())
        if self._end.state is not LinkState.OPEN:
            for handover in tuple(self._handovers.values()):  # an answer may end a hand-over
                claims, handover.claims = handover.claims, {}
                for took in claims.values():
                    took(None)

    def _take(self, handover: _Handover, filled: Deliver) -> None:
        planes = memoryview(bytes(self._slots.views[filled.slot][: filled.num_bytes]))
        took = handover.claims.pop(filled.id, None)
        if took is not None:
            took(planes)
        elif len(handover.here) < handover.most:
            handover.here[filled.id] = planes
        else:
            self.stop(f"more than {handover.most} transfers of a hand-over wait for their headers")
