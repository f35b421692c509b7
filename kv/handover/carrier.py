"""Carries out a hand-over machine's actions in their order and calls its tick in time. Knows no message, no asyncio.

    stream ─ hear ─▶ machine ─ actions ─▶ act ─▶ host.send, the engine, the owner
                        ▲                  │ an answer's actions come after those before it
                        ╰──── tick ◀─ host.after(next deadline)

The machines (kv/handover/{receiver,sender}.py) decide; `KvPull` (decode) and `PrefillTask` carry out the actions.
A `StreamHost` gives them stream, clock, timer and threads: driver.py on asyncio, sim/handovers.py in virtual time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from .machine import Action

MIN_DELAY_S = 0.001  # timers round to milliseconds: one that fires early must not spin

Item = TypeVar("Item")
Hear = Callable[[bytes | None], None]
"""Takes one envelope of the peer; None: the peer's direction ended."""


class Cancellable(Protocol):
    """A timer."""

    def cancel(self) -> None:
        """Do not fire. Harmless afterwards."""
        ...


class Machine(Protocol):
    """A hand-over machine, as far as time concerns it."""

    @property
    def next_deadline_s(self) -> float | None:
        """When to call `tick` at the latest; None: never again."""
        ...

    def tick(self, now_s: float) -> list[Action]:
        """Time passed."""
        ...


@dataclass(frozen=True, slots=True)
class Check:
    """Digests to be verified, away from the loop if they are many."""

    holds: Callable[[], bool]  # pure; may run in another thread
    size_bytes: int
    done: Callable[[bool], None]  # called on the loop


class StreamHost(Protocol):
    """One end of a hand-over stream with all that a machine's carrier needs."""

    def now_s(self) -> float:
        """Seconds of the clock that the machine is told."""
        ...

    def after(self, delay_s: float, act: Callable[[], None]) -> Cancellable:
        """Call `act` later, never at once."""
        ...

    def listen(self, hear: Hear) -> None:
        """Give every envelope that arrives to `hear`, in order, then None. Called once, before anything arrives."""
        ...

    def send(self, envelope: bytes) -> None:
        """Let an envelope leave after those before it; lost silently when the stream is over. Never waits."""
        ...

    def close(self, *, now: bool) -> None:
        """End the stream after what was sent. `now`: do not wait for the peer to read it."""
        ...

    def check(self, check: Check, answered: Callable[[bool], None]) -> None:
        """Run `check.holds`, and give its result to `answered`: at once or later. A failure to run is a False."""
        ...

    def trace(self, action: Action) -> None:
        """An action is about to be carried out. For debug logs and transcripts."""
        ...


class Carrier:
    """Actions of one machine, in order, and its timer."""

    def __init__(
        self, machine: Machine, host: StreamHost, act: Callable[[Action], None], counted: Callable[[], None]
    ) -> None:
        """`counted` is called after every event of the machine, whose counters may have grown."""
        self._machine = machine
        self._host = host
        self._act = act
        self._counted = counted
        self._todo: deque[Action] = deque()
        self._is_doing = False
        self._timer: Cancellable | None = None

    def do(self, actions: Sequence[Action]) -> None:
        """Carry actions out in order; those that an action's answer adds come after the ones before it."""
        self._counted()
        self._todo += actions
        if self._is_doing:
            return
        self._is_doing = True
        try:
            while self._todo:
                action = self._todo.popleft()
                self._host.trace(action)
                self._act(action)
        finally:
            self._is_doing = False
        self.rearm()

    def rearm(self) -> None:
        """Set the timer to the machine's next deadline; a machine that is over has none."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due_s = self._machine.next_deadline_s
        if due_s is not None:
            self._timer = self._host.after(max(MIN_DELAY_S, due_s - self._host.now_s()), self._tick)

    def _tick(self) -> None:
        self._timer = None
        self.do(self._machine.tick(self._host.now_s()))


class CheckLine(Generic[Item]):
    """Items handled one after the other: those behind one whose digests are being verified wait for the verdict."""

    def __init__(self, host: StreamHost, handle: Callable[[Item], Check | None]) -> None:
        """`handle` takes an item, or returns the check whose `done` takes it."""
        self._host = host
        self._handle = handle
        self._items: deque[Item] = deque()
        self._is_checking = False
        self._is_moving = False

    def put(self, item: Item) -> None:
        """Handle an item after all before it. Bounded by the machine: frames have slots, and readers wait."""
        self._items.append(item)
        self._move()

    def _move(self) -> None:
        if self._is_moving:
            return
        self._is_moving = True
        try:
            while self._items and not self._is_checking:
                check = self._handle(self._items.popleft())
                if check is not None:
                    self._is_checking = True
                    self._host.check(check, lambda holds, done=check.done: self._answered(done, holds))  # type: ignore[misc]
        finally:
            self._is_moving = False

    def _answered(self, done: Callable[[bool], None], holds: bool) -> None:
        try:
            done(holds)
        finally:
            self._is_checking = False
        self._move()
