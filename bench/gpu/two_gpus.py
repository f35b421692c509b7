"""The two-rank link between two GPUs of one machine: `python bench/gpu/two_gpus.py`. Needs two NVIDIA GPUs.

Two processes, one per GPU, drive the link machines (kv/handover/paired_link.py) over an NCCL communicator: whether the
bytes arrive, and GB/s by the size of a transfer, beside a plain copy between the two devices. The last row kills the
source in the middle of a transfer: the destination must abort and get its memory back.

`--backend gloo` runs the same between two processes without a GPU.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import statistics
import sys
import time
from multiprocessing.connection import Connection, wait
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

import torch
from report import machine, spread, table

from twostroke.kv.handover.paired_channel import PairedChannel
from twostroke.kv.handover.paired_library import Patience
from twostroke.kv.handover.paired_link import Announce, Deliver, DestinationEnd, Free, Ready, SourceEnd
from twostroke.kv.handover.transports.communicator import Backend, join_by_torch, make_store

HOST, PATIENCE_S, SLOTS, WAIT_S = "127.0.0.1", 30.0, 4, 0.0002
PATIENCE = Patience(PATIENCE_S, PATIENCE_S)


def device_of(backend: Backend, rank: int) -> torch.device:
    """GPU of a rank; the CPU for gloo."""
    return torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")


def pattern(num_bytes: int, device: torch.device) -> torch.Tensor:
    """Bytes that a shifted or missing part would change."""
    return (torch.arange(num_bytes, dtype=torch.int64, device=device) * 2654435761 >> 7).to(torch.uint8)


def source(pipe: Connection, port: int, backend: Backend, slot_bytes: int, count: int) -> None:
    """Child: offer `count` transfers from SLOTS slots that hold the pattern; -1: until it is killed."""
    device = device_of(backend, 0)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    memory, free, sent = pattern(slot_bytes, device).repeat(SLOTS, 1), list(range(SLOTS)), 0
    channel = PairedChannel(
        SourceEnd(PATIENCE_S),
        memory,
        join_by_torch(backend, lambda: make_store(HOST, port, PATIENCE_S, is_master=False)),
        PATIENCE,
        say=lambda message: pipe.send((message.id, message.num_bytes)),
        told=lambda action: free.append(action.slot),
    )
    while not channel.is_gone and (sent != count or len(free) < SLOTS):
        channel.turn(time.monotonic())
        if channel.is_open and free and sent != count:
            sent += 1
            channel.offer(free.pop(), slot_bytes)
        elif wait([pipe], WAIT_S):
            try:
                channel.hear(Ready(pipe.recv()), time.monotonic())
            except (EOFError, OSError):
                channel.fail("the control stream ended")
    channel.close(PATIENCE_S)


class Receiver:
    """The destination, in this process, with a source of its own."""

    def __init__(self, backend: Backend, slot_bytes: int, count: int) -> None:
        device = device_of(backend, 1)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        self.memory = torch.zeros(SLOTS, slot_bytes, dtype=torch.uint8, device=device)
        self.arrived_s: list[float] = []
        self._full: list[Deliver] = []
        self.num_wrong = 0
        self._wanted = pattern(slot_bytes, device)
        store = make_store(HOST, 0, PATIENCE_S, is_master=True)
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.child = context.Process(target=source, args=(theirs, store.port, backend, slot_bytes, count), daemon=True)
        self.child.start()
        theirs.close()
        end = DestinationEnd(SLOTS, slot_bytes, PATIENCE_S)
        join = join_by_torch(backend, lambda: store)
        self.channel = PairedChannel(end, self.memory, join, PATIENCE, say=self._say, told=self._told)

    def until(self, count: int) -> None:
        """Receive until `count` transfers came, or the link is gone."""
        while len(self.arrived_s) < count and not self.channel.is_gone:
            self.channel.turn(time.monotonic())
            while self._full:
                self._read(self._full.pop(0))
            if self.channel.is_open and wait([self.pipe], WAIT_S):
                try:
                    self.channel.hear(Announce(*self.pipe.recv()), time.monotonic())
                except (EOFError, OSError):
                    self.channel.fail("the control stream ended")

    def _read(self, full: Deliver) -> None:
        self.arrived_s.append(time.perf_counter())
        if full.id <= SLOTS:  # each slot once: a comparison costs as much as a transfer
            self.num_wrong += int((self.memory[full.slot] != self._wanted).sum())
            self.memory[full.slot].zero_()
        self.channel.release(full.slot, time.monotonic())

    def _say(self, message: Announce | Ready) -> None:
        self.pipe.send(message.id)

    def _told(self, action: Deliver | Free) -> None:
        if isinstance(action, Deliver):
            self._full.append(action)

    def close(self) -> None:
        """End the link, then the source."""
        self.channel.close(PATIENCE_S)
        self.pipe.close()
        self.child.join(PATIENCE_S)
        self.child.kill()


def copy_gb_per_s(backend: Backend, num_bytes: int, count: int) -> float:
    """GB/s of copies from one device to the other in one process."""
    one, other = (torch.zeros(num_bytes, dtype=torch.uint8, device=device_of(backend, rank)) for rank in (0, 1))
    other.copy_(one)
    if backend == "nccl":
        torch.cuda.synchronize(1)
    began_s = time.perf_counter()
    for _ in range(count):
        other.copy_(one)
    if backend == "nccl":
        torch.cuda.synchronize(1)
    return num_bytes * count / (time.perf_counter() - began_s) / 1e9


def rate(backend: Backend, num_bytes: int, count: int) -> tuple[float, int]:
    """GB/s of the transfers after the first SLOTS, and the number of wrong bytes."""
    receiver = Receiver(backend, num_bytes, count)
    try:
        receiver.until(count)
        if len(receiver.arrived_s) < count:
            raise SystemExit(f"the link failed: {receiver.channel.end.reason}")
        elapsed_s = receiver.arrived_s[-1] - receiver.arrived_s[SLOTS - 1]
        return num_bytes * (count - SLOTS) / elapsed_s / 1e9, receiver.num_wrong
    finally:
        receiver.close()


def killed(backend: Backend, num_bytes: int) -> float:
    """Seconds from SIGKILL of the source until all memory is free again."""
    receiver = Receiver(backend, num_bytes, -1)
    receiver.until(2)
    os.kill(receiver.child.pid or 0, signal.SIGKILL)
    began_s = time.perf_counter()
    receiver.until(1 << 60)
    elapsed_s = time.perf_counter() - began_s
    assert not receiver.channel.end.quarantined, "memory is still in quarantine"
    receiver.close()
    return elapsed_s


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("nccl", "gloo"), default="nccl")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mib", type=int, nargs="+", default=[1, 4, 16])
    given = parser.parse_args()
    if given.backend == "nccl" and torch.cuda.device_count() < 2:
        raise SystemExit(f"needs two GPUs; this machine shows {torch.cuda.device_count()} (--backend gloo needs none)")
    rows = []
    for mib in given.mib:
        links, copies, wrong = [], [], 0
        for _ in range(given.rounds):
            gb_per_s, num_wrong = rate(given.backend, mib << 20, max(64, 512 // mib))
            links.append(gb_per_s)
            wrong += num_wrong
            copies.append(copy_gb_per_s(given.backend, mib << 20, max(64, 512 // mib)))
        share = f"{statistics.median(links) / statistics.median(copies):.0%}"
        rows.append([f"{mib} MiB", spread(links), spread(copies), share, wrong])
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    print(table(["transfer", f"{given.backend} GB/s", "copy GB/s", "of copy", "wrong bytes"], rows))
    print(f"source killed: all memory free after {killed(given.backend, given.mib[-1] << 20):.2f} s")


if __name__ == "__main__":
    main()
