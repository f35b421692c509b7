"""JSON schemas as clients' libraries write them: said in words that the grammar compiler keeps, and where one fails.

A schema that says the same is no other schema: `format` is a note where no rule is known for it (JSON Schema 2020-12,
Validation, 7.2.1), and `propertyNames` beside nothing but `additionalProperties` is a pattern, or a list of properties.
Knows no tokenizer and no request.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

# Formats that llguidance has a rule for.
FORMATS = frozenset(
    ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", "unknown")
)
_ONE = (
    *("items", "additionalItems", "additionalProperties", "contains", "propertyNames", "not", "if", "then", "else"),
    *("unevaluatedItems", "unevaluatedProperties"),
)
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_NAMES_ONLY = frozenset(("type", "title", "description"))  # of a `propertyNames` that any name satisfies
# Patterns of clients' libraries, with look-ahead, in words that a regular grammar keeps.
_SAME_PATTERN = {
    r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$": r"^[+-]?(\d+\.?\d*|\.\d+)$",  # pydantic's Decimal: a digit at least
}
_UNKEPT = re.compile(r'Unimplemented keys: \[((?:"[^"]*"(?:, )?)+)\]')


def keepable(schema: Any) -> Any:
    """The schema without formats that nobody knows, and `propertyNames` in other words where they say the same."""
    if not isinstance(schema, Mapping):
        return schema
    kept = {**schema}
    for key, value in schema.items():
        if key in _NAMED and isinstance(value, Mapping):
            kept[key] = {name: keepable(inner) for name, inner in value.items()}
        elif key in _LISTS and isinstance(value, list):
            kept[key] = list(map(keepable, value))
        elif key in _ONE:
            kept[key] = keepable(value)
    if isinstance(kept.get("format"), str) and kept["format"] not in FORMATS:
        del kept["format"]
    if isinstance(kept.get("pattern"), str):
        kept["pattern"] = _SAME_PATTERN.get(kept["pattern"], kept["pattern"])
    return _with_names(kept)


def _with_names(schema: dict[str, Any]) -> dict[str, Any]:
    """`propertyNames` as `patternProperties` or `properties`; unchanged where that would not be the same."""
    names = schema.get("propertyNames")
    if names is True or (isinstance(names, Mapping) and names.keys() <= _NAMES_ONLY and _is_text(names)):
        return {key: value for key, value in schema.items() if key != "propertyNames"}
    beside = schema.keys() & {"properties", "patternProperties", "required"}
    if not isinstance(names, Mapping) or beside or not _is_text(names):
        return schema
    said = names.keys() - _NAMES_ONLY
    values = schema.get("additionalProperties", {})
    rest = {key: value for key, value in schema.items() if key not in ("propertyNames", "additionalProperties")}
    if said == {"pattern"}:
        return {**rest, "patternProperties": {names["pattern"]: values}, "additionalProperties": False}
    allowed = names.get("enum") if said == {"enum"} else [names.get("const")] if said == {"const"} else None
    if isinstance(allowed, list) and allowed and all(isinstance(name, str) for name in allowed):
        return {**rest, "properties": dict.fromkeys(allowed, values), "additionalProperties": False}
    return schema


def _is_text(names: Mapping[str, Any]) -> bool:
    return bool(names.get("type", "string") == "string")


def told(schema: Any, error: str) -> str | None:
    """What a compiler's error is about, with its place in the schema; None: nothing was recognised.

    `error`: llguidance's message, `Unimplemented keys: ["uniqueItems"]` or a regex's parse error with the pattern.
    """
    found = _UNKEPT.search(error)
    if found is not None:
        unkept = set(re.findall(r'"([^"]*)"', found[1]))
        return next((f"{place}: {key} cannot be kept" for place, key, _ in _said(schema) if key in unkept), None)
    shown = " ".join(error.partition("regex parse error:")[2].split())
    for place, key, value in _said(schema):
        if key == "pattern" and isinstance(value, str) and shown.startswith(" ".join(value.split()) + " "):
            why = re.split(r" \d+ \| ", shown.rpartition("error: ")[2])[0]
            return f"{place}: the pattern cannot be kept ({why[:100]})"
    return None


def _said(schema: Any, place: str = "") -> Iterator[tuple[str, str, Any]]:
    """Every keyword of a schema and of those in it: the schema's place, the keyword and its value."""
    if not isinstance(schema, Mapping):
        return
    for key, value in schema.items():
        yield place or "the schema", str(key), value
        below = f"{place}.{key}".removeprefix(".")
        if key in _NAMED and isinstance(value, Mapping):
            for name, inner in value.items():
                yield from _said(inner, f"{below}.{name}")
        elif key in _LISTS and isinstance(value, list):
            for number, inner in enumerate(value):
                yield from _said(inner, f"{below}[{number}]")
        elif key in _ONE:
            yield from _said(value, below)
