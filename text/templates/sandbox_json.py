"""The filter `tojson` with transformers' parameters, metered."""

from __future__ import annotations

import json
from typing import Any

from jinja2.exceptions import SecurityError

from .charges import Meter

MAX_INDENT = 16
MAX_SEPARATOR_CHARS = 32


def to_json(  # noqa: PLR0917  # templates give them in this order
    meter: Meter,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Encode `value` as JSON.

    Raises:
        SecurityError: the indent or the separators are too large.
        LimitExceeded: the text exceeds the remaining work.
    """
    if indent is not None and not (isinstance(indent, int) and 0 <= indent <= MAX_INDENT):
        raise SecurityError(f"tojson(indent={indent!r:.40}); must be a number from 0 to {MAX_INDENT}")
    if separators is not None:
        separators = _short(separators)
    meter.charge(2 * meter.charge_size(value))
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=bool(sort_keys)
    )
    if indent is None:
        text = encoder.encode(value)
        meter.charge(len(text))
        return text
    parts = []
    for part in encoder.iterencode(value):
        meter.charge(len(part))
        parts.append(part)
    return "".join(parts)


def _short(separators: Any) -> tuple[str, str]:
    match separators:
        case [str(between), str(after)] if len(between) + len(after) <= MAX_SEPARATOR_CHARS:
            return between, after
    raise SecurityError(f"tojson(separators=…) must be two texts of together at most {MAX_SEPARATOR_CHARS} characters")
