"""Time as a value: production reads the monotonic clock, the simulator its own."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Seconds that never go back. Only differences mean anything."""

    def now_s(self) -> float:
        """Now, in seconds."""
        ...


class MonotonicClock:
    """The machine's monotonic clock."""

    def now_s(self) -> float:
        """Now, in seconds."""
        return time.monotonic()
