"""Virtual time: processes that crash and freeze, an event heap, and a transcript. Knows no protocol and no role."""

from __future__ import annotations

import hashlib
import heapq
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

LAST_EVENTS = 60


@dataclass(slots=True, eq=False)
class Process:
    """One operating-system process. A restart begins another life; timers of the old life never fire."""

    name: str
    life: int = 1
    is_alive: bool = True
    frozen_until_s: float = 0.0
    frozen_s: float = 0.0  # sum over all lives

    def __str__(self) -> str:
        return f"{self.name}.{self.life}"


@dataclass(slots=True, eq=False)
class Timer:
    """Planned event. It happens unless it is cancelled or its process dies first."""

    act: Callable[[], None]
    process: Process | None  # None: an event outside all processes
    life: int = 0
    is_cancelled: bool = False

    def cancel(self) -> None:
        """Cancel the event. No effect after it has happened."""
        self.is_cancelled = True


@dataclass(slots=True)
class Transcript:
    """Log of a schedule: a running digest of all lines, and the last lines (or all) as text."""

    keep_all: bool = False
    lines: deque[str] = field(default_factory=deque)
    num_lines: int = 0
    _hasher: hashlib.blake2b = field(default_factory=lambda: hashlib.blake2b(digest_size=16))

    def add(self, line: str) -> None:
        """Append one line."""
        self._hasher.update(line.encode() + b"\n")
        self.num_lines += 1
        self.lines.append(line)
        if not self.keep_all and len(self.lines) > LAST_EVENTS:
            self.lines.popleft()

    def digest(self) -> str:
        """Digest of all lines so far, in hexadecimal."""
        return self._hasher.hexdigest()


class World:
    """Clock, event heap and only source of randomness of one schedule. Implements core.clock.Clock."""

    def __init__(self, seed: int, *, keep_all: bool = False) -> None:
        self.random = random.Random(seed)
        self.transcript = Transcript(keep_all)
        self.num_events = 0
        self._now_s = 0.0
        self._heap: list[tuple[float, int, Timer]] = []
        self._tie = 0

    def now_s(self) -> float:
        """Virtual seconds since the beginning."""
        return self._now_s

    def chance(self, probability: float) -> bool:
        """Return True with this probability. Probability 0 draws no random number."""
        return probability > 0 and self.random.random() < probability

    def note(self, who: object, what: str) -> None:
        """Add a line to the transcript."""
        self.transcript.add(f"{self._now_s:9.4f} {who}: {what}")

    def after(self, delay_s: float, process: Process | None, act: Callable[[], None]) -> Timer:
        """Plan `act` in this life of a process. If the process is frozen then, `act` happens when the freeze ends."""
        timer = Timer(act, process, 0 if process is None else process.life)
        self._push(self._now_s + max(0.0, delay_s), timer)
        return timer

    def at(self, at_s: float, process: Process | None, act: Callable[[], None]) -> Timer:
        """Plan `act` as `after` does, at an exact time. Events of the same time happen in the order of planning."""
        timer = Timer(act, process, 0 if process is None else process.life)
        self._push(max(self._now_s, at_s), timer)
        return timer

    def freeze(self, process: Process, seconds: float) -> None:
        """Let a process stand still for `seconds`."""
        until_s = self._now_s + seconds
        process.frozen_s += max(0.0, until_s - max(self._now_s, process.frozen_until_s))
        process.frozen_until_s = max(process.frozen_until_s, until_s)

    def kill(self, process: Process) -> None:
        """End this life of a process; its planned events never happen."""
        process.is_alive = False
        process.life += 1
        process.frozen_until_s = 0.0

    def step(self) -> Process | bool | None:
        """Run the next event. False: nothing is planned. Else the process of the event (None: no process)."""
        while self._heap:
            at_s, _, timer = heapq.heappop(self._heap)
            process = timer.process
            if timer.is_cancelled:
                continue
            self._now_s = max(self._now_s, at_s)
            if process is not None:
                if not process.is_alive or process.life != timer.life:
                    continue
                if process.frozen_until_s > self._now_s:
                    self._push(process.frozen_until_s, timer)
                    continue
            self.num_events += 1
            timer.act()
            return process
        return False

    def _push(self, at_s: float, timer: Timer) -> None:
        self._tie += 1
        heapq.heappush(self._heap, (at_s, self._tie, timer))
