"""A draining worker's last wait: lets other workers fetch what it gave back. Drives departure.py on an event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable

from ...core.clock import Clock
from ...core.request import SequenceKey
from .departure import Departure


class Departing:
    """The departure of one worker, told of its drain and of every fetch."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.departure = Departure()
        self._changed = asyncio.Event()

    def gave_back(self, keys: Iterable[SequenceKey]) -> None:
        """These choices go on at other workers."""
        self.departure.gave_back(keys, self._clock.now_s())
        self._changed.set()

    def fetch_began(self, key: SequenceKey) -> None:
        """Blocks are asked for on behalf of a choice."""
        self.departure.fetch_began(key, self._clock.now_s())
        self._changed.set()

    def fetch_ended(self, key: SequenceKey, *, is_whole: bool) -> None:
        """A fetch is over."""
        self.departure.fetch_ended(key, self._clock.now_s(), is_whole=is_whole)
        self._changed.set()

    async def wait(self, most_s: float) -> int:
        """Wait until the worker may leave, for at most `most_s`; returns how many choices nobody has fetched."""
        end_s = self._clock.now_s() + most_s
        while (now_s := self._clock.now_s()) < end_s:
            until_s = self.departure.waits_until_s(now_s)
            if until_s is None:
                break
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, min(until_s, end_s) - now_s)):
                    await self._changed.wait()
        return self.departure.num_left
