"""A synchronous object that runs a server on its own event loop, so that a Ray actor can drain.

An async Ray actor cannot catch SIGTERM, so ours are synchronous: the loop runs in a thread, the actor's main thread
waits in `run` and gets the signal. One coroutine method, of whatever name, would make the actor async. Knows no Ray.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from .errors import DeviceFault
from .process_settings import keep_present_objects


class Server(Protocol):
    """Server that `Hosted` can run."""

    ended: asyncio.Event  # set when serving has ended, by `stop` or by a fault
    fault: DeviceFault | None  # why it ended, if a device is the cause

    async def start(self) -> None:
        """Start to serve; returns when ready."""
        ...

    async def stop(self, grace_s: float) -> None:
        """Drain for at most `grace_s`, then free everything."""
        ...


class Hosted:
    """Host of one `Server`, which runs in a thread until it is stopped.

    `build` is called in that thread and makes the server.
    """

    def __init__(self, build: Callable[[], Server], grace_s: float) -> None:
        self._grace_s = grace_s
        self._end: str | None = None
        self._wanted_gone = threading.Event()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda *_: self._wanted_gone.set())
        self._loop = self._new_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="serve", daemon=True)
        self._thread.start()
        self._server = self._call(_build(build), None)
        self._call(self._server.start(), None)
        asyncio.run_coroutine_threadsafe(_tell_end(self._server, self._wanted_gone), self._loop)

    def _new_loop(self) -> asyncio.AbstractEventLoop:
        """The loop that the server runs on."""
        return asyncio.new_event_loop()

    def run(self) -> str:
        """Block until `stop`, SIGTERM or the server's own end; then drain. Returns a description of the end.

        A second call, of another supervisor, follows the first one and says the same.

        Raises:
            DeviceFault: the server ended because of its device.
        """
        if self._end is None:
            self._end = self._run()
        if self._server.fault is not None:
            raise self._server.fault
        return self._end

    def _run(self) -> str:
        keep_present_objects()
        self._wanted_gone.wait()
        is_broken = self._server.ended.is_set()
        grace_s = 0.0 if is_broken else self._grace_s
        self._call(self._server.stop(grace_s), grace_s + 5.0)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5.0)
        return "ended by its own fault; its log has more" if is_broken else "stopped"

    def stop(self) -> None:
        """Ask `run` to drain and return."""
        self._wanted_gone.set()

    def pid(self) -> int:
        """Id of the process that hosts the server."""
        return os.getpid()

    def _call(self, coroutine: Coroutine[Any, Any, Any], timeout_s: float | None) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout_s)


async def _build(build: Callable[[], Server]) -> Server:
    return build()


async def _tell_end(server: Server, told: threading.Event) -> None:
    await server.ended.wait()
    told.set()
