"""Checks of single values: integers, numbers, texts. An error names value, field and remedy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import islice
from reprlib import Repr
from typing import Any

from ...core.errors import InvalidRequest

_BRIEF = Repr()
_BRIEF.maxlevel, _BRIEF.maxstring = 3, 60
_CHARS_OF_A_VALUE = 4  # quotes, comma, space


def integer(name: str, value: Any, default: int, low: int, high: int) -> int:
    """Check an integer from `low` to `high`; `default` if the value is None.

    Raises:
        InvalidRequest: the value is out of range or no integer.
    """
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidRequest(f"{name} is {short(value)}; must be a whole number from {low} to {high}", param=name)
    return value


def number(name: str, value: Any, default: float, low: float, high: float) -> float:
    """Check a finite number from `low` to `high`; `default` if the value is None.

    Raises:
        InvalidRequest: the value is out of range or no number.
    """
    if value is None:
        return default
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not good or not math.isfinite(value) or not low <= value <= high:
        raise InvalidRequest(f"{name} is {short(value)}; must be a number from {low:g} to {high:g}", param=name)
    return float(value)


def text_of(name: str, text: str) -> str:
    """Check that a text can be encoded as UTF-8; returns it.

    Raises:
        InvalidRequest: it has a lone surrogate.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"{name} holds a lone surrogate at character {error.start}; send valid Unicode", param=name
        ) from None
    return text


def short(value: Any) -> str:
    """Text of a value for an error message: at most 80 characters, at a cost that does not grow with the value."""
    text = repr(value[:80]) if isinstance(value, (str, bytes)) else _BRIEF.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def deeper_than(value: Any, levels: int) -> bool:
    """True if lists and objects are nested more than `levels` deep."""
    layer = [value] if isinstance(value, (list, tuple, Mapping)) else []
    for _ in range(levels):
        layer = [
            inner
            for outer in layer
            for inner in (outer.values() if isinstance(outer, Mapping) else outer)
            if isinstance(inner, (list, tuple, Mapping))
        ]
        if not layer:
            break
    return bool(layer)


def least_chars(value: Any, enough: int) -> int:
    """About the characters that a value has as JSON; counts no further than `enough`."""
    num_chars, rest = 0, [value]
    while rest and num_chars < enough:
        inner = rest.pop()
        if isinstance(inner, str):
            num_chars += len(inner)
        elif isinstance(inner, Mapping):
            num_chars += sum(map(len, islice(inner, enough)))
            rest.extend(inner.values())
        elif isinstance(inner, (list, tuple)):
            rest.extend(inner)
        num_chars += _CHARS_OF_A_VALUE
    return num_chars


def refuse_constant(name: str) -> float:
    """Callback for `json.loads(parse_constant=...)` that raises ValueError: NaN and infinities are not JSON."""
    raise ValueError(f"{name} is not a JSON number")
