"""Client of the Announce service: one stream to every router, kept open. Knows no request and no engine."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass

import grpc
import grpc.aio

from ..core.inside import InsideChannel
from ..core.lease import WORKER_LEASE
from ..kv.handover.transports.grpc import CHANNEL_OPTIONS
from ..protos import common_pb2, worker_pb2, worker_pb2_grpc

log = logging.getLogger(__name__)

LEAVE_TIMEOUT_S = 0.5  # how long a leaving worker waits for its last word to leave
WARN_AFTER_S = 15.0  # that a router is not there
WARN_INTERVAL_S = 60.0  # the same, or that we have different keys


@dataclass(frozen=True, slots=True)
class Retry:
    """Waits between attempts to reach a router: exponential, bounded, without an end."""

    first_s: float = 0.1
    longest_s: float = 2.0

    def wait_s(self, attempt: int) -> float:
        """Seconds to wait after `attempt` failed attempts (1 or more)."""
        return float(min(self.longest_s, self.first_s * 2 ** min(attempt - 1, 20)))


class Announcer:
    """Sends this worker's info or a beat to every router, every 500 ms, until `leave`."""

    def __init__(
        self, routers: Iterable[str], info: common_pb2.WorkerInfo, key: bytes, retry: Retry | None = None
    ) -> None:
        """`routers`: host:port of their Announce services. `key`: kv.keys.proof_key, the same as the routers'."""
        self._routers = tuple(routers)
        self._info = info
        self._key = key
        self._retry = retry or Retry()
        self._leaving = asyncio.Event()
        self._changed: dict[str, asyncio.Event] = {address: asyncio.Event() for address in self._routers}
        self._tasks: list[asyncio.Task[None]] = []
        self._began_s = 0.0
        self._said_at_s: dict[str, float] = {}  # when we last complained of a router

    def start(self) -> None:
        """Start announcing; returns at once. Routers that cannot be reached are tried again."""
        self._began_s = asyncio.get_running_loop().time()
        self._tasks = [
            asyncio.create_task(self._keep(address), name=f"announce {address}") for address in self._routers
        ]

    def update(self, info: common_pb2.WorkerInfo) -> None:
        """Replace the worker's info, e.g. after a change of role. Sent at once."""
        self._info = info
        for event in self._changed.values():
            event.set()

    async def leave(self) -> None:
        """Tell every router that this worker leaves, wait briefly for the message to be sent, end the streams."""
        self._leaving.set()
        for event in self._changed.values():
            event.set()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=LEAVE_TIMEOUT_S)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []

    async def _keep(self, address: str) -> None:
        """Announce to one router until we leave; reconnect after every loss."""
        failures = 0
        while not self._leaving.is_set():
            async with InsideChannel(address, self._key, CHANNEL_OPTIONS) as channel:
                reached = await self._announce(channel, address)
            failures = 0 if reached else failures + 1
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._leaving.wait(), self._retry.wait_s(max(1, failures)))

    async def _announce(self, channel: grpc.aio.Channel, address: str) -> bool:
        """Serve one stream until it breaks or we leave; returns True if the router answered."""
        stub: worker_pb2_grpc.AnnounceAsyncStub = worker_pb2_grpc.AnnounceStub(channel)
        call = stub.Announce()
        answered = asyncio.Event()
        listener = asyncio.create_task(_listen(call, answered))
        try:
            await self._say(call, self._changed[address], listener)
        except (grpc.RpcError, grpc.aio.UsageError, grpc.aio.InternalError) as error:
            self._complain(address, error)  # and `_keep` tries again
        finally:
            call.cancel()
            listener.cancel()
            await asyncio.gather(listener, return_exceptions=True)
        if answered.is_set():
            log.info("router %s: announce stream ended", address)
        return answered.is_set()

    def _complain(self, address: str, error: BaseException) -> None:
        """Warn at most once a minute, and of an unreachable router only after a while, as it may still start."""
        if not isinstance(error, grpc.aio.AioRpcError):
            return
        now_s = asyncio.get_running_loop().time()
        is_stranger = error.code() is grpc.StatusCode.UNAUTHENTICATED
        if not is_stranger and now_s - self._began_s < WARN_AFTER_S:
            return
        if now_s - self._said_at_s.get(address, float("-inf")) >= WARN_INTERVAL_S:
            self._said_at_s[address] = now_s
            hint = (
                "" if is_stranger else "; is it the port where the router takes announcements (router.internal_port)?"
            )
            log.warning("router %s: not announced, trying again: %s%s", address, error.details(), hint)

    async def _say(
        self,
        call: grpc.aio.StreamStreamCall[worker_pb2.Announcement, worker_pb2.AnnounceReply],
        changed: asyncio.Event,
        listener: asyncio.Task[None],
    ) -> None:
        sequence = 0
        said: common_pb2.WorkerInfo | None = None
        while not listener.done():
            changed.clear()
            sequence += 1
            leaving = self._leaving.is_set()
            message = worker_pb2.Announcement(leaving=leaving, sequence=sequence)
            if said is not self._info:
                message.worker.CopyFrom(self._info)
                said = self._info
            await call.write(message)
            if leaving:
                await call.done_writing()
                await asyncio.wait([listener], timeout=LEAVE_TIMEOUT_S)
                return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), WORKER_LEASE.beat_s)


async def _listen(
    call: grpc.aio.StreamStreamCall[worker_pb2.Announcement, worker_pb2.AnnounceReply], answered: asyncio.Event
) -> None:
    """Read replies until the stream ends, with or without an error."""
    try:
        async for _ in call:
            answered.set()
    except (grpc.RpcError, grpc.aio.UsageError, grpc.aio.InternalError):
        return
