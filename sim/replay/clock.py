"""Virtual clock of a replay: events in the order of their times, and among equal times in the order of planning."""

from __future__ import annotations

import heapq
from collections.abc import Callable


class Planned:
    """One planned call."""

    __slots__ = ("act",)

    def __init__(self, act: Callable[[float], None] | None) -> None:
        self.act = act

    def cancel(self) -> None:
        """Do not make the call."""
        self.act = None


class VirtualClock:
    """Time that jumps from event to event."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._events: list[tuple[float, int, Planned]] = []
        self._count = 0

    def at(self, at_s: float, act: Callable[[float], None]) -> Planned:
        """Call `act` with the time, not before now."""
        self._count += 1
        planned = Planned(act)
        heapq.heappush(self._events, (max(self.now_s, at_s), self._count, planned))
        return planned

    def later(self, delay_s: float, act: Callable[[float], None]) -> Planned:
        """Call `act` with the time after a delay, never before this call has returned."""
        return self.at(self.now_s + delay_s, act)

    def run(self, is_over: Callable[[], bool]) -> None:
        """Make the planned calls until `is_over`, or until none is left."""
        while self._events and not is_over():
            self.now_s, _, planned = heapq.heappop(self._events)
            if planned.act is not None:
                planned.act(self.now_s)
