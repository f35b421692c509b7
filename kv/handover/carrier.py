"""Driver of a hand-over machine: runs its actions in order and calls its tick on time. Knows no message, no asyncio.

    stream ─ hear ─▶ machine ─ actions ─▶ act ─▶ host.send, the engine, the owner
                        ▲                  │ new actions of an answer are queued behind the present ones
                        ╰──── tick ◀─ host.after(next deadline)

The machines (kv/handover/{receiver,sender}.py) decide; `KvPull` (decode) and `PrefillTask` carry out the actions.
A `StreamHost` provides stream, clock, timer and threads: driver.py on asyncio, `SimHost` of sim/ in virtual time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from .machine import Action

MAX_CHECKS = 4  # verifications of one hand-over side by side: while one thread works, the next frame is there already
MIN_DELAY_S = 0.001  # timers round to milliseconds: without it, a timer that fires early would be set again at once

Item = TypeVar("Item")
Hear = Callable[[bytes | None], None]
"""Callback for one envelope of the peer; None: the peer's direction ended."""


class Cancellable(Protocol):
    """A timer."""

    def cancel(self) -> None:
        """Stop the timer. No effect after it fired."""
        ...


class Machine(Protocol):
    """The timing interface of a hand-over machine."""

    @property
    def next_deadline_s(self) -> float | None:
        """Latest time of the next `tick` call, in seconds of the host's clock; None: no further call."""
        ...

    def tick(self, now_s: float) -> list[Action]:
        """Handle the passing of time; returns the actions that became due."""
        ...


@dataclass(frozen=True, slots=True)
class Check:
    """A verification of digests; large ones run outside the event loop."""

    holds: Callable[[], bool]  # pure; may run in another thread
    size_bytes: int
    done: Callable[[bool], None]  # called on the loop


class StreamHost(Protocol):
    """One end of a hand-over stream, with the clock, timer and threads that a `Carrier` needs."""

    def now_s(self) -> float:
        """Current time in seconds, of the clock that the machine uses."""
        ...

    def after(self, delay_s: float, act: Callable[[], None]) -> Cancellable:
        """Call `act` after `delay_s`, never from inside this call."""
        ...

    def listen(self, hear: Hear) -> None:
        """Pass every envelope that arrives to `hear`, in order, then None. Called once, before any arrives."""
        ...

    def send(self, envelope: bytes) -> None:
        """Queue an envelope to be sent in order; dropped silently when the stream is over. Never waits."""
        ...

    def close(self, *, now: bool) -> None:
        """End the stream after the queued envelopes. `now`: do not wait for the peer to read them."""
        ...

    def check(self, check: Check, answered: Callable[[bool], None]) -> None:
        """Run `check.holds` and pass its result to `answered`, at once or later. A failure to run counts as False."""
        ...

    def trace(self, action: Action) -> None:
        """Report an action before it is carried out, for debug logs and transcripts."""
        ...


class Carrier:
    """Queue of the actions of one machine, and its timer."""

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
        """Carry actions out in order. Actions added while one is carried out are queued behind the present ones."""
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
        """Set the timer to the machine's next deadline, if it has one."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due_s = self._machine.next_deadline_s
        if due_s is not None:
            self._timer = self._host.after(max(MIN_DELAY_S, due_s - self._host.now_s()), self._tick)

    def _tick(self) -> None:
        self._timer = None
        self.do(self._machine.tick(self._host.now_s()))


@dataclass(slots=True)
class _Pending:
    """A verification under way."""

    check: Check
    holds: bool | None = None  # its result


class CheckLine(Generic[Item]):
    """Queue of items handled in order, those with digests after these were verified.

    The digests of up to MAX_CHECKS items at the head of the queue are verified side by side; `done` is called in the
    items' order. An item without digests waits until all items before it are done.
    """

    def __init__(
        self, host: StreamHost, check_of: Callable[[Item], Check | None], handle: Callable[[Item], None]
    ) -> None:
        """`check_of` has no side effect; it returns None for an item without digests, which `handle` then handles."""
        self._host = host
        self._check_of = check_of
        self._handle = handle
        self._items: deque[Item] = deque()
        self._pending: deque[_Pending] = deque()
        self._is_moving = False

    def put(self, item: Item) -> None:
        """Handle an item after all earlier ones. The queue is bounded: frames have slots, and readers wait."""
        self._items.append(item)
        self._move()

    def _move(self) -> None:
        if self._is_moving:
            return
        self._is_moving = True
        try:
            while self._finish_first() or self._begin_next():
                pass
        finally:
            self._is_moving = False

    def _finish_first(self) -> bool:
        """Finish the first verification if it has a result; False: there is none."""
        if not self._pending or self._pending[0].holds is None:
            return False
        first = self._pending.popleft()
        assert first.holds is not None
        first.check.done(first.holds)
        return True

    def _begin_next(self) -> bool:
        """Begin the next item's verification, or handle it; False: it has to wait, or there is none."""
        if not self._items or len(self._pending) >= MAX_CHECKS:
            return False
        check = self._check_of(self._items[0])
        if check is None and self._must_wait():
            return False
        item = self._items.popleft()
        if check is None:
            self._handle(item)
            return True
        pending = _Pending(check)
        self._pending.append(pending)
        self._host.check(check, lambda holds: self._answered(pending, holds))
        return True

    def _must_wait(self) -> bool:
        """True if an item without digests must wait for the verifications under way."""
        return bool(self._pending)

    def _answered(self, pending: _Pending, holds: bool) -> None:
        pending.holds = holds
        self._move()
