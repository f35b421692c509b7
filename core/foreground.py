"""A command that runs until it is done or told to stop, and then ends at once. Knows no server.

Ctrl-C (or SIGTERM) asks to stop; asked once more, to stop without waiting for anybody.
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
CANCEL_S = 1.2  # how long cancelled work may take to let go


class Stopped(BaseException):
    """Work was given up because of a signal. What it had made is cleaned up by whoever catches this."""


class Stop:
    """What the signals said so far."""

    def __init__(self) -> None:
        self.number = 0  # of the first signal
        self.asked = asyncio.Event()
        self.asked_again = asyncio.Event()

    def hear(self, number: int) -> None:
        """A signal came."""
        if self.asked.is_set():
            self.asked_again.set()
        self.number = self.number or number
        self.asked.set()

    @property
    def exit_code(self) -> int:
        """As shells count: 130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + self.number


async def unless(event: asyncio.Event, work: Awaitable[T]) -> T:
    """The result of `work`; it is cancelled when `event` comes first.

    Raises:
        Stopped: `event` came first.
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
    """Which of them ended first; the others are given up."""
    tasks = [asyncio.create_task(wait) for wait in waits]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    place = next(place for place, task in enumerate(tasks) if task.done())
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return place


async def orphaned(parent_pid: int | None) -> None:
    """Return when the parent is another process than this one; without a parent to watch, never."""
    while parent_pid is None or os.getppid() == parent_pid:
        await asyncio.sleep(PARENT_CHECK_S)


def run(main: Callable[[Stop], Coroutine[Any, Any, int]]) -> int:
    """Run `main` to its end and give its exit code; after `Stopped` the process ends here, with the signal's.

    Threads cannot be stopped (a download, weights being read, Ray on its way up), so that end does not wait for them.
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
    """End this process now, whatever its threads do."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
