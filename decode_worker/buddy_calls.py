"""Calls of the journal to other workers, on an event loop. Implements `Buddies` of journaling.py; decides nothing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import grpc

from ..kv.handover.transports.grpc import Channels

log = logging.getLogger(__name__)


class BuddyCalls:
    """Blocks.Keep over gRPC. Implements `Buddies`."""

    def __init__(self, channels: Channels) -> None:
        self._channels = channels
        self._tasks: set[asyncio.Task[None]] = set()

    def keep(self, address: str, request: bytes, timeout_s: float, answered: Callable[[bytes | None], None]) -> None:
        """Implements `Buddies.keep`."""
        task = asyncio.create_task(self._keep(address, request, timeout_s, answered))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def after(self, delay_s: float, act: Callable[[], None]) -> asyncio.TimerHandle:
        """Implements `Buddies.after`."""
        return asyncio.get_running_loop().call_later(delay_s, act)

    def close(self) -> None:
        """Implements `Buddies.close`."""
        for task in self._tasks:
            task.cancel()

    async def _keep(
        self, address: str, request: bytes, timeout_s: float, answered: Callable[[bytes | None], None]
    ) -> None:
        reply: bytes | None = None
        try:
            reply = await self._channels.keep(address, request, timeout_s)
        except grpc.RpcError as error:
            log.debug("the buddy at %s does not answer: %s", address, error)
        finally:
            answered(reply)
