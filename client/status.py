"""Encoding of typed errors in gRPC statuses: the router writes them, the SDK reads them. Knows no service and channel.

The status carries one `google.rpc.ErrorInfo` (domain "twostroke", reason = the error's code; metadata `param` and
`retry_after_ms` if the error has them) in `grpc-status-details-bin`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from ..core.errors import (
    BodyTooLarge,
    Cancelled,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    Overloaded,
    TwostrokeError,
    Unauthenticated,
    Unavailable,
    from_code,
)

DOMAIN = "twostroke"
DETAILS_KEY = "grpc-status-details-bin"

# The message is sent twice, once percent-encoded (up to nine bytes per character). All trailers must stay below the
# 8 KiB that peers accept by default, or the client would get only RESOURCE_EXHAUSTED instead of the error.
MAX_MESSAGE_BYTES = 1500
MAX_PARAM_BYTES = 200

PUSHBACK_KEY = "grpc-retry-pushback-ms"
MAX_PUSHBACK_S = 2.0
TRANSPORT_RETRY_S = 1.0


@dataclass(frozen=True)
class RpcStatus(grpc.Status):
    """Status with trailers, for `abort_with_status`."""

    code: grpc.StatusCode
    details: str
    trailing_metadata: tuple[tuple[str, str | bytes], ...]


class RpcFailure(Protocol):
    """Common interface of `grpc.RpcError` (of a synchronous call) and `grpc.aio.AioRpcError`."""

    def code(self) -> grpc.StatusCode:
        """Status code of the call."""
        ...

    def details(self) -> str | None:
        """Message of the status."""
        ...

    def trailing_metadata(self) -> Any:
        """Pairs of key and value, or None."""
        ...


# ---------------------------------------------------------------- the server's side


def to_rpc_status(error: TwostrokeError) -> RpcStatus:
    """Make the gRPC status of an error, for `context.abort_with_status`.

    Too long messages are cut and unpaired surrogates are replaced, so that the status can always be sent.
    """
    info = error_details_pb2.ErrorInfo(domain=DOMAIN, reason=error.code)
    if error.param is not None:
        info.metadata["param"] = _bounded(error.param, MAX_PARAM_BYTES)
    if error.retry_after_s is not None:
        info.metadata["retry_after_ms"] = str(max(1, round(error.retry_after_s * 1000)))
    code = grpc.StatusCode[error.grpc_status]
    status = status_pb2.Status(code=code.value[0], message=_bounded(error.message, MAX_MESSAGE_BYTES))
    status.details.add().Pack(info)
    rich = rpc_status.to_status(status)
    pushback = ((PUSHBACK_KEY, _pushback_ms(error.retry_after_s)),) if error.retry_after_s is not None else ()
    return RpcStatus(rich.code, rich.details, (*rich.trailing_metadata, *pushback))


def _pushback_ms(retry_after_s: float) -> str:
    """Delay of gRPC's own retries in ms; -1 forbids them, so that the caller gets a long delay as an error."""
    return str(max(1, round(retry_after_s * 1000))) if retry_after_s <= MAX_PUSHBACK_S else "-1"


def _bounded(text: str, max_bytes: int) -> str:
    raw = text.encode("utf-8", "replace")
    if len(raw) <= max_bytes:
        return raw.decode()
    return raw[: max_bytes - 3].decode("utf-8", "ignore") + "…"


# ---------------------------------------------------------------- the client's side


def from_rpc_error(failure: RpcFailure, target: str = "the server") -> TwostrokeError:
    """Make the typed error of a failed call: the server's error if it sent one, else one for the transport's status.

    `target` is the address that the caller used, for the message only.
    """
    info = _error_info(failure)
    message = failure.details() or failure.code().name
    if info is None:
        return _from_transport(failure.code(), message, target)
    retry_after_ms = info.metadata.get("retry_after_ms", "")
    return from_code(
        info.reason,
        message,
        param=info.metadata.get("param"),
        retry_after_s=int(retry_after_ms) / 1000 if retry_after_ms.isdecimal() else None,
    )


def is_typed(failure: RpcFailure) -> bool:
    """True if the server itself sent the error; false if the connection was lost, or was never there."""
    return _error_info(failure) is not None


def _error_info(failure: RpcFailure) -> error_details_pb2.ErrorInfo | None:
    for key, value in failure.trailing_metadata() or ():
        if key != DETAILS_KEY:
            continue
        try:
            status = status_pb2.Status.FromString(value)
            for detail in status.details:
                info = error_details_pb2.ErrorInfo()
                if detail.Unpack(info) and info.domain == DOMAIN:
                    return info
        except DecodeError:
            return None  # not our format; the status code is used
    return None


def _from_transport(code: grpc.StatusCode, message: str, target: str) -> TwostrokeError:
    match code:
        case grpc.StatusCode.UNAVAILABLE:
            return Unavailable(f"{target}: {_told(message)}. {_hint(message)}", retry_after_s=TRANSPORT_RETRY_S)
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return DeadlineExceeded(f"{target} did not answer within the call's timeout_s")
        case grpc.StatusCode.CANCELLED:
            return Cancelled(message)
        case grpc.StatusCode.UNAUTHENTICATED | grpc.StatusCode.PERMISSION_DENIED:
            return Unauthenticated(f"{target}: {message}. Pass api_key=... or a client certificate in tls=...")
        case grpc.StatusCode.RESOURCE_EXHAUSTED if "larger than max" in message:
            return BodyTooLarge(f"{target}: {message}")
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return Overloaded(f"{target}: {message}", retry_after_s=TRANSPORT_RETRY_S)
        case grpc.StatusCode.INVALID_ARGUMENT:
            return InvalidRequest(f"{target}: {message}")
        case grpc.StatusCode.UNIMPLEMENTED:
            hint = "Is that the gRPC port of a Twostroke router (8001 by default), and of this release?"
            return Unavailable(f"{target}: {message or 'it does not know this call'}. {hint}")
        case _:
            return InternalError(f"{target}: {code.name}: {message}")


def _told(message: str) -> str:
    """The message, less gRPC's words around the commonest one."""
    return "connection refused" if message.endswith("Connection refused") else message


def _hint(message: str) -> str:
    """Most likely cause of a refused connection. A refused mTLS handshake looks like any other failed connection."""
    lowered = message.lower()
    if "http1" in lowered or "http/1" in lowered:
        return "That is an HTTP port; give the gRPC port, 8001 by default."
    if "expected settings frame" in lowered:
        return "What listens there speaks no gRPC; give the gRPC port, 8001 by default."
    if any(word in lowered for word in ("ssl", "tls", "handshake", "certificate", "wrong_version_number")):
        return "The TLS handshake failed: check that both sides use TLS and the certificates in tls=... (--tls-ca)."
    if "dns" in lowered or "resolution" in lowered:
        return "The host's name could not be resolved."
    if lowered.endswith("connection refused"):
        return (
            "Is the server started (`twostroke serve` starts one, and says its addresses), and is this its gRPC "
            "address (port 8001 by default)?"
        )
    if "failed to connect" in lowered or "refused" in lowered:
        return (
            "Is the server started, and is this its gRPC address (port 8001 by default)? "
            "A server that wants TLS or a client certificate refuses like this too: see tls=... (--tls-ca)."
        )
    return "The connection was lost."
