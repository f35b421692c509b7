"""Ends calls whose clients neither read the answer nor disconnect, and frees what grpc.aio keeps. Knows no service.

grpc.aio gives a server no way to cancel a call. A call is cancelled when no reference to it is left. Besides its own
task, a task of grpc.aio holds one while it waits for the client to leave. That task's coroutine is compiled, and it is
found by its reference to the call's task.
"""

from __future__ import annotations

import asyncio
import gc
import types
from typing import Any

DELAY_S = 0.05  # one search serves all calls that stall in this time
TASKS_AT_ONCE = 100  # tasks examined without a pause: a few milliseconds


class CallReaper:
    """Reaper of the stalled calls of one server."""

    def __init__(self) -> None:
        self._stalled: set[asyncio.Task[Any]] = set()
        self._sweep: asyncio.Task[None] | None = None

    def end(self, call: asyncio.Task[Any]) -> None:
        """Cancel a call's task, and within `DELAY_S` the task of grpc.aio that holds it."""
        call.cancel()
        self._stalled.add(call)
        if self._sweep is None:
            self._sweep = asyncio.create_task(self._end_all())

    def end_later(self, delay_s: float) -> None:
        """End the current call if it still runs after `delay_s`: its client does not read the answer."""
        call = asyncio.current_task()
        assert call is not None
        ending = asyncio.get_running_loop().call_later(delay_s, self.end, call)
        call.add_done_callback(lambda _: ending.cancel())

    async def _end_all(self) -> None:
        try:
            while self._stalled:
                await asyncio.sleep(DELAY_S)
                calls, self._stalled = self._stalled, set()
                ids = {id(call) for call in calls}
                for place, task in enumerate(asyncio.all_tasks()):
                    if place % TASKS_AT_ONCE == TASKS_AT_ONCE - 1:
                        await asyncio.sleep(0)
                    if _holds(task, ids):
                        task.cancel()
        finally:
            self._sweep = None


def _holds(task: asyncio.Task[Any], ids: set[int]) -> bool:
    """Return whether this task of grpc.aio holds one of the calls with these ids."""
    work = task.get_coro()
    if isinstance(work, types.CoroutineType):
        return False
    return any(id(held) in ids for scope in gc.get_referents(work) for held in gc.get_referents(scope))
