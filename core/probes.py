"""Health checks of callers without a key: answered at once, few at a time, and none that says nothing for long.

grpc.aio's own handler waits for the message as long as the caller likes, and holds the call meanwhile.
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import grpc.aio

from .call_reaper import CallReaper

MAX_WAITING = 64  # calls whose message has not come; one more ends the oldest
PATIENCE_S = 5.0  # for the message, and for the answer to be taken
MAX_BYTES = 4096  # of it: the name of a service


class Probes:
    """The `Check` calls of one server."""

    def __init__(self) -> None:
        self._waiting: dict[asyncio.Timeout, None] = {}  # the oldest first
        self._reaper = CallReaper()

    @property
    def num_waiting(self) -> int:
        """Calls whose message has not come yet."""
        return len(self._waiting)

    def handler(self, check: Any) -> Any:
        """The handler of `grpc.health.v1.Health/Check` (None: there is none) within these bounds."""
        if check is None:
            return None

        async def answer(_: Any, context: Any) -> None:
            raw = await self._message(context)
            self._reaper.end_later(PATIENCE_S)
            if not isinstance(raw, bytes) or len(raw) > MAX_BYTES:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no message came, or a long one")
            try:
                message = check.request_deserializer(raw)
            except Exception:  # protobuf's DecodeError, of one of several implementations
                message = None
            if message is None:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the message is no HealthCheckRequest")
            await context.write(check.response_serializer(await check.unary_unary(message, context)))

        return grpc.stream_stream_rpc_method_handler(answer)

    async def _message(self, context: Any) -> Any:
        """The first message, or no bytes where none came in time."""
        try:
            async with asyncio.timeout(PATIENCE_S) as patience:
                self._waiting[patience] = None
                if len(self._waiting) > MAX_WAITING:
                    oldest = next(iter(self._waiting))
                    del self._waiting[oldest]
                    oldest.reschedule(0.0)
                return await context.read()
        except TimeoutError:
            return None
        finally:
            self._waiting.pop(patience, None)
