"""The two ends of a paired channel on an event loop, each with its control stream and the library's threads.

`../paired_transfers.py` has the ends, `../paired_link.py` decides what is posted and when memory is free again; the
library's threads wake the loop. An end is over when its machine is: by an error, its peer's end, or its own `stop`.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from google.protobuf.message import DecodeError

from ....protos import handover_pb2 as pb
from ..paired_library import Join, Patience
from ..paired_transfers import DestinationTransfers, PairSlots, SourceTransfers, Took
from ..plane_channel import Planes
from .communicator import Backend, Communicate
from .grpc import ByteStream
from .pair_store import PairStore

BACKEND: Backend = "gloo"
MAX_ENTRIES = 64  # of the ranks' meeting point
_TURN_S = 0.5  # longest time between two looks at the deadlines


@dataclass(frozen=True, slots=True)
class PairSettings:
    """What both ends of a worker's paired channels have in common."""

    host: str  # of this worker: the library listens there only
    patience: Patience
    communicate: Communicate  # makes a rank's communicator


class _PairedEnd:
    """One end: `run` serves it until it is over. Implements `PairHost`."""

    transfers: SourceTransfers | DestinationTransfers

    def __init__(self, settings: PairSettings) -> None:
        self._loop = asyncio.get_running_loop()
        self._woken, self._has_words = asyncio.Event(), asyncio.Event()
        self._words: deque[pb.PairMessage] = deque()  # to be said; bounded by the slots and the entries
        self._num_entries = 0
        store = self._store = PairStore(settings.patience.join_s, self._tell_entry)
        self._join: Join = settings.communicate(BACKEND, lambda: store, settings.host)

    @property
    def is_open(self) -> bool:
        """True if both ranks have joined and nothing has failed."""
        return self.transfers.is_open

    @property
    def reason(self) -> str:
        """Why the channel is over; empty if it is not."""
        return self.transfers.reason

    def stop(self, reason: str) -> None:
        """End the channel. `run` returns when the library has let go of all memory."""
        self.transfers.stop(reason)

    async def run(self, stream: ByteStream, opened: Callable[[], None] = lambda: None) -> None:
        """Serve the control stream until the channel is over and its memory is free. `opened` is called once, if ever.

        When it is cancelled, the library still ends by itself; its threads keep the memory until then.
        """
        was_open, transfers = False, self.transfers
        tasks = [asyncio.create_task(self._read(stream)), asyncio.create_task(self._write(stream))]
        try:
            while not transfers.is_gone:
                self._woken.clear()
                transfers.turn()
                if transfers.is_open and not was_open:
                    was_open = True
                    opened()
                if not transfers.is_gone:
                    await self._pause()
        finally:
            transfers.leave()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _pause(self) -> None:
        due_s = self.transfers.next_deadline_s
        longest_s = _TURN_S if due_s is None else min(_TURN_S, max(0.0, due_s - self.now_s()))
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
            if message.HasField("entry") and self._num_entries < MAX_ENTRIES:
                self._num_entries += 1
                self._store.put(message.entry.key, message.entry.value)
            else:
                self.transfers.hear(message)
            self._woken.set()
        self.stop("the control stream ended")

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

    # ------------------------------------------------------------------ for the transfers

    def now_s(self) -> float:
        """Implements `PairHost.now_s`."""
        return time.monotonic()

    def soon(self, act: Callable[[], None]) -> None:
        """Implements `PairHost.soon`."""
        self._loop.call_soon(act)

    def say(self, message: pb.PairMessage) -> None:
        """Implements `PairHost.say`."""
        self._words.append(message)
        self._has_words.set()

    def woken(self) -> None:
        """Implements `PairHost.woken`."""
        try:
            self._loop.call_soon_threadsafe(self._woken.set)
        except RuntimeError:
            pass  # the loop is closed: nobody waits

    def _tell_entry(self, key: str, value: bytes) -> None:
        """Called in the library's thread."""
        entry = pb.PairMessage(entry=pb.PairEntry(key=key, value=value))
        try:
            self._loop.call_soon_threadsafe(self.say, entry)
        except RuntimeError:
            pass


class PairedSource(_PairedEnd):
    """Prefill's end. Implements `SendingEnd`."""

    transfers: SourceTransfers

    def __init__(self, slots: int, slot_bytes: int, settings: PairSettings) -> None:
        super().__init__(settings)
        self.transfers = SourceTransfers(_memory(slots, slot_bytes), self._join, settings.patience, self)

    def send(self, key: int, planes: Planes, num_bytes: int) -> int | None:
        """Implements `SendingEnd.send`."""
        return self.transfers.send(key, planes, num_bytes)


class PairedDestination(_PairedEnd):
    """Decode's end. Implements `ReceivingEnd`."""

    transfers: DestinationTransfers

    def __init__(self, number: int, slots: int, slot_bytes: int, settings: PairSettings) -> None:
        """`number`: that of the hello."""
        super().__init__(settings)
        memory = _memory(slots, slot_bytes)
        self.transfers = DestinationTransfers(number, memory, self._join, settings.patience, self)

    @property
    def number(self) -> int:
        """Implements `ReceivingEnd.number`."""
        return self.transfers.number

    def open_key(self, most: int) -> int:
        """Implements `ReceivingEnd.open_key`."""
        return self.transfers.open_key(most)

    def close_key(self, key: int) -> None:
        """Implements `ReceivingEnd.close_key`."""
        self.transfers.close_key(key)

    def claim(self, key: int, transfer: int, took: Took) -> None:
        """Implements `ReceivingEnd.claim`."""
        self.transfers.claim(key, transfer, took)


def _memory(slots: int, slot_bytes: int) -> PairSlots:
    memory = torch.zeros(slots, slot_bytes, dtype=torch.uint8)
    return PairSlots(memory, [row.numpy().data for row in memory], slot_bytes)
