"""Every error a user can meet, as one tree. Knows codes and statuses, not where they are shown."""

from __future__ import annotations

from typing import ClassVar


class TwostrokeError(Exception):
    """Base of all typed errors.

    `code` is stable and machine-readable; `http_status` and `grpc_status` (a name of grpc.StatusCode) say how the
    two faces show it. `param` names the offending field, `retry_after_s` when another try is worth it.
    """

    code: ClassVar[str] = "internal_error"
    type: ClassVar[str] = "server_error"
    http_status: ClassVar[int] = 500
    grpc_status: ClassVar[str] = "INTERNAL"

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class InternalError(TwostrokeError):
    """Our own fault; the log has more."""


# ------------------------------------------------------------------ the request is at fault


class InvalidRequest(TwostrokeError):
    """A field has a value that cannot be served. Names the value and the remedy."""

    code = "invalid_value"
    type = "invalid_request_error"
    http_status = 400
    grpc_status = "INVALID_ARGUMENT"


class ContextLengthExceeded(InvalidRequest):
    """Prompt plus asked-for tokens do not fit the model's context or the worker's cache."""

    code = "context_length_exceeded"


class UnsupportedParameter(InvalidRequest):
    """A known field of the API that this release does not serve."""

    code = "unsupported_parameter"


class ModelNotFound(InvalidRequest):
    """No worker serves a model of that name."""

    code = "model_not_found"
    http_status = 404
    grpc_status = "NOT_FOUND"


class RequestNotFound(InvalidRequest):
    """No request of that id is known (any more)."""

    code = "request_not_found"
    http_status = 404
    grpc_status = "NOT_FOUND"


class BodyTooLarge(InvalidRequest):
    """The request's body is over the configured limit."""

    code = "body_too_large"
    http_status = 413
    grpc_status = "RESOURCE_EXHAUSTED"


class UnsupportedEncoding(InvalidRequest):
    """The request's body is compressed in a way that is not read here."""

    code = "unsupported_encoding"
    http_status = 415


class UnsupportedContentType(InvalidRequest):
    """The request's body is of a kind that web pages can send unasked, and it may come from one."""

    code = "unsupported_content_type"
    http_status = 415


class HostForbidden(TwostrokeError):
    """The request asks for a name that is not known to be this server's."""

    code = "host_not_allowed"
    type = "permission_error"
    http_status = 403
    grpc_status = "PERMISSION_DENIED"


class OriginForbidden(TwostrokeError):
    """A web page of another origin asks, and nobody allowed that origin."""

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


# ------------------------------------------------------------------ the cluster cannot, just now


class Overloaded(TwostrokeError):
    """A bounded queue is full. Always with `retry_after_s`."""

    code = "overloaded"
    type = "rate_limit_error"
    http_status = 429
    grpc_status = "RESOURCE_EXHAUSTED"


class Unavailable(TwostrokeError):
    """No worker that could serve this is there (starting, draining, lost). Always with `retry_after_s`."""

    code = "unavailable"
    type = "server_error"
    http_status = 503
    grpc_status = "UNAVAILABLE"


class WorkerLost(Unavailable):
    """The worker that ran this request died or fell silent, and the request could not go on elsewhere."""

    code = "worker_lost"


class DeadlineExceeded(TwostrokeError):
    """The request's own deadline passed."""

    code = "deadline_exceeded"
    type = "timeout_error"
    http_status = 504
    grpc_status = "DEADLINE_EXCEEDED"


class Cancelled(TwostrokeError):
    """The client went away or asked for it."""

    code = "cancelled"
    type = "cancelled"
    http_status = 499
    grpc_status = "CANCELLED"


class NonFiniteKv(TwostrokeError):
    """A key or value was NaN or infinite: the request's numbers cannot be trusted, so it ends here."""

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
    """A setting has a value that cannot work. Names the setting, the value and the remedy."""

    code = "config_error"
    type = "config_error"


class CheckpointError(ConfigError):
    """A model directory that we cannot or will not load. Names the file or tensor and the remedy."""

    code = "checkpoint_error"


class DoesNotFit(ConfigError):
    """Weights and KV pool do not fit the memory; the message carries the arithmetic."""

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
    """The error a peer named by its code; an unknown code (a newer release's) becomes an InternalError.

    What always carries `retry_after_s` gets a second of it where the peer said none.
    """
    kind = ERROR_BY_CODE.get(code, InternalError)
    if retry_after_s is None and issubclass(kind, (Overloaded, Unavailable)):
        retry_after_s = 1.0
    return kind(message, param=param, retry_after_s=retry_after_s)
