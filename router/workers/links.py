"""The router's link to one worker: a Session and a Watch, reopened when they break. Knows no request, no policy."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import grpc
import grpc.aio

from ...client.status import from_rpc_error
from ...core.errors import InvalidRequest, Unavailable
from ...core.inside import InsideChannel
from ...core.lease import ROUTER_LEASE
from ...core.tls.identity import HandshakeRefused, TlsIdentity
from ...kv.handover.transports.grpc import CHANNEL_OPTIONS
from ...protos import common_pb2, worker_pb2, worker_pb2_grpc
from ..routing.facts import WorkerFacts, WorkerKey
from .wire import worker_from_wire

log = logging.getLogger(__name__)

MAX_WAITING_ORDERS = 8_192
FLUSH_S = 0.3
ADAPTER_S = 150.0  # for a worker to load an adapter; it gives up by itself after 120
_FIRST_RETRY_S = 0.05
_LONGEST_RETRY_S = 1.0
_STRANGE = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
_STREAM_ERRORS = (grpc.RpcError, grpc.aio.UsageError, grpc.aio.InternalError)


class _Broken(Exception):
    """A stream cannot continue; the message has the reason."""


@dataclass(frozen=True, slots=True)
class LinkHandlers:
    """Callbacks of a link to its owner, on the event loop."""

    up: Callable[[WorkerKey, WorkerFacts], None]
    down: Callable[[WorkerKey, str], None]
    beat: Callable[[WorkerKey, worker_pb2.Beat | None], None]  # any message on the session; None: not a Beat
    step: Callable[[WorkerKey, worker_pb2.StepOutput], None]
    watching: Callable[[WorkerKey], None]  # a new watch begins: its numbers start anew
    event: Callable[[WorkerKey, worker_pb2.WatchEvent], bool]  # False: watch again


class WorkerLink:
    """All streams between this router and one incarnation of one worker."""

    def __init__(
        self,
        facts: WorkerFacts,
        hello: worker_pb2.SessionHello,
        handlers: LinkHandlers,
        proof_key: bytes,
        tls: TlsIdentity | None = None,
    ) -> None:
        """`proof_key` (kv/keys.py): orders are sent only to a worker that proves that it knows the key.

        `tls`: the router's certificates.
        """
        self.key = facts.key
        self._hello = hello
        self._handlers = handlers
        self._orders: asyncio.Queue[worker_pb2.SessionUp] = asyncio.Queue(MAX_WAITING_ORDERS)
        self._channel = InsideChannel(facts.address, proof_key, CHANNEL_OPTIONS, tls)
        self._stub: worker_pb2_grpc.WorkerAsyncStub = worker_pb2_grpc.WorkerStub(self._channel)
        self._session: asyncio.Task[None] | None = None
        self._keepers: list[asyncio.Task[None]] = []
        self._is_up = self._is_closing = False
        self._reset_reason = "reset"
        self._has_complained = False  # a warning about different keys was logged

    def open(self) -> None:
        """Start both streams; returns at once."""
        self._keepers = [
            asyncio.create_task(self._keep(self._run_session, is_session=True), name=f"session {self.key.worker_id}"),
            asyncio.create_task(self._keep(self._run_watch, is_session=False), name=f"watch {self.key.worker_id}"),
        ]

    def send(self, message: worker_pb2.SessionUp) -> bool:
        """Queue an order. False: the session is down or the worker does not read; the order was not queued."""
        if not self._is_up:
            return False
        try:
            self._orders.put_nowait(message)
        except asyncio.QueueFull:
            self.reset()
            return False
        return True

    def reset(self, reason: str = "reset") -> None:
        """Break the session, e.g. because its worker fell silent. It is opened again."""
        self._reset_reason = reason
        if self._session is not None:
            self._session.cancel()

    async def load_adapter(self, name: str, path: str, digest: bytes, *, replace: bool) -> WorkerFacts:
        """Have the worker hold an adapter and serve it under a name; its facts after that.

        Raises:
            TwostrokeError: it refused, or cannot be reached.
        """
        request = worker_pb2.LoadAdapterRequest(name=name, path=path, digest=digest, replace=replace)
        return await self._told(self._stub.LoadAdapter(request, timeout=ADAPTER_S))

    async def unload_adapter(self, name: str) -> WorkerFacts:
        """Have the worker serve a name no longer; its facts after that.

        Raises:
            TwostrokeError: as for `load_adapter`.
        """
        return await self._told(self._stub.UnloadAdapter(worker_pb2.UnloadAdapterRequest(name=name), timeout=ADAPTER_S))

    async def _told(self, call: Awaitable[common_pb2.WorkerInfo]) -> WorkerFacts:
        try:
            facts = worker_from_wire(await call)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, self.key.worker_id) from None
        if self.key != facts.key:
            raise Unavailable(f"another worker answers for {self.key.worker_id}", retry_after_s=1.0)
        return facts

    async def close(self) -> None:
        """Wait briefly for queued orders to be sent, then end both streams."""
        with contextlib.suppress(TimeoutError):
            if self._is_up:
                async with asyncio.timeout(FLUSH_S):
                    await self._orders.join()
        self._is_closing = True
        tasks = [*self._keepers, *([self._session] if self._session else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._mark_down("the router closed the session")
        await self._channel.close()

    # ------------------------------------------------------------------ inside

    async def _keep(self, run: Callable[[], Awaitable[None]], is_session: bool) -> None:
        """Run a stream repeatedly, with a growing wait while it cannot be opened."""
        wait_s = _FIRST_RETRY_S
        loop = asyncio.get_running_loop()
        while not self._is_closing:  # a call that fails at the same moment as it is cancelled raises its error instead
            began_s = loop.time()
            reason = await self._run_once(run, is_session)
            wait_s = _FIRST_RETRY_S if loop.time() - began_s > 1.0 else min(_LONGEST_RETRY_S, 2 * wait_s)
            log.debug("%s: %s ended: %s", self.key.worker_id, "session" if is_session else "watch", reason)
            await asyncio.sleep(wait_s)

    async def _run_once(self, run: Callable[[], Awaitable[None]], is_session: bool) -> str:
        """Run a stream once; returns the reason of its end.

        A session runs in its own task, so that `reset` can end it; after any end it is marked down here.
        """
        try:
            if is_session:
                self._session = asyncio.ensure_future(_awaited(run))
                await asyncio.wait({self._session})
                if not self._session.cancelled():
                    self._session.result()
                reason = self._reset_reason
            else:
                await run()
                reason = "ended"
        except _STREAM_ERRORS as error:
            reason = _words(error)
            self._complain(error, reason)
        except (_Broken, InvalidRequest) as error:
            reason = str(error)
        except Exception:  # a bad message of a worker must not end the link for ever
            log.exception("%s: a message could not be handled", self.key.worker_id)
            reason = "a message could not be handled"
        if is_session:
            self._mark_down(reason)
        return reason

    def _complain(self, error: BaseException, reason: str) -> None:
        """Warn once if the worker at this address has another cluster key, or other certificates."""
        is_strange = isinstance(error, HandshakeRefused) or (
            isinstance(error, grpc.aio.AioRpcError) and error.code() in _STRANGE
        )
        if is_strange and not self._has_complained:
            self._has_complained = True
            log.warning("%s gets no orders: %s", self.key.worker_id, reason)

    async def _run_session(self) -> None:
        call = self._stub.Session()
        writer: asyncio.Task[None] | None = None
        try:
            await call.write(worker_pb2.SessionUp(sequence=1, hello=self._hello))
            while isinstance(message := await call.read(), worker_pb2.SessionDown):
                if writer is None:
                    self._welcome(message)
                    writer = asyncio.create_task(self._write(call))
                self._handle(message)
            raise _Broken("the worker ended the session")
        finally:
            call.cancel()
            if writer is not None:
                writer.cancel()
                await asyncio.gather(writer, return_exceptions=True)

    def _welcome(self, message: worker_pb2.SessionDown) -> None:
        if message.WhichOneof("body") != "welcome":
            raise _Broken("the worker's first word was no welcome")
        facts = worker_from_wire(message.welcome)
        if facts.key != self.key:
            raise _Broken(f"another worker answers at this address: {facts.worker_id}")
        self._is_up = True
        self._handlers.up(self.key, facts)

    def _handle(self, message: worker_pb2.SessionDown) -> None:
        body = message.WhichOneof("body")
        self._handlers.beat(self.key, message.beat if body == "beat" else None)
        if body == "step":
            self._handlers.step(self.key, message.step)

    async def _write(self, call: grpc.aio.StreamStreamCall[worker_pb2.SessionUp, worker_pb2.SessionDown]) -> None:
        """Send queued orders until the session ends; a failed write ends the session at once."""
        try:
            await self._write_for_ever(call)
        except _STREAM_ERRORS as error:
            self.reset(f"orders cannot be written: {_words(error)}")

    async def _write_for_ever(
        self, call: grpc.aio.StreamStreamCall[worker_pb2.SessionUp, worker_pb2.SessionDown]
    ) -> None:
        sequence = 1
        while True:
            sequence += 1
            try:
                async with asyncio.timeout(ROUTER_LEASE.beat_s):
                    message = await self._orders.get()
            except TimeoutError:
                await call.write(worker_pb2.SessionUp(sequence=sequence, beat=worker_pb2.Beat()))
                continue
            message.sequence = sequence
            try:
                await call.write(message)
            finally:
                self._orders.task_done()

    async def _run_watch(self) -> None:
        call = self._stub.Watch(worker_pb2.WatchRequest(router_id=self._hello.router_id))
        self._handlers.watching(self.key)
        try:
            async for event in call:
                if event.incarnation != self.key.incarnation:
                    raise _Broken("another life of the worker answers")
                if not self._handlers.event(self.key, event):
                    raise _Broken("a gap in the worker's events")
        finally:
            call.cancel()

    def _mark_down(self, reason: str) -> None:
        while not self._orders.empty():  # `down` reports the requests of these orders as lost
            self._orders.get_nowait()
            self._orders.task_done()
        if self._is_up:
            self._is_up = False
            self._handlers.down(self.key, reason)


async def _awaited(run: Callable[[], Awaitable[None]]) -> None:
    await run()


def _words(error: BaseException) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return str(error) or type(error).__name__
