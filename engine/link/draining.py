"""The wait of a drain: until nothing runs any more, for so long at most, or until the drain is undone."""

from __future__ import annotations

import asyncio


class Draining:
    """Whether a service refuses new work. A drain that was undone ends nothing, also if another one began meanwhile."""

    def __init__(self) -> None:
        self.is_on = False
        self._undone = asyncio.Event()

    async def until(self, idle: asyncio.Event, timeout_s: float) -> bool:
        """Drain until `idle` is set, for `timeout_s` at most. False: it was undone meanwhile."""
        self.is_on = True
        undone = self._undone
        waits = [asyncio.create_task(event.wait()) for event in (idle, undone)]
        try:
            await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        return not undone.is_set()

    def undo(self) -> None:
        """Take new work again."""
        self.is_on = False
        self._undone.set()
        self._undone = asyncio.Event()
