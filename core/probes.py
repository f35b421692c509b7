"""Health checks of callers without a key, with bounds on the number of waiting calls and on their duration.

grpc.aio's own handler waits for the message without a timeout, and holds the call meanwhile.
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import grpc.aio

from .call_reaper import CallReaper

MAX_WAITING = 64  # calls whose message has not arrived; one more ends the oldest
PROBE_TIMEOUT_S = 5.0  # timeout of the message, and of the reading of the answer
MAX_BYTES = 4096  # largest message: it holds the name of a service


class Probes:
    """Bounded `Check` calls of one server."""

    def __init__(self) -> None:
        self._waiting: dict[asyncio.Timeout, None] = {}  # the oldest first
        self._reaper = CallReaper()

    @property
    def num_waiting(self) -> int:
        """Calls whose message has not come yet."""
        return len(self._waiting)

    def handler(self, check: Any) -> Any:
        """Wrap the handler of `grpc.health.v1.Health/Check` in these bounds. None stays None."""
        if check is None:
            return None

        async def answer(_: Any, context: Any) -> None:
            raw = await self._message(context)
            self._reaper.end_later(PROBE_TIMEOUT_S)
            if not isinstance(raw, bytes) or len(raw) > MAX_BYTES:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no message came, or a long one")
            try:
                message = check.request_deserializer(raw)
            except Exception:  # DecodeError: its class depends on protobuf's implementation
                message = None
            if message is None:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the message is no HealthCheckRequest")
            await context.write(check.response_serializer(await check.unary_unary(message, context)))

        return grpc.stream_stream_rpc_method_handler(answer)

    async def _message(self, context: Any) -> Any:
        """Return the first message as bytes, or something else if none arrived in time."""
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S) as patience:
                self._waiting[patience] = None
                if len(self._waiting) > MAX_WAITING:
                    oldest = next(iter(self._waiting))
                    del self._waiting[oldest]
                    if not oldest.expired():  # its time may be over, and its task not have run since
                        oldest.reschedule(0.0)
                return await context.read()
        except TimeoutError:
            return None
        finally:
            self._waiting.pop(patience, None)
