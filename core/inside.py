"""gRPC channels inside the cluster: caller and callee prove to each other that they know the cluster's key.

A stream's first message waits for the callee's proof, which comes with the initial metadata: one round trip. The only
message of a unary call is sent at once, so it must contain no secret. No answer is used before its proof is verified.

With certificates (`tls`) both ends also show theirs. A call after these have changed goes over a new connection; calls
that run stay on the old one, which is closed at the end of the last.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from typing import Any

import grpc
import grpc.aio

from .proof import ANSWER_HEADER, CALL_HEADER, NONCE_BYTES, Claim, call_header, is_answer_to
from .tls.callers import Caller
from .tls.identity import HandshakeRefused, TlsIdentity, is_handshake

ANSWER_S = 5.0  # timeout of the callee's proof: a live process answers in one round trip
STATUS_S = 0.5  # timeout of a refusal's status after its metadata; both come together

_MAX_DETAIL = 300

Explain = Callable[[grpc.aio.AioRpcError], Awaitable[grpc.aio.AioRpcError]]


class Unproven(grpc.aio.AioRpcError):
    """The peer did not prove that it knows the cluster's key. None of its messages was used."""

    def __init__(self, address: str, what: str) -> None:
        super().__init__(
            grpc.StatusCode.UNAUTHENTICATED,
            grpc.aio.Metadata(),
            grpc.aio.Metadata(),
            f"{address} {what}; set TWOSTROKE__CLUSTER__KEY to the same secret for all processes of the cluster",
        )


class InsideChannel(grpc.aio.Channel):
    """Channel to one address whose calls send and require proofs. A stub can use it in place of any other channel."""

    def __init__(
        self,
        address: str,
        key: bytes,
        options: Any = None,
        tls: TlsIdentity | None = None,
        callee: Caller = Caller.WORKER,
    ) -> None:
        """`key` is kv.keys.proof_key; `address` is host:port, which the callee compares with its own address.

        `tls`: our certificates; None: the connection is not encrypted. `callee`: the role that the callee's must name.
        """
        self._address = address
        self._key = key
        self._options = options
        self._tls = tls
        self._callee = callee
        self._pem = tls.current() if tls else None
        self._channel = self._connected()
        self._num_calls: Counter[grpc.aio.Channel] = Counter()  # that run, with certificates only
        self._closing: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> InsideChannel:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self, grace: float | None = None) -> None:
        """Implements `grpc.aio.Channel.close`."""
        old = [channel for channel in self._num_calls if channel is not self._channel]
        await asyncio.gather(*(channel.close(grace) for channel in (self._channel, *old)), *self._closing)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        """Implements `grpc.aio.Channel.get_state`."""
        return self._current().get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        """Implements `grpc.aio.Channel.wait_for_state_change`."""
        await self._channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        """Implements `grpc.aio.Channel.channel_ready`."""
        await self._current().channel_ready()

    def unary_unary(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Implements `grpc.aio.Channel.unary_unary`."""
        return self._proving(method, lambda channel: channel.unary_unary(method, *args, **kwargs), UnaryCall)

    def unary_stream(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Implements `grpc.aio.Channel.unary_stream`."""
        return self._proving(method, lambda channel: channel.unary_stream(method, *args, **kwargs), StreamCall)

    def stream_unary(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Not supported: no call inside the cluster has this form."""
        raise NotImplementedError(f"{method}: streams with one answer have no proof")

    def stream_stream(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Implements `grpc.aio.Channel.stream_stream`. Send with `write` only: an iterator would not wait."""
        return self._proving(method, lambda channel: channel.stream_stream(method, *args, **kwargs), StreamCall)

    def _proving(self, method: str, form: Callable[[grpc.aio.Channel], Any], kind: Callable[..., Any]) -> Any:
        made_by, make = self._channel, form(self._channel)

        def proven(*request: Any, **options: Any) -> Any:
            nonlocal made_by, make
            channel = self._current()
            if channel is not made_by:
                made_by, make = channel, form(channel)
            claim = Claim(method, self._address, time.time_ns() // 1_000_000, os.urandom(NONCE_BYTES))
            metadata = ((CALL_HEADER, call_header(self._key, claim)), *(options.pop("metadata", None) or ()))
            call = make(*request, metadata=metadata, **options)
            self._note_call(call, channel)
            return kind(call, claim, self._key, self._explained)

        return proven

    # ------------------------------------------------------------------ certificates

    def _connected(self) -> grpc.aio.Channel:
        if self._tls is None:
            return grpc.aio.insecure_channel(self._address, options=self._options)
        return self._tls.channel(self._address, self._callee, self._options)

    def _current(self) -> grpc.aio.Channel:
        """The channel for new calls: another one after our certificates have changed."""
        if self._tls is None or (pem := self._tls.current()) is self._pem:
            return self._channel
        old, self._pem = self._channel, pem
        self._channel = self._connected()
        self._close_unused(old)
        return self._channel

    def _note_call(self, call: Any, channel: grpc.aio.Channel) -> None:
        if self._tls is None:
            return

        def ended(_: Any) -> None:
            self._num_calls[channel] -= 1
            self._close_unused(channel)

        self._num_calls[channel] += 1
        call.add_done_callback(ended)

    def _close_unused(self, channel: grpc.aio.Channel) -> None:
        """Close a channel with old certificates after the end of its last call."""
        if channel is self._channel or self._num_calls[channel] > 0:
            return
        del self._num_calls[channel]
        closing = asyncio.ensure_future(channel.close())
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    async def _explained(self, error: grpc.aio.AioRpcError) -> grpc.aio.AioRpcError:
        """The same error, or why no connection came about."""
        if self._tls is not None:
            return await self._tls.explained(error, self._address, self._callee)
        if is_handshake(error):
            return HandshakeRefused(self._address, "we have no certificate (cluster.tls), and it may want one")
        return error


class _Call:
    """Base of all calls. Attributes that need no proof come from the inner call."""

    def __init__(self, call: Any, claim: Claim, key: bytes, explain: Explain | None = None) -> None:
        self._call = call
        self._claim = claim
        self._key = key
        self._explain = explain

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call, name)

    def _check(self, metadata: Any) -> None:
        value = next((value for name, value in metadata or () if name == ANSWER_HEADER), None)
        if not is_answer_to(self._claim, self._key, value if isinstance(value, bytes) else None):
            self._call.cancel()
            what = "gave a wrong proof of" if value else "gave no proof of"
            raise Unproven(self._claim.audience, f"{what} the cluster's key")


class UnaryCall(_Call):
    """Call with one answer, which is returned after the proof of its sender is verified."""

    def __await__(self) -> Generator[Any, None, Any]:
        return self._answered().__await__()

    async def _answered(self) -> Any:
        try:
            response = await self._call
        except grpc.aio.AioRpcError as error:
            if self._explain is None:
                raise
            raise await self._explain(error) from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # grpc.aio also raises it in a task that nobody cancelled, when the channel is closed.
            closed = "the connection was closed while the call ran"
            raise grpc.aio.AioRpcError(
                grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), closed
            ) from None
        self._check(await self._call.initial_metadata())
        return response


class StreamCall(_Call):
    """Call with many answers. Reading and writing begin after the peer's proof is verified."""

    _is_proven = False

    async def read(self) -> Any:
        """Implements `grpc.aio.StreamStreamCall.read`."""
        if not self._is_proven:
            await self._prove()
        return await self._call.read()

    async def write(self, message: Any) -> None:
        """Implements `grpc.aio.StreamStreamCall.write`."""
        if not self._is_proven:
            await self._prove()
        await self._call.write(message)

    async def __aiter__(self) -> AsyncIterator[Any]:
        if not self._is_proven:
            await self._prove()
        async for message in self._call:
            yield message

    async def _prove(self) -> None:
        """Wait for the peer's proof.

        Raises:
            Unproven: it gave none, or a wrong one.
            grpc.aio.AioRpcError: the call is over: no server answers, or our own proof was refused.
        """
        try:
            async with asyncio.timeout(ANSWER_S):
                metadata = await self._call.initial_metadata()
        except TimeoutError:
            self._call.cancel()
            raise Unproven(self._claim.audience, f"gave no proof of the cluster's key within {ANSWER_S:g} s") from None
        except asyncio.CancelledError:
            self._call.cancel()
            raise
        if not any(name == ANSWER_HEADER for name, _ in metadata or ()) and await self._has_ended():
            # grpc.aio reports empty initial metadata if the status of the call arrives together with it.
            metadata = await self._call.trailing_metadata()
        self._check(metadata)
        self._is_proven = True

    async def _has_ended(self) -> bool:
        """True if the call has ended well, false if it continues without a proof; raises the status of a failed one."""
        try:
            async with asyncio.timeout(STATUS_S):
                code = await self._call.code()
        except TimeoutError:
            return False
        if code is not grpc.StatusCode.OK:
            details = str(await self._call.details() or "")[:_MAX_DETAIL]
            error = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details)
            raise await self._explain(error) if self._explain else error
        return True
