"""Setters for fields of wire messages: a value that protobuf refuses becomes an InvalidRequest that names the field."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from ..core.errors import InvalidRequest
from ..protos import inference_pb2

Wire = TypeVar("Wire")


def set_field(message: Wire, field: str, value: Any, param: str | None = None) -> Wire:
    """Set a field; a list is appended to a repeated one.

    Raises:
        InvalidRequest: protobuf refuses the value (type, range, unpaired surrogates); names `param`, else the field.
    """
    try:
        if isinstance(value, list):
            getattr(message, field).extend(value)
        else:
            setattr(message, field, value)
    # UnicodeEncodeError is a ValueError. A list for a scalar has no `extend`; a huge integer for a flag overflows.
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InvalidRequest(f"{param or field} is {shown(value)}: {error}", param=param or field) from None
    return message


def as_list(values: Any, param: str) -> list[Any]:
    """Return the values of an iterable as a list.

    Raises:
        InvalidRequest: `values` is not iterable, or a text, bytes or a mapping, whose parts would pass for values.
    """
    if isinstance(values, Iterable) and not isinstance(values, str | bytes | bytearray | Mapping):
        return list(values)
    raise InvalidRequest(f"{param} is {shown(values)}; give a list", param=param)


def shown(value: Any) -> str:
    """Text of a value for an error message, at most 80 characters."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more than 4,300 digits
        return f"a long {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."


def make_resumable(request: inference_pb2.GenerateRequest | inference_pb2.ChatRequest) -> None:
    """Name a resumable request, so that it can be sent again; what the caller has named stays."""
    if request.resumable or request.idempotency_key:
        request.resumable = True
        request.request_id = request.request_id or f"sdk-{secrets.token_hex(12)}"
        request.idempotency_key = request.idempotency_key or request.request_id
