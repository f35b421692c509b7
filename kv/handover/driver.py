"""One end of a hand-over stream on an event loop: reads, writes in order, and verifies digests in threads.

Implements `StreamHost` (kv/handover/carrier.py) for both sides. Knows no message and no machine.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial

from ...core.clock import Clock
from .carrier import MAX_CHECKS, Check, Hear
from .machine import Action, Send
from .transports.grpc import ByteStream, OpenedStream

log = logging.getLogger(__name__)

INLINE_BYTES = 64 << 10  # smaller checks run on the loop: a thread's round trip costs more
FLUSH_S = 0.5  # most time for the queued envelopes to leave after `close`


class Driver:
    """Driver of the called side; `run` serves the stream and returns when it may be closed."""

    def __init__(self, stream: ByteStream, clock: Clock, executor: Executor) -> None:
        self._stream = stream
        self._clock = clock
        self._executor = executor
        self._hear: Hear = lambda _: None
        self._queue: deque[bytes] = deque()
        self._wake = asyncio.Event()
        self._closing = asyncio.Event()
        self._closes_now = True
        self._checks: set[asyncio.Future[bool]] = set()

    # ------------------------------------------------------------------ StreamHost

    def now_s(self) -> float:
        """Implements `StreamHost.now_s`."""
        return self._clock.now_s()

    def after(self, delay_s: float, act: Callable[[], None]) -> asyncio.TimerHandle:
        """Implements `StreamHost.after`."""
        return asyncio.get_running_loop().call_later(delay_s, act)

    def listen(self, hear: Hear) -> None:
        """Implements `StreamHost.listen`."""
        self._hear = hear

    def send(self, envelope: bytes) -> None:
        """Implements `StreamHost.send`. The machine bounds the queue by credits, beats and silence."""
        if not self._closing.is_set():
            self._queue.append(envelope)
            self._wake.set()

    def close(self, *, now: bool) -> None:
        """Implements `StreamHost.close`."""
        self._closes_now = now
        self._closing.set()
        self._wake.set()

    def check(self, check: Check, answered: Callable[[bool], None]) -> None:
        """Implements `StreamHost.check`. Numpy frees the interpreter while it works in a thread."""
        if check.size_bytes <= INLINE_BYTES:
            answered(check.holds())
            return
        try:
            future = asyncio.get_running_loop().run_in_executor(self._executor, check.holds)
        except RuntimeError:  # the executor is shut down: the worker ends
            answered(False)
            return
        self._checks.add(future)
        future.add_done_callback(partial(self._checked, answered))

    def trace(self, action: Action) -> None:
        """Implements `StreamHost.trace`."""
        if log.isEnabledFor(logging.DEBUG) and not isinstance(action, Send):
            log.debug("%s", action)

    # ------------------------------------------------------------------ the stream

    async def run(self) -> None:
        """Serve the stream until its machine closed it and the queue is sent, or until FLUSH_S after the close."""
        reader = asyncio.create_task(self._read())
        writer = asyncio.create_task(self._write())
        closing = asyncio.create_task(self._closing.wait())
        try:
            await asyncio.wait([closing])
            await asyncio.wait([writer], timeout=FLUSH_S)
            if not self._closes_now:
                await self._end(reader)
        finally:
            self._closing.set()
            tasks = (reader, writer, closing)
            for task in tasks:
                task.cancel()
            for check in self._checks:
                check.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _end(self, reader: asyncio.Task[None]) -> None:
        """Hook: finish the stream after the last envelope was sent."""

    async def _read(self) -> None:
        while (envelope := await self._stream.receive()) is not None:
            self._hear(envelope)
            await self._has_room()
        self._hear(None)

    async def _has_room(self) -> None:
        """Hook: wait until the next envelope may be read."""

    async def _write(self) -> None:
        while True:
            while self._queue:
                try:
                    await self._stream.send(self._queue.popleft())
                except ConnectionError:
                    self._queue.clear()  # the reader sees the end too, and tells the machine
                    return
            if self._closing.is_set():
                return
            self._wake.clear()
            await self._wake.wait()

    def _checked(self, answered: Callable[[bool], None], future: asyncio.Future[bool]) -> None:
        self._checks.discard(future)
        if future.cancelled():
            return
        error = future.exception()
        if error is not None:
            log.error("digests could not be verified", exc_info=error)
        answered(error is None and future.result())


class ClientDriver(Driver):
    """Driver of the side that opened the stream: serves it from construction on, and closes it.

    The next envelope is read when fewer than MAX_CHECKS verifications run: a peer faster than our threads has to wait.
    """

    def __init__(self, stream: OpenedStream, clock: Clock, executor: Executor, linger_s: float) -> None:
        """`linger_s`: longest wait for the peer to end its direction after our last envelope, in seconds."""
        super().__init__(stream, clock, executor)
        self._client = stream
        self._linger_s = linger_s
        self._task = asyncio.create_task(self._serve())

    async def closed(self) -> None:
        """Wait until the stream is gone."""
        await asyncio.wait([self._task])

    async def _serve(self) -> None:
        try:
            await self.run()
        finally:
            self._client.close()

    async def _end(self, reader: asyncio.Task[None]) -> None:
        await self._client.finish()
        await asyncio.wait([reader], timeout=self._linger_s)

    async def _has_room(self) -> None:
        while len(self._checks) >= MAX_CHECKS:
            await asyncio.wait(self._checks, return_when=asyncio.FIRST_COMPLETED)


class FetchDriver(ClientDriver):
    """Driver of a fetch. While it is held, no further frame is read: the source has to wait."""

    def __init__(self, stream: OpenedStream, clock: Clock, executor: Executor, linger_s: float) -> None:
        self._is_free = asyncio.Event()
        self._is_free.set()
        super().__init__(stream, clock, executor, linger_s)

    def hold(self, is_held: bool) -> None:
        """Implements `FetchHost.hold`."""
        if is_held:
            self._is_free.clear()
        else:
            self._is_free.set()

    async def _has_room(self) -> None:
        await super()._has_room()
        await self._is_free.wait()
