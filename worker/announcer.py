"""Client of the Announce service: one stream to every router, kept open. Knows no request and no engine."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import grpc
import grpc.aio

from ..core.discovery.source import AddressSource
from ..core.inside import InsideChannel
from ..core.lease import WORKER_LEASE
from ..core.tls.callers import Caller
from ..core.tls.identity import HandshakeRefused, TlsIdentity
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
        self,
        routers: Iterable[str],
        info: common_pb2.WorkerInfo,
        key: bytes,
        retry: Retry | None = None,
        sources: Iterable[AddressSource] = (),
        *,
        tls: TlsIdentity | None = None,
    ) -> None:
        """`routers`: host:port of their Announce services. `key`: kv.keys.proof_key, the same as the routers'.

        `sources`: of further ones, which come and go. `tls`: this worker's certificates.
        """
        self._routers = frozenset(routers)
        self._sources = tuple(sources)
        self._info = info
        self._key = key
        self._tls = tls
        self._retry = retry or Retry()
        self._leaving = asyncio.Event()
        self._answering: set[str] = set()  # routers whose present stream has answered
        self._told: dict[str, common_pb2.WorkerInfo] = {}  # info that a router has answered
        self._replied = asyncio.Event()
        self._is_over = False  # a task that was cancelled may get another error instead
        self._changed: dict[str, asyncio.Event] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}  # by address of the router
        self._searches: list[asyncio.Task[None]] = []
        self._heard_at_s: dict[str, float] = {}  # when a router last answered
        self._began_s = 0.0
        self._said_at_s: dict[str, float] = {}  # when we last complained of a router

    @property
    def num_answering(self) -> int:
        """Number of routers that know this worker now."""
        return len(self._answering)

    def start(self) -> None:
        """Start announcing; returns at once. Routers that cannot be reached are tried again."""
        self._began_s = asyncio.get_running_loop().time()
        for address in sorted(self._routers):
            self._begin(address)
        self._searches = [asyncio.create_task(self._follow(each), name=f"find {each.name}") for each in self._sources]

    def update(self, info: common_pb2.WorkerInfo) -> None:
        """Replace the worker's info, e.g. after a change of role. Sent at once."""
        self._info = info
        for event in self._changed.values():
            event.set()

    async def tell(self, info: common_pb2.WorkerInfo, timeout_s: float) -> None:
        """Replace the worker's info, and wait until all routers that answer know it, for at most `timeout_s`."""
        self.update(info)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while any(self._told.get(address) is not info for address in self._answering):
                    self._replied.clear()
                    await self._replied.wait()

    async def end(self) -> None:
        """End all streams without a word: another announcer goes on for this worker, under another incarnation."""
        self._is_over = True
        tasks = [*self._tasks.values(), *self._searches]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._tasks, self._searches = {}, []

    async def leave(self) -> None:
        """Tell every router that this worker leaves, wait briefly for the message to be sent, end the streams."""
        self._leaving.set()
        for event in self._changed.values():
            event.set()
        tasks = list(self._tasks.values())
        if tasks:
            await asyncio.wait(tasks, timeout=LEAVE_TIMEOUT_S)
        await self.end()

    def _begin(self, address: str) -> None:
        self._changed[address] = asyncio.Event()
        task = self._tasks[address] = asyncio.create_task(self._keep(address), name=f"announce {address}")
        task.add_done_callback(lambda ended: self._forget(address, ended))

    def _forget(self, address: str, ended: asyncio.Task[None]) -> None:
        """Drop what is kept of a router that is gone. If it has come back meanwhile, it is told again."""
        for kept in (self._tasks, self._changed, self._said_at_s, self._heard_at_s, self._told):
            kept.pop(address, None)
        has_failed = not ended.cancelled() and ended.exception() is not None
        if self._is_expected(address) and not (self._leaving.is_set() or self._is_over) and not has_failed:
            self._begin(address)

    async def _follow(self, source: AddressSource) -> None:
        """Announce to every address that a source gains; give up those that it loses, and that do not answer."""
        async with contextlib.aclosing(source.follow()) as changes:
            async for found in changes:
                for address in sorted(found - self._tasks.keys()):
                    self._begin(address)
                for address in sorted(self._tasks.keys() - self._answering):
                    if not self._is_expected(address):
                        self._tasks[address].cancel()

    def _is_expected(self, address: str) -> bool:
        return address in self._routers or any(address in source.addresses for source in self._sources)

    async def _keep(self, address: str) -> None:
        """Announce to one router until we leave; reconnect after every loss, unless no source has the address any more.

        A router that ends is in no source already, and has requests on this worker: its stream goes on until it ends.
        """
        failures = 0
        while not (self._leaving.is_set() or self._is_over) and self._is_expected(address):
            async with InsideChannel(address, self._key, CHANNEL_OPTIONS, self._tls, Caller.ROUTER) as channel:
                reached = await self._announce(channel, address)
            failures = 0 if reached else failures + 1
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._retry.wait_s(max(1, failures))):
                    await self._leaving.wait()

    async def _announce(self, channel: grpc.aio.Channel, address: str) -> bool:
        """Serve one stream until it breaks or we leave; returns True if the router answered."""
        stub: worker_pb2_grpc.AnnounceAsyncStub = worker_pb2_grpc.AnnounceStub(channel)
        call = stub.Announce()
        answered = asyncio.Event()

        sent: dict[int, common_pb2.WorkerInfo] = {}  # by the number of the message that told it

        def replied(sequence: int) -> None:
            for number in [number for number in sent if number <= sequence]:
                self._told[address] = sent.pop(number)
            self._replied.set()
            answered.set()
            self._answering.add(address)
            self._heard_at_s[address] = asyncio.get_running_loop().time()

        listener = asyncio.create_task(_listen(call, replied))
        try:
            await self._say(call, address, listener, sent)
        except (grpc.RpcError, grpc.aio.UsageError, grpc.aio.InternalError) as error:
            self._complain(address, error)  # and `_keep` tries again
        finally:
            call.cancel()
            listener.cancel()
            await asyncio.gather(listener, return_exceptions=True)
            self._answering.discard(address)
        if answered.is_set():
            log.info("router %s: announce stream ended", address)
        return answered.is_set()

    def _is_lost(self, address: str) -> bool:
        """True if no source has the address and the router is silent: its machine is gone, and no stream says so."""
        silent_s = asyncio.get_running_loop().time() - self._heard_at_s.get(address, 0.0)
        return silent_s > WORKER_LEASE.silence_s and not self._is_expected(address)

    def _complain(self, address: str, error: BaseException) -> None:
        """Warn of an error of the stream to a router."""
        if not isinstance(error, grpc.aio.AioRpcError):
            return
        refusals = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
        is_stranger = error.code() in refusals or (self._tls is not None and isinstance(error, HandshakeRefused))
        hint = "" if is_stranger else "; is it the port where the router takes announcements (router.internal_port)?"
        self._complain_of(address, f"{error.details()}{hint}", at_once=is_stranger)

    def _complain_of(self, router: str, what: str, *, at_once: bool = False) -> None:
        """Warn at most once a minute, and `at_once` or only after a while, as a router may still start."""
        now_s = asyncio.get_running_loop().time()
        if not at_once and now_s - self._began_s < WARN_AFTER_S:
            return
        if now_s - self._said_at_s.get(router, float("-inf")) >= WARN_INTERVAL_S:
            self._said_at_s[router] = now_s
            log.warning("router %s: not announced, trying again: %s", router, what)

    async def _say(
        self,
        call: grpc.aio.StreamStreamCall[worker_pb2.Announcement, worker_pb2.AnnounceReply],
        address: str,
        listener: asyncio.Task[None],
        sent: dict[int, common_pb2.WorkerInfo],
    ) -> None:
        changed, sequence = self._changed[address], 0
        said: common_pb2.WorkerInfo | None = None
        while not (listener.done() or self._is_over):
            changed.clear()
            sequence += 1
            leaving = self._leaving.is_set()
            message = worker_pb2.Announcement(leaving=leaving, sequence=sequence)
            if said is not self._info:
                message.worker.CopyFrom(self._info)
                said = sent[sequence] = self._info
            await call.write(message)
            if self._is_lost(address):
                return
            if leaving:
                await call.done_writing()
                await asyncio.wait([listener], timeout=LEAVE_TIMEOUT_S)
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(WORKER_LEASE.beat_s):
                    await changed.wait()


async def _listen(
    call: grpc.aio.StreamStreamCall[worker_pb2.Announcement, worker_pb2.AnnounceReply], replied: Callable[[int], None]
) -> None:
    """Read replies until the stream ends, with or without an error."""
    try:
        async for reply in call:
            replied(reply.sequence)
    except (grpc.RpcError, grpc.aio.UsageError, grpc.aio.InternalError):
        return
