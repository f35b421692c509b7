"""EngineLink between two threads: the face's event loop and the engine's step loop. Does not interpret the values.

    face: send ──▶ commands ──▶ take :engine          Both queues are bounded in items; bytes are bounded by the
    face: receive ◀── events ◀── emit :engine         hand-over's frame slots, since KV travels only against those.

A full command queue refuses commands for new work (`Submit`, `FetchBlocks`) with the answer that the engine would give.
Commands for live sequences are always accepted: they end, free or complete work, and their number per sequence is
bounded.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Sequence

from ...core.errors import Overloaded, Unavailable
from ...core.request import FinishReason
from .messages import BlocksFetched, Command, Ended, Event, FetchBlocks, Submit


class LinkStalled(Exception):
    """The face has read no events for so long that it counts as dead."""


class ThreadLink:
    """Both ends in one object; `send` and `receive` belong to the face, `take`, `emit` and `close` to the engine."""

    def __init__(self, max_commands: int = 2048, max_events: int = 8192, stall_s: float = 30.0) -> None:
        self._max_commands = max_commands
        self._max_events = max_events
        self._stall_s = stall_s
        self._lock = threading.Lock()
        self._commands_came = threading.Condition(self._lock)
        self._events_left = threading.Condition(self._lock)
        self._commands: deque[Command] = deque()
        self._events: deque[Event] = deque()
        self._is_awake = False  # `wake` was called: `take` must return though there is no command
        self._is_closed = False
        self._waiter: asyncio.Future[None] | None = None  # of `receive`, on the face's loop

    # ------------------------------------------------------------------ the face's end

    def send(self, command: Command) -> None:
        """Send the engine a command; never waits. New work beyond the bound is refused at once.

        Raises:
            Unavailable: a `Submit` after the engine has ended. Other commands are dropped then.
        """
        with self._lock:
            if self._is_closed:
                if isinstance(command, Submit):
                    raise Unavailable("this worker's engine has ended; it is being restarted", retry_after_s=1.0)
                return
            if len(self._commands) >= self._max_commands and isinstance(command, Submit | FetchBlocks):
                self._events.append(_refusal(command, self._max_commands))
                self._wake_face()
                return
            self._commands.append(command)
            self._commands_came.notify()

    async def receive(self) -> Sequence[Event]:
        """Wait for events; returns all present ones, in order. Empty: the engine has ended. One reader only."""
        while True:
            with self._lock:
                if self._events:
                    batch = list(self._events)
                    self._events.clear()
                    self._events_left.notify_all()
                    return batch
                if self._is_closed:
                    return []
                assert self._waiter is None, "one reader only"
                waiter = self._waiter = asyncio.get_running_loop().create_future()
            try:
                await waiter
            finally:
                with self._lock:
                    if self._waiter is waiter:
                        self._waiter = None

    # ------------------------------------------------------------------ the engine's end

    def take(self, max_commands: int, timeout_s: float | None) -> list[Command]:
        """Take up to `max_commands` commands; waits for the first, or a `wake`, for `timeout_s` (None: no limit)."""
        with self._lock:
            if not self._commands and not self._is_awake and timeout_s != 0:
                self._commands_came.wait(timeout_s)
            self._is_awake = False
            return [self._commands.popleft() for _ in range(min(max_commands, len(self._commands)))]

    def emit(self, events: Sequence[Event]) -> None:
        """Send the face events; waits while its queue is full.

        Raises:
            LinkStalled: the face read nothing for `stall_s`.
        """
        if not events:
            return
        deadline_s = time.monotonic() + self._stall_s
        with self._lock:
            while len(self._events) >= self._max_events:
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    raise LinkStalled(f"the face took none of {len(self._events)} events for {self._stall_s} s")
                self._events_left.wait(left_s)
            self._events += events
            self._wake_face()

    def wake(self) -> None:
        """Make `take` return. May be called from any thread."""
        with self._lock:
            self._is_awake = True
            self._commands_came.notify()

    def close(self, last: Sequence[Event] = ()) -> None:
        """End the link: `receive` returns the remaining events, an `Ended` per waiting submit, `last`, then nothing."""
        with self._lock:
            for command in self._commands:
                if isinstance(command, Submit):
                    self._events.append(_ended(command, Unavailable.code, "this worker's engine has ended"))
            self._commands.clear()
            self._events += last
            self._is_closed = True
            self._wake_face()

    def _wake_face(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None:
            try:
                waiter.get_loop().call_soon_threadsafe(_set, waiter)
            except RuntimeError:  # the face's loop is closed, so the events will not be read
                self._events_left.notify_all()


def _set(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def _refusal(command: Submit | FetchBlocks, max_commands: int) -> Event:
    if isinstance(command, FetchBlocks):
        return BlocksFetched(command.fetch_id, 0, ())
    return _ended(command, Overloaded.code, f"{max_commands} commands wait for the engine already: try again later")


def _ended(submit: Submit, code: str, message: str) -> Ended:
    return Ended(submit.key, FinishReason.ERROR, code, message)
