"""Watches one GPU: a thread that polls, a thread that waits for XIDs, and the verdict on the event loop.

NVML may hang with its driver, so no call is made on the loop, and nobody waits for the threads: they are daemons, their
silence is a verdict, and a thread that hangs is left behind at the end. Decides nothing: verdict.py does.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

from ...core.clock import Clock
from .nvml import NvmlReader
from .reading import DeviceIdentity, Failure, ReadError, Reading
from .verdict import DeviceHealth, HealthLimits, Verdict

POLL_S = 1.0
MOST_SHARE = 0.2  # of a thread's time that polls may take: a slow NVML is asked less often
EVENT_TIMEOUT_MS = 500
LOOK_S = 0.25  # between two looks at the verdict on the loop
FIRST_READ_S = 5.0  # longest wait for the first reading at the start of a worker
JOIN_S = 0.2
WARN_EVERY_S = 60.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GpuState:
    """State of the watched device at one time."""

    identity: DeviceIdentity
    verdict: Verdict
    reading: Reading | None  # the last one
    age_s: float | None  # of the last reading; None: there was none
    num_xids: tuple[tuple[int, int], ...] = ()  # code, number; ascending


class GpuMonitor:
    """Health of one device. `start` it, look at `state`; `on_change` is called on the loop with every new verdict."""

    def __init__(
        self,
        reader: NvmlReader,
        name: str,
        clock: Clock,
        on_change: Callable[[Verdict], None],
        *,
        limits: HealthLimits | None = None,
        poll_s: float | None = None,
    ) -> None:
        """`name`: the device as the operator names it, until NVML tells its UUID."""
        self._reader = reader
        self._clock = clock
        self._on_change = on_change
        self._poll_s = POLL_S if poll_s is None else poll_s
        self._health = DeviceHealth(clock.now_s(), limits)
        self._identity = DeviceIdentity(name)
        self._read_s: float | None = None
        self._lock = threading.Lock()  # over health, identity and time of the reading
        self._opened, self._first, self._stopping = threading.Event(), threading.Event(), threading.Event()
        self._warned_s: float | None = None
        self._is_absent = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._told = Verdict()
        self._looker: asyncio.Task[None] | None = None
        self._threads = [
            threading.Thread(target=self._poll, name="gpu poll", daemon=True),
            threading.Thread(target=self._hear, name="gpu events", daemon=True),
        ]

    # ------------------------------------------------------------------ on the loop

    async def start(self) -> Verdict | None:
        """Start watching; returns the verdict of the first reading, or that of none after FIRST_READ_S.

        None: there is nothing to watch, and no thread runs.
        """
        self._loop = asyncio.get_running_loop()
        for thread in self._threads:
            thread.start()
        await asyncio.to_thread(self._first.wait, FIRST_READ_S)
        if self._is_absent:
            await self.close()
            return None
        self._told = self.state().verdict
        self._looker = asyncio.create_task(self._look_for_ever(), name="gpu verdict")
        return self._told

    async def close(self) -> None:
        """Stop watching. Returns soon, also when NVML hangs."""
        self._stopping.set()
        if self._looker is not None:
            self._looker.cancel()
            await asyncio.gather(self._looker, return_exceptions=True)
        await asyncio.to_thread(self._join)

    def state(self) -> GpuState:
        """State now."""
        now_s = self._clock.now_s()
        with self._lock:
            return GpuState(
                self._identity,
                self._health.verdict(now_s),
                self._health.last,
                None if self._read_s is None else now_s - self._read_s,
                tuple(sorted(self._health.num_xids.items())),
            )

    async def _look_for_ever(self) -> None:
        while True:
            self._look()
            await asyncio.sleep(LOOK_S)

    def _look(self) -> None:
        if self._looker is None or self._stopping.is_set():
            return  # the first verdict is the result of `start`
        verdict = self.state().verdict
        if verdict != self._told:
            self._told = verdict
            self._on_change(verdict)

    # ------------------------------------------------------------------ in the threads

    def _poll(self) -> None:
        while not self._stopping.is_set():
            began_s = self._clock.now_s()
            try:
                if not self._opened.is_set():
                    identity = self._reader.open()
                    with self._lock:
                        self._identity = identity
                    self._opened.set()
                reading = self._reader.read()
            except ReadError as error:
                if error.kind is Failure.ABSENT and self._read_s is None:
                    _log.info("no GPU is watched: %s", error)
                    self._is_absent = True
                    self._first.set()
                    return
                self._take_failure(error)
            else:
                now_s = self._clock.now_s()
                with self._lock:
                    self._health.read(reading, now_s)
                    self._read_s = now_s
                self._first.set()
            self._wake()
            took_s = self._clock.now_s() - began_s
            self._stopping.wait(max(self._poll_s, took_s / MOST_SHARE))

    def _take_failure(self, error: ReadError) -> None:
        now_s = self._clock.now_s()
        with self._lock:
            self._health.failed(error.kind, str(error))
        if error.kind in (Failure.UNREADABLE, Failure.ABSENT):
            self._opened.clear()  # with new handles it may work, e.g. after a reset of the driver
        else:
            self._first.set()
        if self._warned_s is None or now_s - self._warned_s >= WARN_EVERY_S:
            self._warned_s = now_s
            _log.warning("NVML gave no reading of %s: %s", self._identity.uuid, error)

    def _hear(self) -> None:
        """Wait for XIDs. After an error the set of events is made anew, because a reset of the driver voids it."""
        while not self._stopping.is_set():
            if not self._opened.wait(EVENT_TIMEOUT_MS / 1e3):
                continue
            try:
                events = self._reader.open_events()
            except ReadError as error:
                _log.debug("events of %s: %s", self._identity.uuid, error)
                self._stopping.wait(self._poll_s)
                continue
            if events is None:
                _log.info("%s tells no XIDs; its error counts are polled", self._identity.uuid)
                return
            try:
                self._hear_from(events)
            except ReadError as error:
                _log.debug("events of %s: %s", self._identity.uuid, error)
                self._stopping.wait(self._poll_s)
            finally:
                self._reader.close_events(events)

    def _hear_from(self, events: object) -> None:
        while not self._stopping.is_set():
            code = self._reader.next_xid(events, EVENT_TIMEOUT_MS, self._identity.instance)
            if code is None:
                continue
            with self._lock:
                self._health.xid(code, self._clock.now_s())
            _log.warning("%s: XID %d", self._identity.uuid, code)
            self._wake()

    def _wake(self) -> None:
        """Look at the verdict on the loop, now."""
        if self._loop is not None and not self._stopping.is_set():
            try:
                self._loop.call_soon_threadsafe(self._look)
            except RuntimeError:  # the loop is closed
                self._stopping.set()

    def _join(self) -> None:
        for thread in self._threads:
            if thread.is_alive():
                thread.join(JOIN_S)
        if not any(thread.is_alive() for thread in self._threads):
            self._reader.close()
