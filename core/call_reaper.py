"""Ends calls whose clients neither take nor leave, with all that grpc.aio keeps of them. Knows no service.

A server cannot cancel a call there. A call is cancelled when nobody holds it any more, and beside its own task it is
held by one of grpc.aio, which waits for the client to leave. That one is compiled, and it holds the call's task.
"""

from __future__ import annotations

import asyncio
import gc
import types
from typing import Any

DELAY_S = 0.05  # calls that stall together are looked for together
TASKS_AT_ONCE = 100  # looked at without a pause: a few milliseconds


class CallReaper:
    """Ends the stalled calls of one server."""

    def __init__(self) -> None:
        self._stalled: set[asyncio.Task[Any]] = set()
        self._sweep: asyncio.Task[None] | None = None

    def end(self, call: asyncio.Task[Any]) -> None:
        """Cancel a call, and soon the one that holds it."""
        call.cancel()
        self._stalled.add(call)
        if self._sweep is None:
            self._sweep = asyncio.create_task(self._end_all())

    def end_later(self, delay_s: float) -> None:
        """End the current call if it still goes on after `delay_s`: its client does not take the answer."""
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
    """Whether a task is one of grpc.aio's that holds a call."""
    work = task.get_coro()
    if isinstance(work, types.CoroutineType):
        return False
    return any(id(held) in ids for scope in gc.get_referents(work) for held in gc.get_referents(scope))
