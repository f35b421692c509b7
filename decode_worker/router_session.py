"""Long-lived stream of one router: orders in, one message per wake-up out. Knows no engine and no hand-over."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
import grpc.aio

from ..core.lease import ROUTER_LEASE, WORKER_LEASE
from ..engine.link.messages import LoadNews
from ..kv.messages import epoch_from_wire
from ..protos import common_pb2, worker_pb2
from .ledger import RouterKey
from .order import key_of
from .outbox import Outbox
from .report import taken_message

log = logging.getLogger(__name__)

SessionContext = grpc.aio.ServicerContext[worker_pb2.SessionUp, worker_pb2.SessionDown]
STREAM_ERRORS = (grpc.RpcError, grpc.aio.UsageError, grpc.aio.InternalError, grpc.aio.AbortError)


@dataclass(frozen=True, slots=True)
class SessionTiming:
    """Heartbeat interval and timeouts of a session, in seconds."""

    hello_s: float = 5.0  # for the router's hello
    beat_s: float = WORKER_LEASE.beat_s
    silence_s: float = ROUTER_LEASE.silence_s  # of a router that has sent a beat before; else only TCP detects a loss
    stall_s: float = 5.0  # for one write; a router that reads nothing for so long is lost


class SessionOwner(Protocol):
    """Receiver of a session's orders."""

    def submit(self, session: RouterSession, message: worker_pb2.Submit) -> None:
        """Start a choice, or put its refusal into the outbox."""
        ...

    def cancel(self, session: RouterSession, message: worker_pb2.CancelRequest) -> None:
        """Cancel all choices of a request of this session's router."""
        ...

    def has_others_suspect(self, session: RouterSession) -> bool:
        """True if an order of another router that may kill this worker is computed here."""
        ...

    def attach(self, session: RouterSession, message: worker_pb2.Attach) -> None:
        """Take over a running request."""
        ...


class RouterSession:
    """Session of one router; `run` returns when the router is lost or has left."""

    def __init__(self, owner: SessionOwner, timing: SessionTiming, load: Callable[[], LoadNews | None]) -> None:
        self.outbox = Outbox()
        self.router = RouterKey("", 0)  # replaced at its hello
        self._owner = owner
        self._timing = timing
        self._load = load
        self._sequence = 0
        self._writing = asyncio.Lock()  # gRPC takes one message at a time
        self._has_beaten = False
        self._is_over = (
            False  # `wait_for` may swallow a cancellation (CPython before 3.12): reader and writer look here
        )

    @property
    def router_id(self) -> str:
        """The router's name."""
        return self.router.router_id

    def greet(self, hello: worker_pb2.SessionHello) -> None:
        """Take the router's identity from its hello."""
        self.router = RouterKey(hello.router_id, hello.router_incarnation)

    async def run(self, context: SessionContext, info: common_pb2.WorkerInfo) -> None:
        """Wait for the router's hello, then serve it until it is lost or leaves."""
        if not await self._welcome(context, info):
            return
        log.info("router %s: session opened", self.router_id)
        reader = asyncio.create_task(self._read(context))
        writer = asyncio.create_task(self._write(context))
        try:
            await asyncio.wait([reader, writer], return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._is_over = True
            for task in (reader, writer):
                task.cancel()
            await asyncio.gather(reader, writer, return_exceptions=True)
            log.info("router %s: session over", self.router_id)

    async def _welcome(self, context: SessionContext, info: common_pb2.WorkerInfo) -> bool:
        try:
            async with asyncio.timeout(self._timing.hello_s):
                first: Any = await context.read()
        except (TimeoutError, *STREAM_ERRORS):
            return False
        if not isinstance(first, worker_pb2.SessionUp) or not first.HasField("hello"):
            return False
        self.greet(first.hello)
        self._sequence += 1
        await context.write(worker_pb2.SessionDown(sequence=self._sequence, welcome=info))
        return True

    async def _read(self, context: SessionContext) -> None:
        while not self._is_over:
            await self.outbox.wait_for_room()  # a router that does not read its output gets no new work done
            silence_s = self._timing.silence_s if self._has_beaten else None
            try:
                async with asyncio.timeout(silence_s):
                    message: Any = await context.read()
            except TimeoutError:
                log.warning("router %s: silent for %.1f s", self.router_id, self._timing.silence_s)
                return
            except STREAM_ERRORS:
                return
            if not isinstance(message, worker_pb2.SessionUp):
                return  # grpc.aio.EOF
            first = self.before(message)
            if first is not None and not await self._send(context, step=first):
                return
            self.take(message)

    def before(self, message: worker_pb2.SessionUp) -> worker_pb2.StepOutput | None:
        """What must have been sent before a message of the router is handled; None: nothing.

        An order that may kill this worker is confirmed first: afterwards nobody could. One that will be refused is not.
        """
        order = message.submit
        if not order.confirm or self._owner.has_others_suspect(self):  # or no order
            return None
        return worker_pb2.StepOutput(taken=[taken_message(key_of(order), epoch_from_wire(order.epoch))])

    def take(self, message: worker_pb2.SessionUp) -> None:
        """Handle one message of the router, after its hello."""
        match message.WhichOneof("body"):
            case "submit":
                self._owner.submit(self, message.submit)
            case "cancel":
                self._owner.cancel(self, message.cancel)
            case "attach":
                self._owner.attach(self, message.attach)
            case "beat":
                self._has_beaten = True
            case body:
                log.warning("router %s: %s is not understood", self.router_id, body)

    async def _write(self, context: SessionContext) -> None:
        """Send the waiting output as one message, or a beat after `beat_s` without output."""
        while not self._is_over:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._timing.beat_s):
                    await self.outbox.wait()
            output = self.outbox.take()
            body: dict[str, Any] = {"beat": self._beat()} if output is None else {"step": output}
            if not await self._send(context, **body):
                return

    async def _send(self, context: SessionContext, **body: Any) -> bool:
        """Write one message, and wait until it has left this process. False: the router is lost."""
        try:
            async with asyncio.timeout(self._timing.stall_s), self._writing:
                self._sequence += 1
                await context.write(worker_pb2.SessionDown(sequence=self._sequence, **body))
        except TimeoutError:
            log.warning("router %s: read nothing for %.1f s", self.router_id, self._timing.stall_s)
            return False
        except STREAM_ERRORS:
            return False
        return True

    def _beat(self) -> worker_pb2.Beat:
        load = self._load()
        return worker_pb2.Beat() if load is None else worker_pb2.Beat(phase=load.phase, steps=load.steps)
