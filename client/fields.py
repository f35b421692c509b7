"""Fields of wire messages, set so that a value which protobuf refuses is the caller's mistake, with a name."""

from __future__ import annotations

from typing import Any, TypeVar

from ..core.errors import InvalidRequest

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
    except (TypeError, ValueError) as error:  # UnicodeEncodeError is a ValueError
        raise InvalidRequest(f"{param or field} is {shown(value)}: {error}", param=param or field) from None
    return message


def as_list(values: Any, param: str) -> list[Any]:
    """The values of anything that can be iterated.

    Raises:
        InvalidRequest: it cannot be.
    """
    try:
        return list(values)
    except TypeError:
        raise InvalidRequest(f"{param} is {shown(values)}; give a list", param=param) from None


def shown(value: Any) -> str:
    """A value as an error shows it."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
