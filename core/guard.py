"""gRPC interceptor for servers inside the cluster: refuses calls without a proof of the cluster's key.

It checks the proof before it reads any message of the call, and answers it in the initial metadata. With certificates
the role in the caller's must be one that may call the method (tls/callers.py). Knows no service.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from typing import Any

import grpc
import grpc.aio

from .probes import Probes
from .proof import ANSWER_HEADER, CALL_HEADER, Fault, ProofRefused, Verifier
from .tls.callers import may_call
from .tls.identity import TlsIdentity

log = logging.getLogger(__name__)

HEALTH_CHECK = "/grpc.health.v1.Health/Check"  # open: probes of Kubernetes have no key
HEALTH_WATCH = "/grpc.health.v1.Health/Watch"
MAX_HEALTH_WATCHES = 16  # most open watches of callers without a proof
WARN_INTERVAL_S = 60.0

Continue = Callable[[grpc.HandlerCallDetails], Awaitable[Any]]


class Guard(grpc.aio.ServerInterceptor):
    """Interceptor of one server. If callers know it by one address only, set `audience` before the server starts."""

    def __init__(
        self, key: bytes, who: str, refused: Callable[[], None] = lambda: None, tls: TlsIdentity | None = None
    ) -> None:
        """`key` is kv.keys.proof_key; `who` names the server in the log; `refused` is called for every refused call.

        `tls`: the certificates of the server; None: it has none, and the callers have no roles.
        """
        self.refusals: Counter[Fault] = Counter()
        self.last_refused = ""  # peer and reason
        self._verifier = Verifier(key, _now_ms())
        self._who = who
        self._refused = refused
        self._tls = tls
        self._said_at_s: dict[Fault, float] = {}
        self._health_watches = 0
        self._probes = Probes()

    @property
    def audience(self) -> str | None:
        """host:port that callers must use as the target; None: any."""
        return self._verifier.audience

    @audience.setter
    def audience(self, address: str) -> None:
        self._verifier.audience = address

    async def intercept_service(self, continuation: Continue, handler_call_details: Any) -> Any:
        """Implements `grpc.aio.ServerInterceptor.intercept_service`."""
        method: str = handler_call_details.method
        header = _value(handler_call_details.invocation_metadata, CALL_HEADER)
        if header is None and method == HEALTH_CHECK:
            return self._probes.handler(await continuation(handler_call_details))
        if header is None and method == HEALTH_WATCH:
            return _wrapped(await continuation(handler_call_details), self._watching)
        try:
            answer = self._verifier.check(method, header, _now_ms())
        except ProofRefused as error:
            return grpc.stream_stream_rpc_method_handler(self._refusal(method, error))
        handler = await continuation(handler_call_details)

        @asynccontextmanager
        async def answering(context: Any) -> AsyncIterator[None]:
            await self._check_caller(method, context)
            # Also at the end: of a stream that ends at once, grpc.aio may report no initial metadata (`StreamCall`).
            context.set_trailing_metadata(((ANSWER_HEADER, answer),))
            await context.send_initial_metadata(((ANSWER_HEADER, answer),))
            yield

        return _wrapped(handler, answering)

    async def _check_caller(self, method: str, context: Any) -> None:
        """End a call whose method is not for the role in its caller's certificate."""
        if self._tls is None:
            return
        caller = self._tls.caller_of(context)
        if may_call(caller, method):
            return
        whose = f"a {caller}" if caller else f"nobody of the deployment {self._tls.deployment!r}"
        error = ProofRefused(Fault.ROLE, f"{method} is not for {whose}, which the caller's certificate names")
        self._note(method, context.peer(), error)
        await context.abort(grpc.StatusCode.PERMISSION_DENIED, str(error))

    def _refusal(self, method: str, error: ProofRefused) -> Any:
        """Handler that ends a call of any form without reading a message."""

        async def refuse(_: Any, context: Any) -> None:
            self._note(method, context.peer(), error)
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, str(error))

        return refuse

    def _note(self, method: str, peer: str, error: ProofRefused) -> None:
        self.refusals[error.fault] += 1
        self.last_refused = f"{peer}: {error}"
        self._refused()
        now_s = time.monotonic()
        if now_s - self._said_at_s.get(error.fault, float("-inf")) >= WARN_INTERVAL_S:
            self._said_at_s[error.fault] = now_s
            log.warning("%s refuses %s of %s: %s", self._who, method[:200], peer, error)

    @asynccontextmanager
    async def _watching(self, context: Any) -> AsyncIterator[None]:
        if self._health_watches >= MAX_HEALTH_WATCHES:
            await context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED, f"{MAX_HEALTH_WATCHES} watch this server's health; use Check"
            )
        self._health_watches += 1
        try:
            yield
        finally:
            self._health_watches -= 1


def _wrapped(handler: Any, around: Callable[[Any], AbstractAsyncContextManager[None]]) -> Any:
    """Wrap a handler: each call runs within `around(context)`."""
    if handler is None:
        return None
    form = ("stream" if handler.request_streaming else "unary") + (
        "_stream" if handler.response_streaming else "_unary"
    )
    behaviour = getattr(handler, form)

    async def answer(request: Any, context: Any) -> Any:
        async with around(context):
            return await behaviour(request, context)

    async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
        async with around(context), aclosing(behaviour(request, context)) as messages:
            async for message in messages:
                yield message

    wrapped = stream if inspect.isasyncgenfunction(behaviour) else answer
    make = getattr(grpc, f"{form}_rpc_method_handler")
    return make(wrapped, handler.request_deserializer, handler.response_serializer)


def _value(metadata: Any, name: str) -> bytes | None:
    return next((value for key, value in metadata or () if key == name and isinstance(value, bytes)), None)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
