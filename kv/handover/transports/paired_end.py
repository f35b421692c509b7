"""The two ends of a paired channel on an event loop, each with its control stream. Knows no hand-over but its key.

    prefill: PairedSource.send ─▶ slot ─ Announce ─▶ ◀─ Ready ─ send ═══▶ slot ─▶ copied out ─▶ PairedDestination.claim

`../paired_link.py` decides what is posted and when memory is free again; the library's threads wake the loop. An end
is over when its machine is: by an error, by its peer's end, or by its own `stop`.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from google.protobuf.message import DecodeError

from ....protos import handover_pb2 as pb
from ..paired_link import Announce, Deliver, DestinationEnd, Free, LinkState, Ready, SourceEnd
from ..plane_channel import Planes
from .communicator import Backend, Communicate, Patience
from .grpc import ByteStream
from .pair_store import PairStore
from .paired_channel import PairedChannel

BACKEND: Backend = "gloo"
MAX_SLOTS = 256  # upper bound of cache.frame_slots
MAX_SLOT_BYTES = 64 << 20
MAX_ENTRIES = 64  # of the ranks' meeting point
_TURN_S = 0.5  # longest time between two looks at the deadlines

Took = Callable[[memoryview | None], None]


@dataclass(frozen=True, slots=True)
class PairSettings:
    """What both ends of a worker's paired channels have in common."""

    host: str  # of this worker: the library listens there only
    patience: Patience
    communicate: Communicate  # makes a rank's communicator


class _PairedEnd(ABC):
    """One end: `run` serves it until it is over."""

    def __init__(self, end: SourceEnd | DestinationEnd, slots: int, slot_bytes: int, settings: PairSettings) -> None:
        assert 0 < slots <= MAX_SLOTS, slots
        assert 0 < slot_bytes <= MAX_SLOT_BYTES, slot_bytes
        self._loop = asyncio.get_running_loop()
        self._end = end
        self._memory = torch.zeros(slots, slot_bytes, dtype=torch.uint8)
        self._slot_bytes = slot_bytes
        self._woken, self._has_words = asyncio.Event(), asyncio.Event()
        self._words: deque[pb.PairMessage] = deque()  # to be said; bounded by the slots and the entries
        self._early: list[Announce | Ready] = []  # heard before the ranks have joined
        self._num_entries = 0
        store = PairStore(settings.patience.join_s, self._tell_entry)
        self._store = store
        communicator = settings.communicate(BACKEND, lambda: store, settings.host)
        self.channel = PairedChannel(
            end, self._memory, communicator, settings.patience, say=self._tell, told=self._told, woken=self._wake
        )

    @property
    def is_open(self) -> bool:
        """True if both ranks have joined and nothing has failed."""
        return self.channel.is_open and self._end.state is LinkState.OPEN

    @property
    def reason(self) -> str:
        """Why the channel is over; empty if it is not."""
        return self._end.reason

    def stop(self, reason: str) -> None:
        """End the channel. `run` returns when the library has let go of all memory."""
        self.channel.fail(reason)
        self._woken.set()

    async def run(self, stream: ByteStream, opened: Callable[[], None] = lambda: None) -> None:
        """Serve the control stream until the channel is over and its memory is free. `opened` is called once, if ever.

        When it is cancelled, the library still ends by itself; its threads keep the memory until then.
        """
        was_open = has_said_end = False
        tasks = [asyncio.create_task(self._read(stream)), asyncio.create_task(self._write(stream))]
        try:
            while not self.channel.is_gone:
                self._woken.clear()
                self.channel.turn(time.monotonic())
                if self.channel.is_open:
                    early, self._early = self._early, []
                    for message in early:
                        self.channel.hear(message, time.monotonic())
                self._turned()
                if self.is_open and not was_open:
                    was_open = True
                    opened()
                if self.reason and not has_said_end:
                    has_said_end = True
                    self._say(pb.PairMessage(refused=pb.PairRefused(reason=self.reason)))
                if not self.channel.is_gone:
                    await self._pause()
        finally:
            self.channel.fail("stopped")
            self._turned()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _pause(self) -> None:
        due_s = self._end.next_deadline_s
        longest_s = _TURN_S if due_s is None else min(_TURN_S, max(0.0, due_s - time.monotonic()))
        try:
            async with asyncio.timeout(longest_s):
                await self._woken.wait()
        except TimeoutError:
            pass

    async def _read(self, stream: ByteStream) -> None:
        while (raw := await stream.receive()) is not None:
            try:
                message = pb.PairMessage.FromString(raw)
            except DecodeError:
                self.stop("bytes that are no message")
                return
            self._hear(message)
            self._woken.set()
        self.stop("the control stream ended")

    def _hear(self, message: pb.PairMessage) -> None:
        body = message.WhichOneof("body")
        if body == "entry" and self._num_entries < MAX_ENTRIES:
            self._num_entries += 1
            self._store.put(message.entry.key, message.entry.value)
            return
        said = None if body == "refused" else self._said(message)
        if body == "refused":
            self.stop(f"the peer ended it: {message.refused.reason}")
        elif said is None:
            self.stop(f"a message of kind {body}")
        elif self.channel.is_open:
            self.channel.hear(said, time.monotonic())
        else:
            self._early.append(said)
            if len(self._early) > MAX_SLOTS:
                self.stop("more transfers than slots before the ranks have joined")

    async def _write(self, stream: ByteStream) -> None:
        while True:
            while self._words:
                try:
                    await stream.send(self._words.popleft().SerializeToString())
                except ConnectionError as error:
                    self.stop(f"the control stream ended: {error}")
                    return
            self._has_words.clear()
            await self._has_words.wait()

    def _say(self, message: pb.PairMessage) -> None:
        self._words.append(message)
        self._has_words.set()

    # ------------------------------------------------------------------ from the library's threads

    def _wake(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._woken.set)
        except RuntimeError:
            pass  # the loop is closed: nobody waits

    def _tell_entry(self, key: str, value: bytes) -> None:
        entry = pb.PairMessage(entry=pb.PairEntry(key=key, value=value))
        try:
            self._loop.call_soon_threadsafe(self._say, entry)
        except RuntimeError:
            pass

    # ------------------------------------------------------------------ of each side

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


class PairedSource(_PairedEnd):
    """Prefill's end. Implements `SendingEnd`."""

    def __init__(self, slots: int, slot_bytes: int, settings: PairSettings) -> None:
        self._free = list(range(slots))
        self._waiting: deque[tuple[int, Planes, int]] = deque()  # for a slot; bounded by the hand-overs' credits
        self._keys: dict[int, int] = {}  # of the transfers that are about to be announced
        self._num_taken = self._num_offered = 0
        super().__init__(SourceEnd(settings.patience.operation_s), slots, slot_bytes, settings)

    def send(self, key: int, planes: Planes, num_bytes: int) -> int | None:
        """Implements `SendingEnd.send`."""
        if not self.is_open or not 0 < num_bytes <= self._slot_bytes:
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
        self._say(pb.PairMessage(announce=said))

    def _told(self, action: Deliver | Free) -> None:
        self._free.append(action.slot)
        self._woken.set()

    def _turned(self) -> None:
        while self._waiting and self._free and self.is_open:
            key, planes, num_bytes = self._waiting.popleft()
            slot, start = self._free.pop(), 0
            room = self._memory[slot].numpy().data
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


class PairedDestination(_PairedEnd):
    """Decode's end. Implements `ReceivingEnd`. Planes are copied out, so a slot is free again at once."""

    def __init__(self, number: int, slots: int, slot_bytes: int, settings: PairSettings) -> None:
        """`number`: that of the hello."""
        self._number = number
        self._counted = itertools.count(1)
        self._handovers: dict[int, _Handover] = {}
        self._keys: dict[int, int] = {}  # of the transfers that were announced
        self._filled: deque[Deliver] = deque()
        super().__init__(DestinationEnd(slots, slot_bytes, settings.patience.operation_s), slots, slot_bytes, settings)

    @property
    def number(self) -> int:
        """Implements `ReceivingEnd.number`."""
        return self._number

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
        planes = handover.here.pop(transfer, None)
        if planes is not None or self._end.state is not LinkState.OPEN:
            self._loop.call_soon(took, planes)
        else:
            handover.claims[transfer] = took

    def _said(self, message: pb.PairMessage) -> Announce | Ready | None:
        if not message.HasField("announce"):
            return None
        announce = message.announce
        self._keys[announce.id] = announce.key
        return Announce(announce.id, announce.num_bytes)

    def _tell(self, message: Announce | Ready) -> None:
        self._say(pb.PairMessage(ready=pb.PairReady(id=message.id)))

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
                self.channel.release(filled.slot, time.monotonic())
        if self._end.state is not LinkState.OPEN:
            for handover in tuple(self._handovers.values()):  # an answer may end a hand-over
                claims, handover.claims = handover.claims, {}
                for took in claims.values():
                    took(None)

    def _take(self, handover: _Handover, filled: Deliver) -> None:
        planes = memoryview(self._memory[filled.slot, : filled.num_bytes].numpy().tobytes())
        took = handover.claims.pop(filled.id, None)
        if took is not None:
            took(planes)
        elif len(handover.here) < handover.most:
            handover.here[filled.id] = planes
        else:
            self.stop(f"more than {handover.most} transfers of a hand-over wait for their headers")
