"""All errors that a user can get, as one class tree. Knows codes and statuses, but no protocol."""

from __future__ import annotations

from typing import ClassVar


class TwostrokeError(Exception):
    """Base of all typed errors.

    `code` is stable and machine-readable. `http_status` and `grpc_status` (a name of grpc.StatusCode) are the statuses
    of the two APIs. `param` names the offending field; `retry_after_s` is the time after which a retry is useful.
    """

    code: ClassVar[str] = "internal_error"
    type: ClassVar[str] = "server_error"
    http_status: ClassVar[int] = 500
    grpc_status: ClassVar[str] = "INTERNAL"
    usual_retry_after_s: ClassVar[float | None] = None  # where the one who raises it knows no better

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = self.usual_retry_after_s if retry_after_s is None else retry_after_s


class InternalError(TwostrokeError):
    """Fault of the cluster itself; the log has the details."""


class RankLost(InternalError):
    """A rank of a worker is dead, frozen or stuck. The worker's ranks end together, and the worker is restarted."""


class DeviceFault(InternalError):
    """The GPU of a worker lost or spoiled its work. The worker's process ends, and another one may use the GPU."""

    exit_code: ClassVar[int] = 4  # of the worker's process


class DeviceCordoned(DeviceFault):
    """The GPU of a worker must not be used again before an operator has seen to it. The message names it and why."""

    exit_code = 3


class RanksDiffer(InternalError):
    """The ranks of a worker made different calls, because one of them ended its step early. Each gets this error."""


# ------------------------------------------------------------------ the request is at fault


class InvalidRequest(TwostrokeError):
    """A field has a value that cannot be served. The message names the value and the remedy."""

    code = "invalid_value"
    type = "invalid_request_error"
    http_status = 400
    grpc_status = "INVALID_ARGUMENT"


class ContextLengthExceeded(InvalidRequest):
    """Prompt plus requested tokens exceed the model's context or the worker's cache."""

    code = "context_length_exceeded"


class UnsupportedParameter(InvalidRequest):
    """The request sets a field of the API that this release does not support."""

    code = "unsupported_parameter"


class PairRefused(InvalidRequest):
    """A prefill and a decode worker cannot hand over to each other. The message names the reason, `param` its field."""

    code = "kv_pair_refused"


class NoSuchRoute(TwostrokeError):
    """No HTTP route has this path."""

    code = "not_found"
    type = "invalid_request_error"
    http_status = 404
    grpc_status = "UNIMPLEMENTED"


class MethodNotAllowed(TwostrokeError):
    """The HTTP route does not take this method."""

    code = "method_not_allowed"
    type = "invalid_request_error"
    http_status = 405
    grpc_status = "UNIMPLEMENTED"


class ModelNotFound(InvalidRequest):
    """No worker serves a model of that name."""

    code = "model_not_found"
    http_status = 404
    grpc_status = "NOT_FOUND"


class RequestNotFound(InvalidRequest):
    """No request with this id is known, or it has been forgotten."""

    code = "request_not_found"
    http_status = 404
    grpc_status = "NOT_FOUND"


class PreviousResponseNotFound(InvalidRequest):
    """The response that a conversation goes on from is not stored here, or not any more."""

    code = "previous_response_not_found"


class CursorLost(InvalidRequest):
    """The stream cannot go on after this cursor: what its client has is not, or no longer, what would come before."""

    code = "cursor_lost"
    http_status = 409
    grpc_status = "ABORTED"


class IdempotencyKeyReused(InvalidRequest):
    """The Idempotency-Key was sent before with another request."""

    code = "idempotency_key_reused"
    http_status = 422
    grpc_status = "FAILED_PRECONDITION"


class BodyTooLarge(InvalidRequest):
    """The request's body exceeds the configured limit."""

    code = "body_too_large"
    http_status = 413
    grpc_status = "RESOURCE_EXHAUSTED"


class UnsupportedEncoding(InvalidRequest):
    """The request's body has a Content-Encoding that the server does not read."""

    code = "unsupported_encoding"
    http_status = 415


class UnsupportedContentType(InvalidRequest):
    """A web page could send this content type without a CORS preflight, and the request may come from one."""

    code = "unsupported_content_type"
    http_status = 415


class HostForbidden(TwostrokeError):
    """The Host header names no known name of this server."""

    code = "host_not_allowed"
    type = "permission_error"
    http_status = 403
    grpc_status = "PERMISSION_DENIED"


class OriginForbidden(TwostrokeError):
    """The request comes from a web page of another origin that is not allowed."""

    code = "origin_not_allowed"
    type = "permission_error"
    http_status = 403
    grpc_status = "PERMISSION_DENIED"


class Unauthenticated(TwostrokeError):
    """The API key is missing or wrong."""

    code = "invalid_api_key"
    type = "authentication_error"
    http_status = 401
    grpc_status = "UNAUTHENTICATED"


class KeyForbids(TwostrokeError):
    """The API key is valid, and does not allow this. The message names what would."""

    code = "key_not_allowed"
    type = "permission_error"
    http_status = 403
    grpc_status = "PERMISSION_DENIED"


# ------------------------------------------------------------------ the cluster cannot, just now


class Overloaded(TwostrokeError):
    """A bounded queue is full. Always with `retry_after_s`."""

    code = "overloaded"
    type = "rate_limit_error"
    http_status = 429
    grpc_status = "RESOURCE_EXHAUSTED"
    usual_retry_after_s = 1.0


class QuotaExceeded(Overloaded):
    """The API key's quota of requests or tokens per minute is used up. `retry_after_s` is when enough of it is back."""

    code = "rate_limit_exceeded"


class Unavailable(TwostrokeError):
    """No worker can serve the request (starting, draining, lost). Always with `retry_after_s`."""

    code = "unavailable"
    type = "server_error"
    http_status = 503
    grpc_status = "UNAVAILABLE"
    usual_retry_after_s = 1.0


class TransportUnavailable(Unavailable):
    """A hand-over would use less than the transport that the configuration requires. The message names the reason."""

    code = "kv_transport_unavailable"


class WorkerLost(Unavailable):
    """The worker of this request died or fell silent, and no other worker could continue it."""

    code = "worker_lost"


class StreamMoved(Unavailable):
    """The router of this stream stopped, was lost, or gave it up. The request goes on: resume it, at any router."""

    code = "stream_moved"


class PoisonRequest(TwostrokeError):
    """Two workers were lost while they computed this request; it is not given to a third one."""

    code = "poison_request"


class DeadlineExceeded(TwostrokeError):
    """The request's own deadline passed."""

    code = "deadline_exceeded"
    type = "timeout_error"
    http_status = 504
    grpc_status = "DEADLINE_EXCEEDED"


class Cancelled(TwostrokeError):
    """The client disconnected or cancelled the request."""

    code = "cancelled"
    type = "cancelled"
    http_status = 499
    grpc_status = "CANCELLED"


class NonFiniteKv(TwostrokeError):
    """A key or value was NaN or infinite, so the request's numbers cannot be trusted."""

    code = "non_finite_kv"
    grpc_status = "DATA_LOSS"


class KvCorrupted(TwostrokeError):
    """KV that arrived did not match its digests, and could neither be fetched again nor recomputed."""

    code = "kv_corrupted"
    grpc_status = "DATA_LOSS"


class TokensLost(TwostrokeError):
    """A stream skipped or repeated tokens, or stopped without saying that it was complete."""

    code = "tokens_lost"
    grpc_status = "DATA_LOSS"


# ------------------------------------------------------------------ start-up


class ConfigError(TwostrokeError):
    """A setting has an invalid value. The message names the setting, the value and the remedy."""

    code = "config_error"
    type = "config_error"


class CheckpointError(ConfigError):
    """A model directory cannot be loaded or is refused. The message names the file or tensor and the remedy."""

    code = "checkpoint_error"


class DoesNotFit(ConfigError):
    """Weights and KV pool exceed the memory. The message shows the calculation."""

    code = "does_not_fit"


def _tree(root: type[TwostrokeError]) -> dict[str, type[TwostrokeError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        found |= _tree(child)
    return found


ERROR_BY_CODE: dict[str, type[TwostrokeError]] = _tree(TwostrokeError)
ERROR_BY_CODE["internal_error"] = InternalError


def from_code(
    code: str, message: str, *, param: str | None = None, retry_after_s: float | None = None
) -> TwostrokeError:
    """Build the error that a peer named by its code. An unknown code, of a newer release, becomes InternalError.

    Overloaded and Unavailable have a `retry_after_s` also if the peer gave none.
    """
    kind = ERROR_BY_CODE.get(code, InternalError)
    return kind(message, param=param, retry_after_s=retry_after_s)
