"""The road to the server: addresses, TLS, keepalive, retries, and the one method through which every call goes."""

from __future__ import annotations

import ipaddress
import json
import math
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
import grpc.aio

from ..core.errors import ConfigError, InvalidRequest
from ..protos.inference_pb2_grpc import InferenceStub
from .calls import STREAMS, UNARY, Rpc

SERVICE = "twostroke.v1.Inference"
MAX_MESSAGE_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Tls:
    """Certificates, PEM. Without `root_certificates` those of the system count; the client's own pair is for mTLS."""

    root_certificates: bytes | None = None
    private_key: bytes | None = None
    certificate_chain: bytes | None = None
    server_name: str | None = None  # the name to expect in the server's certificate, if not the address

    def credentials(self) -> grpc.ChannelCredentials:
        """The form that gRPC wants.

        Raises:
            ConfigError: only one half of the client's own pair is given.
        """
        if (self.private_key is None) != (self.certificate_chain is None):
            raise ConfigError("tls has one of private_key and certificate_chain; give both, or none")
        return grpc.ssl_channel_credentials(self.root_certificates, self.private_key, self.certificate_chain)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where the server is and how to speak to it. Checked when it is built.

    A proxy of the environment (`https_proxy` and its like) is asked for TLS to another machine alone: it passes bytes
    that it cannot read. This machine needs none, and without TLS a proxy would read keys and prompts.
    """

    address: str
    api_key: str | None = None
    tls: Tls | None = None
    insecure: bool = False

    def __post_init__(self) -> None:
        if not self.address or "://" in self.address:
            raise ConfigError(f"address is {self.address!r}; give host:port, e.g. 'localhost:8001'")
        if self.tls is not None and self.insecure:
            raise ConfigError("tls=... and insecure=True contradict each other; give one of them")
        if self.tls is None and not self.insecure and not is_loopback(self.address):
            raise ConfigError(
                f"{self.address} is another machine: give tls=Tls(...), or insecure=True (--insecure) to send "
                "prompts and keys in the clear"
            )

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What goes with every call."""
        return (("authorization", f"Bearer {self.api_key}"),) if self.api_key else ()

    def options(self) -> list[tuple[str, Any]]:
        """The channel's settings."""
        options: list[tuple[str, Any]] = [
            ("grpc.keepalive_time_ms", 20_000),  # servers of ours permit a ping every 10 s
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            ("grpc.enable_retries", 1),
            ("grpc.service_config", json.dumps(service_config())),
            ("grpc.enable_http_proxy", int(self.tls is not None and not is_loopback(self.address))),
        ]
        if self.tls is not None and self.tls.server_name is not None:
            options.append(("grpc.ssl_target_name_override", self.tls.server_name))
        return options


def service_config() -> dict[str, Any]:
    """Retries: unary calls only, only UNAVAILABLE, few, and with a budget, so that nobody storms a server that is down.

    Streams are not retried: what to do after a lost one is the caller's choice.
    """
    policy = {
        "maxAttempts": 3,
        "initialBackoff": "0.2s",
        "maxBackoff": "1s",
        "backoffMultiplier": 2,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
    names = [{"service": SERVICE, "method": method} for method in UNARY]
    return {
        "methodConfig": [{"name": names, "retryPolicy": policy}],
        "retryThrottling": {"maxTokens": 10, "tokenRatio": 0.1},
    }


def is_loopback(address: str) -> bool:
    """Whether `address` (host:port, [v6]:port or unix:path) cannot leave this machine."""
    if address.startswith(("unix:", "unix-abstract:")):
        return True
    host = address.rpartition(":")[0] if address.count(":") == 1 or "]" in address else address
    host = host.removeprefix("[").removesuffix("]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_timeout(timeout_s: float) -> float:
    """`timeout_s`, if a call can be given that.

    Raises:
        InvalidRequest: it is not a positive, finite number.
    """
    if isinstance(timeout_s, (int, float)) and math.isfinite(timeout_s) and timeout_s > 0:
        return timeout_s
    raise InvalidRequest(f"timeout_s is {timeout_s!r}; must be a positive number of seconds", param="timeout_s")


# ---------------------------------------------------------------- the seam


class Replies(Protocol):
    """The messages of one call: one for a unary call, any number for a stream. Failures are `grpc.RpcError`."""

    def __next__(self) -> Any:
        """The next message; StopIteration when the call ended well."""
        ...

    def cancel(self) -> Any:
        """Give the call up; harmless once it is over."""
        ...


class AsyncReplies(Protocol):
    """`Replies` for asyncio. `cancel` does not wait."""

    def __anext__(self) -> Any:
        """Awaitable: the next message; StopAsyncIteration when the call ended well."""
        ...

    def cancel(self) -> Any:
        """Give the call up; harmless once it is over."""
        ...


class Transport(Protocol):
    """What `Client` needs of the network."""

    def open(self, rpc: Rpc, request: Any, timeout_s: float) -> Replies:
        """Send `request`; must not wait for the answer."""
        ...


class AsyncTransport(Protocol):
    """What `AsyncClient` needs of the network."""

    def open(self, rpc: Rpc, request: Any, timeout_s: float) -> AsyncReplies:
        """Send `request`; must not wait for the answer."""
        ...


class GrpcTransport:
    """Calls over one gRPC channel. Safe to share between threads."""

    def __init__(self, endpoint: Endpoint) -> None:
        options = endpoint.options()
        if endpoint.tls is None:
            self._channel = grpc.insecure_channel(endpoint.address, options)
        else:
            self._channel = grpc.secure_channel(endpoint.address, endpoint.tls.credentials(), options)
        self._stub = InferenceStub(self._channel)
        self._metadata = endpoint.metadata()

    def open(self, rpc: Rpc, request: Any, timeout_s: float) -> Replies:
        """Start the call."""
        method = getattr(self._stub, rpc)
        if rpc in STREAMS:
            stream: Replies = method(request, timeout=timeout_s, metadata=self._metadata)
            return stream
        return _OneReply(method.future(request, timeout=timeout_s, metadata=self._metadata))

    def close(self) -> None:
        """Cancel what runs and let the connection go."""
        self._channel.close()


class GrpcAsyncTransport:
    """Calls over one gRPC channel, made on first use, because a channel belongs to the loop that made it."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._channel: grpc.aio.Channel | None = None
        self._credentials = endpoint.tls.credentials() if endpoint.tls else None  # mistakes show at once
        self._metadata = grpc.aio.Metadata(*endpoint.metadata())
        self._closed = False

    def open(self, rpc: Rpc, request: Any, timeout_s: float) -> AsyncReplies:
        """Start the call. Needs a running loop."""
        method = getattr(InferenceStub(self._connected()), rpc)
        call = method(request, timeout=timeout_s, metadata=self._metadata)
        return _AsyncReplies(call) if rpc in STREAMS else _OneAsyncReply(call)

    async def close(self) -> None:
        """Cancel what runs and let the connection go."""
        self._closed = True
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()

    def _connected(self) -> grpc.aio.Channel:
        if self._closed:
            raise ValueError("the client is closed")
        if self._channel is None:
            address, options = self._endpoint.address, self._endpoint.options()
            if self._credentials is None:
                self._channel = grpc.aio.insecure_channel(address, options)
            else:
                self._channel = grpc.aio.secure_channel(address, self._credentials, options)
        return self._channel


class _OneReply(Iterator[Any]):
    def __init__(self, call: Any) -> None:
        self._call = call
        self._taken = False

    def __next__(self) -> Any:
        if self._taken:
            raise StopIteration
        self._taken = True
        return self._call.result()

    def cancel(self) -> None:
        self._call.cancel()


class _AsyncReplies(AsyncIterator[Any]):
    def __init__(self, call: Any) -> None:
        self._call = call

    async def __anext__(self) -> Any:
        message = await self._call.read()
        if message is grpc.aio.EOF:
            raise StopAsyncIteration
        return message

    def cancel(self) -> None:
        self._call.cancel()


class _OneAsyncReply(AsyncIterator[Any]):
    def __init__(self, call: Any) -> None:
        self._call = call
        self._taken = False

    async def __anext__(self) -> Any:
        if self._taken:
            raise StopAsyncIteration
        self._taken = True
        return await self._call

    def cancel(self) -> None:
        self._call.cancel()
