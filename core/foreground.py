"""Runs a command in the foreground until it ends or a signal stops it. Knows no server.

The first Ctrl-C or SIGTERM asks the command to stop; the second asks it to stop without waiting.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")

PARENT_CHECK_S = 0.5
CANCEL_S = 1.2  # longest wait for cancelled work to end


class Stopped(BaseException):
    """A signal ended the work early. The code that catches this cleans up after the work."""


class Stop:
    """State of the stop signals received so far."""

    def __init__(self) -> None:
        self.number = 0  # number of the first signal; 0: none yet
        self.asked = asyncio.Event()
        self.asked_again = asyncio.Event()

    def hear(self, number: int) -> None:
        """Record a signal."""
        if self.asked.is_set():
            self.asked_again.set()
        self.number = self.number or number
        self.asked.set()

    @property
    def exit_code(self) -> int:
        """Exit code by the convention of shells: 130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + self.number


async def unless(event: asyncio.Event, work: Awaitable[T]) -> T:
    """Wait for `work` and return its result; cancel it if `event` is set first.

    Raises:
        Stopped: `event` was set first.
    """
    working = asyncio.ensure_future(work)
    waiting = asyncio.create_task(event.wait())
    try:
        await asyncio.wait({working, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Stopped
        return working.result()
    finally:
        for task in (working, waiting):
            task.cancel()
        await asyncio.wait({working}, timeout=CANCEL_S)


async def first(*waits: Coroutine[Any, Any, Any]) -> int:
    """Return the index of the coroutine that ends first; the others are cancelled."""
    tasks = [asyncio.create_task(wait) for wait in waits]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    place = next(place for place, task in enumerate(tasks) if task.done())
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return place


async def orphaned(parent_pid: int | None) -> None:
    """Return when the process `parent_pid` is not this process's parent any more. None: never return."""
    while parent_pid is None or os.getppid() == parent_pid:
        await asyncio.sleep(PARENT_CHECK_S)


def run(main: Callable[[Stop], Coroutine[Any, Any, int]]) -> int:
    """Run `main` and return its exit code. After `Stopped` the process ends here, with the exit code of the signal.

    Threads cannot be stopped (a download, weights being read, the start of Ray), so this end does not wait for them.
    """
    return asyncio.run(_whole(main))


async def _whole(main: Callable[[Stop], Coroutine[Any, Any, int]]) -> int:
    stop = Stop()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.hear, number)
    try:
        return await main(stop)
    except Stopped:
        leave(stop.exit_code)


def leave(code: int) -> NoReturn:
    """End this process now, without waiting for its threads."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
