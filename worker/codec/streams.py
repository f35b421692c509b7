"""Long streams of a worker's faces with routers and peers, so that they can be ended when the faces are replaced."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager


class Streams:
    """Handlers of streams that run now, as tasks of the server."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[object]] = set()

    def __len__(self) -> int:
        return len(self._running)

    @contextmanager
    def running(self) -> Iterator[None]:
        """The present task is the handler of a stream for as long as this lasts."""
        task = asyncio.current_task()
        assert task is not None, "a handler runs in a task"
        self._running.add(task)
        try:
            yield
        finally:
            self._running.discard(task)

    def end(self) -> None:
        """End the streams that run now: their other ends open new ones."""
        for task in self._running:
            task.cancel()
