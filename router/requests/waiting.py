"""Requests that no worker computes now, each with the timer that ends its wait. Pure."""

from __future__ import annotations

from collections.abc import Callable

from .state import Timer
from .surroundings import Driver


class Waiting:
    """Waiting requests by name, in the order in which they began to wait."""

    def __init__(self, driver: Driver, look_again: Callable[[str, float], None]) -> None:
        """`look_again(name, now_s)` is called for every waiting request after `wake`; it may `remove` it."""
        self.timers: dict[str, Timer] = {}
        self._driver = driver
        self._look_again = look_again
        self.wake_due: Timer | None = None

    def __contains__(self, name: str) -> bool:
        return name in self.timers

    def __len__(self) -> int:
        return len(self.timers)

    def add(self, name: str, delay_s: float, act: Callable[[float], None]) -> None:
        """A request waits for `delay_s` at most; then `act` is called with the time."""
        self.timers[name] = self._driver.later(delay_s, act)

    def remove(self, name: str) -> bool:
        """End a request's wait. False: it does not wait."""
        timer = self.timers.pop(name, None)
        if timer is None:
            return False
        timer.cancel()
        return True

    def wake(self) -> None:
        """Let all waiting requests look for a worker soon, once however often this is called until then."""
        if self.timers and self.wake_due is None:
            self.wake_due = self._driver.later(0.0, self._wake)

    def _wake(self, now_s: float) -> None:
        self.wake_due = None
        for name in list(self.timers):
            self._look_again(name, now_s)
