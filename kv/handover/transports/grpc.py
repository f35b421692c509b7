"""gRPC transport of the hand-over: raw bytes through generic handlers, client and server. Knows no message or state.

KV inside a protobuf field moves at 0.6 of the speed of raw bytes, so the two methods that carry KV are registered with
identity serialisers; kv/handover/frames.py defines the format of the bytes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Protocol

import grpc
import grpc.aio

from ....core.inside import InsideChannel
from ....core.tls.identity import TlsIdentity

HANDOVER_SERVICE = "twostroke.v1.Handover"
BLOCKS_SERVICE = "twostroke.v1.Blocks"
TRANSFER = f"/{HANDOVER_SERVICE}/Transfer"
FETCH = f"/{BLOCKS_SERVICE}/Fetch"
KEEP = f"/{BLOCKS_SERVICE}/Keep"
PAIR = f"/{HANDOVER_SERVICE}/Pair"

MAX_MESSAGE_BYTES = 64 << 20
"""A frame has at most 16 MiB of planes (CacheConfig.frame_bytes); orders and pieces of snapshots are smaller."""

_COMMON_OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
)
CHANNEL_OPTIONS: list[tuple[str, Any]] = [
    *_COMMON_OPTIONS,
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.enable_http_proxy", 0),  # calls between workers must not go through a proxy set in the environment
]
SERVER_OPTIONS: list[tuple[str, Any]] = [
    *_COMMON_OPTIONS,
    ("grpc.so_reuseport", 0),  # a port in use must be an error; with reuse two servers would share its traffic
    ("grpc.keepalive_time_ms", 20_000),  # a client that vanished without a word holds no memory for hours
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.server_handshake_timeout_ms", 5_000),
]

ServerContext = grpc.aio.ServicerContext[bytes, bytes]
TransferHandler = Callable[[AsyncIterator[bytes], ServerContext], Awaitable[None]]
FetchHandler = Callable[[bytes, ServerContext], AsyncIterator[bytes]]
KeepHandler = Callable[[bytes, ServerContext], Awaitable[bytes]]


class ByteStream(Protocol):
    """One side of a bidirectional stream of envelopes."""

    async def send(self, envelope: bytes) -> None:
        """Pass one envelope to the transport; waits while the peer reads too slowly.

        Raises:
            ConnectionError: the stream is over.
        """
        ...

    async def receive(self) -> bytes | None:
        """The next envelope; None at the stream's end, with or without an error."""
        ...


class OpenedStream(ByteStream, Protocol):
    """The side that opened a stream, and ends it."""

    async def finish(self) -> None:
        """End our direction; envelopes sent before still arrive."""
        ...

    def close(self) -> None:
        """End the stream now."""
        ...


class ServerStream:
    """The prefill worker's side of a Transfer."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context

    async def send(self, envelope: bytes) -> None:
        """Implements `ByteStream.send`."""
        try:
            await self._context.write(envelope)
        except (grpc.aio.AbortError, grpc.aio.UsageError, grpc.RpcError, grpc.aio.InternalError) as error:
            raise ConnectionError(str(error)) from error

    async def receive(self) -> bytes | None:
        """Implements `ByteStream.receive`."""
        try:
            message = await self._context.read()
        except (grpc.aio.AbortError, grpc.aio.UsageError, grpc.RpcError, grpc.aio.InternalError):
            return None
        return message if isinstance(message, bytes) else None  # grpc.aio.EOF


class ClientStream:
    """The decode worker's side of a Transfer. `close` must be called in every case."""

    def __init__(self, call: grpc.aio.StreamStreamCall[bytes, bytes]) -> None:
        self._call = call

    async def send(self, envelope: bytes) -> None:
        """Implements `ByteStream.send`."""
        try:
            await self._call.write(envelope)
        except (grpc.RpcError, grpc.aio.UsageError, grpc.aio.InternalError) as error:
            raise ConnectionError(str(error)) from error

    async def receive(self) -> bytes | None:
        """Implements `ByteStream.receive`."""
        try:
            message = await self._call.read()
        except (grpc.RpcError, grpc.aio.UsageError, grpc.aio.InternalError):
            return None
        return message if isinstance(message, bytes) else None  # grpc.aio.EOF

    async def finish(self) -> None:
        """End our direction; envelopes sent before still arrive."""
        try:
            await self._call.done_writing()
        except (grpc.RpcError, grpc.aio.UsageError, grpc.aio.InternalError):
            pass  # the stream has ended already

    def close(self) -> None:
        """End the stream now: the peer sees it as cancelled."""
        self._call.cancel()


class FetchStream:
    """The asking side of a Fetch; the one envelope that is sent is the request. `close` must be called."""

    def __init__(self, ask: Callable[[bytes], grpc.aio.UnaryStreamCall[bytes, bytes]]) -> None:
        self._ask = ask
        self._call: grpc.aio.UnaryStreamCall[bytes, bytes] | None = None
        self._asked = asyncio.Event()

    async def send(self, envelope: bytes) -> None:
        """Implements `ByteStream.send`: begins the call."""
        self._call = self._ask(envelope)
        self._asked.set()

    async def receive(self) -> bytes | None:
        """Implements `ByteStream.receive`; waits until the request is sent."""
        await self._asked.wait()
        assert self._call is not None
        try:
            message = await self._call.read()
        except (grpc.RpcError, grpc.aio.UsageError, grpc.aio.InternalError):
            return None
        return message if isinstance(message, bytes) else None  # grpc.aio.EOF

    async def finish(self) -> None:
        """Implements `OpenedStream.finish`: the request was the last that is sent."""

    def close(self) -> None:
        """End the call now."""
        if self._call is not None:
            self._call.cancel()


MAX_CHANNELS = 64
"""Beyond so many, channels without a connection are closed: workers that start again have other addresses."""

UNUSED_S = 60.0
"""For so long nothing was begun on a channel that is closed: a new call may not have begun to connect yet."""


class Channels:
    """One channel per peer address, kept for all hand-overs to it."""

    def __init__(self, key: bytes, tls: TlsIdentity | None = None) -> None:
        """`key` is kv.keys.proof_key: both ends prove to each other that they know it. `tls`: our certificates."""
        self._key = key
        self._tls = tls
        self._channel_by_address: dict[str, grpc.aio.Channel] = {}
        self._used_s: dict[str, float] = {}  # when a channel was last asked for
        self._closing: set[asyncio.Task[None]] = set()

    def to(self, address: str) -> grpc.aio.Channel:
        """The channel to `address` (host:port), opened at the first use."""
        channel = self._channel_by_address.get(address)
        if channel is None:
            if len(self._channel_by_address) >= MAX_CHANNELS:
                self._close_unconnected()
            channel = InsideChannel(address, self._key, CHANNEL_OPTIONS, self._tls)
            self._channel_by_address[address] = channel
        self._used_s[address] = asyncio.get_running_loop().time()
        return channel

    def transfer(self, address: str) -> ClientStream:
        """Open a hand-over stream. If the peer cannot be reached, the stream ends at once."""
        method: Any = self.to(address).stream_stream(TRANSFER)
        return ClientStream(method())

    def pair(self, address: str) -> ClientStream:
        """Open the control stream of a paired channel. If the peer cannot be reached, the stream ends at once."""
        method: Any = self.to(address).stream_stream(PAIR)
        return ClientStream(method())

    def fetch(self, address: str, request: bytes, timeout_s: float) -> AsyncIterator[bytes]:
        """Ask a worker for cached blocks; yields frame envelopes.

        Raises:
            grpc.RpcError: while iterating: the peer refused or is unreachable.
        """
        method: Any = self.to(address).unary_stream(FETCH)
        frames: AsyncIterator[bytes] = method(request, timeout=timeout_s).__aiter__()
        return frames

    def fetch_stream(self, address: str, timeout_s: float) -> FetchStream:
        """Ask a worker for cached blocks: send the request, then frame envelopes come.

        If the peer refuses or cannot be reached, the stream ends at once.
        """
        method: Any = self.to(address).unary_stream(FETCH)
        return FetchStream(lambda request: method(request, timeout=timeout_s))

    async def keep(self, address: str, request: bytes, timeout_s: float) -> bytes:
        """Offer blocks to a worker; returns its reply.

        Raises:
            grpc.RpcError: the peer refused or is unreachable.
        """
        method: Any = self.to(address).unary_unary(KEEP)
        reply: bytes = await method(request, timeout=timeout_s)
        return reply

    async def close(self) -> None:
        """Close every channel; streams that are still open end."""
        channels, self._channel_by_address = list(self._channel_by_address.values()), {}
        await asyncio.gather(*(channel.close() for channel in channels), *self._closing)

    def _close_unconnected(self) -> None:
        """Close the channels that carry nothing."""
        now_s = asyncio.get_running_loop().time()
        connected = (grpc.ChannelConnectivity.READY, grpc.ChannelConnectivity.CONNECTING)
        for address, channel in list(self._channel_by_address.items()):
            if now_s - self._used_s[address] >= UNUSED_S and channel.get_state() not in connected:
                del self._channel_by_address[address], self._used_s[address]
                closing = asyncio.create_task(channel.close())
                self._closing.add(closing)
                closing.add_done_callback(self._closing.discard)


def handlers(
    transfer: TransferHandler, pair: TransferHandler, fetch: FetchHandler, keep: KeepHandler
) -> list[grpc.GenericRpcHandler]:
    """Handlers of the two raw-bytes services, for a worker's server."""
    handover: dict[str, Any] = {
        "Transfer": grpc.stream_stream_rpc_method_handler(_any(transfer)),
        "Pair": grpc.stream_stream_rpc_method_handler(_any(pair)),
    }
    blocks: dict[str, Any] = {
        "Fetch": grpc.unary_stream_rpc_method_handler(_any(fetch)),
        "Keep": grpc.unary_unary_rpc_method_handler(_any(keep)),
    }
    return [
        grpc.method_handlers_generic_handler(HANDOVER_SERVICE, handover),
        grpc.method_handlers_generic_handler(BLOCKS_SERVICE, blocks),
    ]


def _any(handler: Any) -> Any:
    """Any type for a handler: the type stubs describe sync handlers only, but the aio server takes coroutines."""
    return handler
