"""Thread pools for rendering and tokenising: few texts at once, only one large one. Knows no request.

Callers stop waiting at their deadline. A thread cannot be stopped, so work past its deadline keeps its thread until it
ends; work that has not begun is cancelled.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from ...core.errors import DeadlineExceeded

LARGE_CHARS = 64 << 10
MAX_AT_ONCE = max(2, min(4, os.cpu_count() or 2))  # small texts; one large text is processed beside them

T = TypeVar("T")


class TextWork:
    """Thread pools for texts; one per router."""

    def __init__(self, max_at_once: int = MAX_AT_ONCE) -> None:
        self._small = ThreadPoolExecutor(max_at_once, "texts")
        self._large = ThreadPoolExecutor(1, "large-texts")

    async def run(
        self, work: Callable[[], T], num_chars: int, timeout_s: float, ended: Callable[[], None] = lambda: None
    ) -> T:
        """Run `work` on a text of about `num_chars` characters; returns its result.

        `ended` is called on the event loop when `work` has ended or was cancelled, which may be after the timeout.

        Raises:
            DeadlineExceeded: it took longer than `timeout_s`, the wait for a thread included.
        """
        loop = asyncio.get_running_loop()
        future: Future[T] = (self._large if num_chars > LARGE_CHARS else self._small).submit(work)
        future.add_done_callback(lambda _: loop.is_closed() or loop.call_soon_threadsafe(ended))
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.wrap_future(future)
        except TimeoutError:
            if future.done() and not future.cancelled() and future.exception() is not None:
                raise
            raise DeadlineExceeded(
                f"reading the prompt took longer than the request's {timeout_s:g} s; shorten it, or allow more time"
            ) from None
