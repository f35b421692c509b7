"""Both ends of a two-rank link over gloo, with a pipe as control stream."""

from __future__ import annotations

import time
from multiprocessing.connection import Connection, wait

import torch

from twostroke.kv.handover.paired_channel import PairedChannel
from twostroke.kv.handover.paired_library import Patience
from twostroke.kv.handover.paired_link import Announce, Deliver, DestinationEnd, Free, Ready, SourceEnd
from twostroke.kv.handover.transports.communicator import join_by_torch, make_store

POLL_S = 0.005
GIVE_UP_S = 60.0
HOST = "127.0.0.1"


def planes_of(transfer: int, num_bytes: int) -> torch.Tensor:
    return torch.arange(num_bytes, dtype=torch.int64).mul(transfer).to(torch.uint8)


def size_of(transfer: int, slot_bytes: int) -> int:
    return max(1, slot_bytes - 1000 * transfer % slot_bytes)


class Destination:
    """The destination's end with its memory, in this process."""

    def __init__(self, slots: int, slot_bytes: int, join_s: float, patience_s: float) -> None:
        self.memory = torch.zeros(slots, slot_bytes, dtype=torch.uint8)
        self.end = DestinationEnd(slots, slot_bytes, patience_s)
        self.freed, self.got, self._full = [], [], []
        store = make_store(HOST, 0, join_s, is_master=True)
        self.port, self._patience_s, self._pipe = store.port, patience_s, None
        patience = Patience(join_s, patience_s)
        self.channel = PairedChannel(
            self.end, self.memory, join_by_torch("gloo", lambda: store), patience, say=self._say, told=self._told
        )

    def receive(self, pipe: Connection, count: int) -> list[torch.Tensor]:
        self._pipe = pipe
        self._until(lambda: len(self.got) >= count or self.channel.is_gone)
        return self.got

    def post_one_more(self) -> None:
        """With a stopped source: take all that it has announced, then announce a transfer that it never sends."""
        while wait([self._pipe], 0) or self._full:
            self._turn()
        end_s = time.monotonic() + 1.0  # what it had posted before it stopped may still arrive
        while self.end.quarantined and time.monotonic() < end_s and not self.channel.is_gone:
            self._turn()
        if not self.end.quarantined:
            self.channel.hear(Announce(self.end.last_id + 1, 1), time.monotonic())

    def until_aborted(self) -> bool:
        self._until(lambda: self.channel.is_gone)
        return self.channel.is_gone

    def close(self) -> None:
        assert self.channel.close(self._patience_s + 10)

    def _until(self, is_so) -> None:
        end_s = time.monotonic() + GIVE_UP_S
        while not is_so() and time.monotonic() < end_s:
            self._turn()

    def _turn(self) -> None:
        self.channel.turn(time.monotonic())
        while self._full:
            full = self._full.pop(0)
            self.got.append(self.memory[full.slot, : full.num_bytes].clone())
            self.channel.release(full.slot, time.monotonic())
        if self._pipe is None or not self.channel.is_open:
            time.sleep(POLL_S)
        elif wait([self._pipe], POLL_S):
            try:
                self.channel.hear(Announce(*self._pipe.recv()), time.monotonic())
            except (EOFError, OSError):
                self.channel.fail("the control stream ended")
                self._pipe = None

    def _say(self, message) -> None:
        self._pipe.send(message.id)

    def _told(self, action: Deliver | Free) -> None:
        (self._full if isinstance(action, Deliver) else self.freed).append(action)


def serve_source(pipe: Connection, port: int, transfers: int, shape: tuple[int, int], patience_s: float) -> None:
    """The source: sends `transfers` transfers from few slots; exit code 0 if all were sent."""
    slots, slot_bytes = shape
    torch.set_num_threads(1)
    memory, free, sent = torch.zeros(slots, slot_bytes, dtype=torch.uint8), list(range(slots)), 0
    channel = PairedChannel(
        SourceEnd(patience_s),
        memory,
        join_by_torch("gloo", lambda: make_store(HOST, port, patience_s, is_master=False)),
        Patience(patience_s, patience_s),
        say=lambda message: pipe.send((message.id, message.num_bytes)),
        told=lambda action: free.append(action.slot),
    )
    while not channel.is_gone and (sent < transfers or len(free) < slots):
        channel.turn(time.monotonic())
        if not channel.is_open:
            time.sleep(POLL_S)
            continue
        if free and sent < transfers and not channel.is_gone:
            sent, slot = sent + 1, free.pop()
            num_bytes = size_of(sent, slot_bytes)
            memory[slot, :num_bytes] = planes_of(sent, num_bytes)
            channel.offer(slot, num_bytes)
        elif wait([pipe], POLL_S):
            try:
                channel.hear(Ready(pipe.recv()), time.monotonic())
            except (EOFError, OSError):
                channel.fail("the control stream ended")
    is_whole = not channel.is_gone
    assert sorted(free) == list(range(slots)), free
    assert channel.close(patience_s + 10)
    raise SystemExit(0 if is_whole else 1)
