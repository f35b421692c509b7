"""Guard before every service of the clients' gRPC port: checks key, room, bounds and deadlines. Knows no service.

    headers ──▶ key ──▶ room ──▶ bytes ──▶ bounds ──▶ message ──▶ the service ──▶ replies
                 │        │        │          │                                      │
          no message   budget   deadline   nothing is                        a deadline for each
            is read   of bytes              built yet                   that the client does not take

Each handler is replaced by one that reads and writes raw bytes itself. The handlers of grpc.aio read a message before
the key is checked, build it without bounds, and wait for ever for clients that neither send nor read.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import grpc
import grpc.aio
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import DecodeError

from ....client.status import to_rpc_status
from ....core.call_reaper import CallReaper
from ....core.errors import InternalError, InvalidRequest, Overloaded, TwostrokeError
from ....core.probes import Probes
from ...config import RouterConfig
from ..checks import short
from ..http.reading import Lease, Room, Workbench
from .message_bounds import check_bounds

log = logging.getLogger(__name__)

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = Any  # a grpc.RpcMethodHandler, whose types are those of servers without asyncio

OPEN = frozenset({"/grpc.health.v1.Health/Check"})  # probes have no key
SMALL_BYTES = 4096  # bound on messages of other services and of our methods without prompts
# Methods that carry prompts.
LARGE = frozenset({"Generate", "GenerateStream", "Chat", "ChatStream", "Tokenize", "ModelInfer", "ModelStreamInfer"})
SMALL_CALLS = "/small calls"  # name under which all small messages share the room, like a tenant
SMALL_READ_S = 5.0  # longest wait for a small message
MAX_STANDING = 64  # calls of other services under way: clients may keep Watch and reflection open for ever
SPARE_CALLS = 256  # calls accepted above those that may run, so that each can be refused with its reason


class Stalled(Exception):  # no error of ours: it ends a call quietly
    """The client does not read its reply."""


class Gone(Exception):  # it ends a call quietly, too
    """The client left during a reply."""


class GuardedContext:
    """Context for a service: grpc.aio's, with a deadline for each reply."""

    def __init__(self, context: Context, lease: Lease, write: Callable[[Any], Awaitable[None]], bench: Workbench):
        self._context = context
        self._lease = lease
        self.write = write
        self.bench = bench

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def admitted(self) -> None:
        """Free the message's part of the room; the message is no longer needed."""
        self._lease.give_back()


class Guard(grpc.aio.ServerInterceptor):
    """Interceptor of the clients' server; one per router."""

    def __init__(
        self, config: RouterConfig, authenticate: Callable[[str | None], str], own_services: Sequence[str], room: Room
    ) -> None:
        """`authenticate` returns the tenant of a key; messages of others than `own_services` must be small."""
        self._authenticate = authenticate
        self._own = tuple(f"/{service}/" for service in own_services)
        self._max_bytes = config.max_body_bytes
        self._stall_s = config.slow_client_s
        self._max_calls = config.max_running + SPARE_CALLS
        self._num_calls = {True: 0, False: 0}  # of our service (True) and of the others
        self._tenant_calls: Counter[str] = Counter()  # of our service
        self._max_tenant_calls = self._max_calls // 2 if config.has_tenants else self._max_calls
        self._room = room
        self._bench = Workbench()
        self._probes = Probes()
        self._reaper = CallReaper()

    @property
    def num_waiting_probes(self) -> int:
        """Health checks whose message has not come yet."""
        return self._probes.num_waiting

    def close(self) -> None:
        """Stop the parsing thread."""
        self._bench.close()

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Handler]], handler_call_details: grpc.HandlerCallDetails
    ) -> Handler:
        """Wrap the method's handler in all checks; without a valid key, a handler that refuses and reads nothing."""
        details = handler_call_details
        if details.method in OPEN:
            return self._probes.handler(await continuation(details))
        try:
            tenant = self._authenticate(api_key(details.invocation_metadata))
        except TwostrokeError as error:
            return _stream(partial(self._refuse, error))
        handler = await continuation(details)
        if handler is None:
            return handler  # UNIMPLEMENTED
        return _stream(partial(self._call, handler, details.method, tenant))

    async def _refuse(self, error: TwostrokeError, _: Any, context: Context) -> None:
        self._reaper.end_later(self._stall_s)
        await context.abort_with_status(to_rpc_status(error))

    async def _call(self, handler: Handler, method: str, tenant: str, _: Any, context: Context) -> None:
        is_own = method.startswith(self._own)
        self._num_calls[is_own] += 1
        self._tenant_calls[tenant] += is_own
        status: grpc.Status | None = None
        is_stalled = False
        try:
            most = self._max_calls if is_own else MAX_STANDING
            if self._num_calls[is_own] > most:
                raise Overloaded(f"{most} calls are under way, the most that may", retry_after_s=1.0)
            if self._tenant_calls[tenant] > self._max_tenant_calls:
                most = self._max_tenant_calls
                raise Overloaded(f"{most} calls of this key are under way, the most that may", retry_after_s=1.0)
            await self._serve(handler, method, tenant, context)
        except Stalled:
            log.info("%s: the client took nothing for %g s; the call ends", method, self._stall_s)
            is_stalled = True
        except Gone:
            log.debug("%s: the client left", method)
        except TwostrokeError as error:
            status = to_rpc_status(error)
        except grpc.aio.AbortError:
            raise
        except Exception:
            log.exception("%s failed", method)
            status = to_rpc_status(InternalError("the call failed; the router's log has more"))
        finally:
            self._num_calls[is_own] -= 1
            self._tenant_calls[tenant] -= is_own
            if not self._tenant_calls[tenant]:
                del self._tenant_calls[tenant]
        # Not within `except`: an exception raised there would keep the error and the messages of its frames alive.
        if is_stalled:
            self._reaper.end(_this_task())
            return
        self._reaper.end_later(self._stall_s)
        if status is not None:
            await context.abort_with_status(status)

    async def _serve(self, handler: Handler, method: str, tenant: str, context: Context) -> None:
        write = partial(self._write, context, handler.response_serializer)
        if handler.request_streaming:
            messages = self._messages(handler, method, tenant, context)
            await _send_all(handler.stream_stream(messages, context), write)
            return
        lease = await self._lease(method, tenant)
        try:
            message = await self._message(handler, method, lease, context)
            if message is None:
                raise InvalidRequest("the call ended without its message")
            guarded = GuardedContext(context, lease, write, self._bench)
            serve = handler.unary_stream if handler.response_streaming else handler.unary_unary
            answer = serve(message, guarded)
            del message  # frees its memory; the service keeps what it needs
            await _send_all(answer, write)
        finally:
            lease.give_back()

    async def _messages(self, handler: Handler, method: str, tenant: str, context: Context) -> AsyncIterator[Any]:
        while True:
            lease = await self._lease(method, tenant)
            try:
                message = await self._message(handler, method, lease, context)
            finally:
                lease.give_back()
            if message is None:
                return
            yield message

    def _is_large(self, method: str) -> bool:
        return method.startswith(self._own) and method.rpartition("/")[2] in LARGE

    async def _lease(self, method: str, tenant: str) -> Lease:
        """Room for the next message. Small messages have their own share, so that monitoring works under load."""
        if self._is_large(method):
            return await self._room.take(tenant, self._max_bytes)
        return await self._room.take(SMALL_CALLS, SMALL_BYTES)

    async def _message(self, handler: Handler, method: str, lease: Lease, context: Context) -> Any:
        """The next message; None: the client sends no more."""
        is_large = self._is_large(method)
        raw = await self._room.read(lease, context.read, None if is_large else SMALL_READ_S)
        if not isinstance(raw, bytes):
            return None
        if not is_large and len(raw) > SMALL_BYTES:
            raise InvalidRequest(f"the message has {len(raw)} bytes; at most {SMALL_BYTES}")
        lease.shrink(len(raw))
        return await self._bench.run(len(raw), partial(_parsed, raw, handler.request_deserializer))

    async def _write(self, context: Context, serialize: Any, message: Any) -> None:
        try:
            async with asyncio.timeout(self._stall_s):
                await context.write(serialize(message))
        except TimeoutError:
            raise Stalled from None
        except grpc.aio.BaseError as error:  # raised by cygrpc if a write fails
            raise Gone from error


def api_key(metadata: Any) -> str | None:
    """The bearer key in a call's metadata, or None."""
    for name, value in metadata or ():
        if name == "authorization" and isinstance(value, str):
            scheme, _, secret = value.partition(" ")
            return secret.strip() if scheme.lower() == "bearer" else None
    return None


async def _send_all(answer: Any, write: Callable[[Any], Awaitable[None]]) -> None:
    """Send a service's answer: one reply, a stream of replies, or none if it wrote by itself."""
    if not hasattr(answer, "__aiter__"):
        reply = await answer
        if reply is not None:
            await write(reply)
        return
    async with contextlib.aclosing(answer) as replies:
        async for reply in replies:
            await write(reply)


def _parsed(raw: bytes, deserialize: Any) -> Any:
    kind: Descriptor = deserialize.__self__.DESCRIPTOR
    check_bounds(raw, kind)
    try:
        return deserialize(raw)
    except DecodeError as error:
        raise InvalidRequest(f"the message is no valid {kind.name}: {short(str(error))}") from None


def _stream(serve: Callable[[Any, Context], Awaitable[None]]) -> Handler:
    """A handler over raw bytes. It is a stream handler, because only those decide themselves when to read."""

    async def behaviour(messages: Any, context: Context) -> None:
        await serve(messages, context)

    return grpc.stream_stream_rpc_method_handler(behaviour)


def _this_task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None
    return task
