"""Time as a value: production reads the monotonic clock, the simulator its own."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Clock in seconds that never goes back. Only differences of its readings have a meaning."""

    def now_s(self) -> float:
        """Now, in seconds."""
        ...


class MonotonicClock:
    """The machine's monotonic clock."""

    def now_s(self) -> float:
        """Now, in seconds."""
        return time.monotonic()
