"""Twostroke: a disaggregated serving cluster for large language models.

The SDK's public door: `from twostroke import Client`. Loaded on first use, so that importing a part costs only that part.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .client.async_client import AsyncClient as AsyncClient
    from .client.async_client import AsyncCompletionStream as AsyncCompletionStream
    from .client.channel import Tls as Tls
    from .client.client import Client as Client
    from .client.client import CompletionStream as CompletionStream
    from .client.values import Choice as Choice
    from .client.values import Chunk as Chunk
    from .client.values import Completion as Completion
    from .client.values import ModelCard as ModelCard
    from .client.values import Tokens as Tokens
    from .client.values import ToolCall as ToolCall
    from .client.values import Usage as Usage
    from .core.errors import BodyTooLarge as BodyTooLarge
    from .core.errors import Cancelled as Cancelled
    from .core.errors import CheckpointError as CheckpointError
    from .core.errors import ConfigError as ConfigError
    from .core.errors import ContextLengthExceeded as ContextLengthExceeded
    from .core.errors import CursorLost as CursorLost
    from .core.errors import DeadlineExceeded as DeadlineExceeded
    from .core.errors import DoesNotFit as DoesNotFit
    from .core.errors import HostForbidden as HostForbidden
    from .core.errors import IdempotencyKeyReused as IdempotencyKeyReused
    from .core.errors import InternalError as InternalError
    from .core.errors import InvalidRequest as InvalidRequest
    from .core.errors import KeyForbids as KeyForbids
    from .core.errors import KvCorrupted as KvCorrupted
    from .core.errors import ModelNotFound as ModelNotFound
    from .core.errors import NonFiniteKv as NonFiniteKv
    from .core.errors import OriginForbidden as OriginForbidden
    from .core.errors import Overloaded as Overloaded
    from .core.errors import PairRefused as PairRefused
    from .core.errors import PoisonRequest as PoisonRequest
    from .core.errors import PreviousResponseNotFound as PreviousResponseNotFound
    from .core.errors import QuotaExceeded as QuotaExceeded
    from .core.errors import RequestNotFound as RequestNotFound
    from .core.errors import StreamMoved as StreamMoved
    from .core.errors import TokensLost as TokensLost
    from .core.errors import TransportUnavailable as TransportUnavailable
    from .core.errors import TwostrokeError as TwostrokeError
    from .core.errors import Unauthenticated as Unauthenticated
    from .core.errors import Unavailable as Unavailable
    from .core.errors import UnsupportedContentType as UnsupportedContentType
    from .core.errors import UnsupportedEncoding as UnsupportedEncoding
    from .core.errors import UnsupportedParameter as UnsupportedParameter
    from .core.errors import WorkerLost as WorkerLost
    from .core.request import FinishReason as FinishReason
    from .core.request import TokenLogprobs as TokenLogprobs

__version__ = "0.1.0"

_NAMES_BY_MODULE = {
    ".client.async_client": ("AsyncClient", "AsyncCompletionStream"),
    ".client.channel": ("Tls",),
    ".client.client": ("Client", "CompletionStream"),
    ".client.values": ("Choice", "Chunk", "Completion", "ModelCard", "Tokens", "ToolCall", "Usage"),
    ".core.errors": (
        *("BodyTooLarge", "Cancelled", "CheckpointError", "ConfigError", "ContextLengthExceeded", "CursorLost"),
        *("DeadlineExceeded", "DoesNotFit", "HostForbidden", "IdempotencyKeyReused"),
        *("InternalError", "InvalidRequest", "KeyForbids", "KvCorrupted", "MethodNotAllowed", "ModelNotFound"),
        *("NoSuchRoute", "NonFiniteKv", "OriginForbidden", "Overloaded", "PairRefused", "PoisonRequest"),
        *("PreviousResponseNotFound", "QuotaExceeded", "RequestNotFound", "StreamMoved", "TokensLost"),
        *("TransportUnavailable", "TwostrokeError"),
        *("Unauthenticated", "Unavailable", "UnsupportedContentType", "UnsupportedEncoding"),
        *("UnsupportedParameter", "WorkerLost"),
    ),
    ".core.request": ("FinishReason", "TokenLogprobs"),
}
_MODULE_BY_NAME = {name: module for module, names in _NAMES_BY_MODULE.items() for name in names}

__all__ = ["__version__", *_MODULE_BY_NAME]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    module = _MODULE_BY_NAME.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(module, __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_BY_NAME})
