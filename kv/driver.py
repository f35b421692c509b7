"""Carries out what a hand-over machine decides on its stream: envelopes leave in order, ticks come in time.

The machines (kv/handover_*.py) are pure; this is the part with an event loop, for both sides. Knows no message.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

from .transport import ByteStream

MIN_DELAY_S = 0.001  # timers round to milliseconds: one that fires early must not spin
FLUSH_S = 0.5  # how long the last words may take when nobody waits for the answer


class Driver:
    """The writing half and the timer of one stream.

    `deadline_s` says when the machine wants its next tick (None: never again), in monotonic seconds; `tick` is called
    then. Whoever feeds the machine calls `rearm` afterwards.
    """

    def __init__(self, stream: ByteStream, deadline_s: Callable[[], float | None], tick: Callable[[], None]) -> None:
        self._stream = stream
        self._deadline_s = deadline_s
        self._tick = tick
        self._queue: deque[bytes] = deque()
        self._wake = asyncio.Event()
        self._is_closing = False
        self._is_broken = False
        self._timer: asyncio.TimerHandle | None = None
        self._writer = asyncio.create_task(self._write())

    def put(self, envelope: bytes) -> None:
        """Let an envelope leave after those before it. Bounded by the machine: credits, beats and silence."""
        if not self._is_closing:
            self._queue.append(envelope)
            self._wake.set()

    def rearm(self) -> None:
        """Set the timer to the machine's next deadline."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        deadline_s = self._deadline_s()
        if deadline_s is not None and not self._is_closing:
            delay_s = max(MIN_DELAY_S, deadline_s - time.monotonic())
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._fire)

    async def flush(self, timeout_s: float = FLUSH_S) -> None:
        """Take nothing more, wait until everything left (or the peer does not read it in time), stop the timer."""
        self._is_closing = True
        self._wake.set()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        await asyncio.wait([self._writer], timeout=timeout_s)
        self.stop()
        await asyncio.gather(self._writer, return_exceptions=True)

    def stop(self) -> None:
        """End timer and writer at once; what waits does not leave. Harmless after `flush`."""
        self._is_closing = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._writer.cancel()

    def _fire(self) -> None:
        self._timer = None
        self._tick()

    async def _write(self) -> None:
        while not self._is_broken:
            while self._queue:
                try:
                    await self._stream.send(self._queue.popleft())
                except ConnectionError:
                    self._is_broken = True  # the reader sees the end too, and tells the machine
                    self._queue.clear()
                    return
            if self._is_closing:
                return
            self._wake.clear()
            await self._wake.wait()
