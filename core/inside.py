"""gRPC channels inside the cluster: caller and callee prove to each other that they know the cluster's key.

A stream's first message waits for the callee's proof, which comes with the initial metadata: one round trip. The only
message of a unary call is sent at once, so it must contain no secret. No answer is used before its proof is verified.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Generator
from typing import Any

import grpc
import grpc.aio

from .proof import ANSWER_HEADER, CALL_HEADER, NONCE_BYTES, Claim, call_header, is_answer_to

ANSWER_S = 5.0  # timeout of the callee's proof: a live process answers in one round trip
STATUS_S = 0.5  # timeout of a refusal's status after its metadata; both come together

_MAX_DETAIL = 300


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

    def __init__(self, address: str, key: bytes, options: Any = None) -> None:
        """`key` is kv.keys.proof_key; `address` is host:port, which the callee compares with its own address."""
        self._address = address
        self._key = key
        self._channel = grpc.aio.insecure_channel(address, options=options)

    async def __aenter__(self) -> InsideChannel:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self, grace: float | None = None) -> None:
        """Implements `grpc.aio.Channel.close`."""
        await self._channel.close(grace)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        """Implements `grpc.aio.Channel.get_state`."""
        return self._channel.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        """Implements `grpc.aio.Channel.wait_for_state_change`."""
        await self._channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        """Implements `grpc.aio.Channel.channel_ready`."""
        await self._channel.channel_ready()

    def unary_unary(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Implements `grpc.aio.Channel.unary_unary`."""
        return self._proving(method, self._channel.unary_unary(method, *args, **kwargs), UnaryCall)

    def unary_stream(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Implements `grpc.aio.Channel.unary_stream`."""
        return self._proving(method, self._channel.unary_stream(method, *args, **kwargs), StreamCall)

    def stream_unary(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Not supported: no call inside the cluster has this form."""
        raise NotImplementedError(f"{method}: streams with one answer have no proof")

    def stream_stream(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Implements `grpc.aio.Channel.stream_stream`. Send with `write` only: an iterator would not wait."""
        return self._proving(method, self._channel.stream_stream(method, *args, **kwargs), StreamCall)

    def _proving(self, method: str, call: Any, kind: Callable[[Any, Claim, bytes], Any]) -> Any:
        def proven(*request: Any, **options: Any) -> Any:
            claim = Claim(method, self._address, time.time_ns() // 1_000_000, os.urandom(NONCE_BYTES))
            metadata = ((CALL_HEADER, call_header(self._key, claim)), *(options.pop("metadata", None) or ()))
            return kind(call(*request, metadata=metadata, **options), claim, self._key)

        return proven


class _Call:
    """Base of all calls. Attributes that need no proof come from the inner call."""

    def __init__(self, call: Any, claim: Claim, key: bytes) -> None:
        self._call = call
        self._claim = claim
        self._key = key

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
        response = await self._call
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
            metadata = await asyncio.wait_for(self._call.initial_metadata(), ANSWER_S)
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
            code = await asyncio.wait_for(self._call.code(), STATUS_S)
        except TimeoutError:
            return False
        if code is not grpc.StatusCode.OK:
            details = str(await self._call.details() or "")[:_MAX_DETAIL]
            raise grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details)
        return True
