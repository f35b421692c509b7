"""Connection to the server: address, TLS, keepalive, retries, and the transport that all calls use."""

from __future__ import annotations

import ipaddress
import json
import math
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import grpc
import grpc.aio

from ..core.errors import Cancelled, ConfigError, InvalidRequest
from ..protos.inference_pb2_grpc import InferenceStub
from .calls import STREAMS, UNARY, Rpc

SERVICE = "twostroke.v1.Inference"
_CLOSED = "the client is closed; make a new one"
File = str | PathLike[str]  # in PEM
MAX_MESSAGE_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Tls:
    """Certificates in PEM. Default of `root_certificates`: the system's. The other two are the client's, for mTLS."""

    root_certificates: bytes | None = None
    private_key: bytes | None = None
    certificate_chain: bytes | None = None
    server_name: str | None = None  # expected name in the server's certificate; None: the address

    @classmethod
    def of(
        cls,
        tls: Tls | bool | File | None,
        cert: File | None,
        key: File | None,
    ) -> Tls | None:
        """What `Client(tls=..., cert=..., key=...)` means: True is the system's authorities, a path is a file of them.

        Raises:
            ConfigError: a file cannot be read, or certificates are given without TLS.
        """
        if isinstance(tls, Tls):
            if cert or key:
                raise ConfigError("tls=Tls(...) holds certificate and key; leave cert=... and key=... out")
            return tls
        if tls is None or tls is False:
            if cert or key:
                raise ConfigError("cert=... and key=... need tls=True, or tls= a file of the server's authority")
            return None
        return cls(
            root_certificates=None if tls is True else _read("tls", tls),
            private_key=_read("key", key) if key else None,
            certificate_chain=_read("cert", cert) if cert else None,
        )

    def credentials(self) -> grpc.ChannelCredentials:
        """Convert to gRPC's credentials.

        Raises:
            ConfigError: only one of private_key and certificate_chain is given.
        """
        if (self.private_key is None) != (self.certificate_chain is None):
            raise ConfigError("tls has one of private_key and certificate_chain; give both, or none")
        return grpc.ssl_channel_credentials(self.root_certificates, self.private_key, self.certificate_chain)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Address of the server, with key and TLS. Checked when it is built.

    A proxy from the environment (e.g. `https_proxy`) is used only for TLS to another machine, because it cannot read
    the bytes that it forwards. This machine needs no proxy, and without TLS a proxy could read keys and prompts.
    """

    address: str
    api_key: str | None = None
    tls: Tls | None = None
    insecure: bool = False

    def __post_init__(self) -> None:
        if ":" not in self.address or "://" in self.address:
            raise ConfigError(f"address is {self.address!r}; give host:port, e.g. 'localhost:8001'")
        if self.tls is not None and self.insecure:
            raise ConfigError("tls=... and insecure=True contradict each other; give one of them")
        if self.tls is None and not self.insecure and not is_loopback(self.address):
            raise ConfigError(
                f"{self.address} is another machine: give tls=Tls(...) (in the SDK), or insecure=True (--insecure) to "
                "send prompts and keys in the clear"
            )

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Metadata of every call."""
        return (("authorization", f"Bearer {self.api_key}"),) if self.api_key else ()

    def options(self) -> list[tuple[str, Any]]:
        """Settings of the gRPC channel."""
        options: list[tuple[str, Any]] = [
            ("grpc.keepalive_time_ms", 20_000),  # our servers permit a ping every 10 s
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


def _read(name: str, path: File) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise ConfigError(f"{name} is {str(path)!r}: {error.strerror}; it takes a file in PEM") from None


def service_config() -> dict[str, Any]:
    """gRPC service config for retries: only unary calls, only UNAVAILABLE, few, and throttled while a server is down.

    Streams are not retried: the caller decides after a lost one.
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
    """Return whether `address` (host:port, [v6]:port or unix:path) always means this machine."""
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
    """Return `timeout_s` if it is valid.

    Raises:
        InvalidRequest: it is not a positive, finite number.
    """
    if isinstance(timeout_s, (int, float)) and math.isfinite(timeout_s) and timeout_s > 0:
        return timeout_s
    raise InvalidRequest(f"timeout_s is {timeout_s!r}; must be a positive number of seconds", param="timeout_s")


# ---------------------------------------------------------------- the seam


class Replies(Protocol):
    """Messages of one call: one for a unary call, any number for a stream. Failures are `grpc.RpcError`."""

    def __next__(self) -> Any:
        """Wait for the next message; StopIteration if the call ended without an error."""
        ...

    def cancel(self) -> Any:
        """Cancel the call; no effect after its end."""
        ...


class AsyncReplies(Protocol):
    """Asynchronous `Replies`. `cancel` does not wait."""

    def __anext__(self) -> Any:
        """Return an awaitable of the next message; StopAsyncIteration if the call ended without an error."""
        ...

    def cancel(self) -> Any:
        """Cancel the call; no effect after its end."""
        ...


class Transport(Protocol):
    """Network interface of `Client`."""

    def open(self, rpc: Rpc, request: Any, timeout_s: float) -> Replies:
        """Start a call with `request`; must not wait for the answer."""
        ...


class AsyncTransport(Protocol):
    """Network interface of `AsyncClient`."""

    def open(self, rpc: Rpc, request: Any, timeout_s: float) -> AsyncReplies:
        """Start a call with `request`; must not wait for the answer."""
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
        self._closed = False
        self._metadata = endpoint.metadata()

    def open(self, rpc: Rpc, request: Any, timeout_s: float) -> Replies:
        """Start the call."""
        method = getattr(self._stub, rpc)
        call = method if rpc in STREAMS else method.future
        try:
            replies: Any = call(request, timeout=timeout_s, metadata=self._metadata)
        except ValueError:  # grpc's, perhaps while another thread closes the channel
            if self._closed:
                raise Cancelled(_CLOSED) from None
            raise
        return replies if rpc in STREAMS else _OneReply(replies)

    def close(self) -> None:
        """Cancel running calls and close the connection."""
        self._closed = True
        self._channel.close()


class GrpcAsyncTransport:
    """Calls over one gRPC channel. It is made at the first call, because it belongs to the loop that makes it."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._channel: grpc.aio.Channel | None = None
        self._credentials = endpoint.tls.credentials() if endpoint.tls else None  # checked at once
        self._metadata = grpc.aio.Metadata(*endpoint.metadata())
        self._closed = False

    def open(self, rpc: Rpc, request: Any, timeout_s: float) -> AsyncReplies:
        """Start the call. Needs a running loop."""
        method = getattr(InferenceStub(self._connected()), rpc)
        call = method(request, timeout=timeout_s, metadata=self._metadata)
        return _AsyncReplies(call) if rpc in STREAMS else _OneAsyncReply(call)

    async def close(self) -> None:
        """Cancel running calls and close the connection."""
        self._closed = True
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()

    def _connected(self) -> grpc.aio.Channel:
        if self._closed:
            raise Cancelled(_CLOSED)
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
