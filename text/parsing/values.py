"""Values of arguments: JSON texts, and texts that become JSON by the tool's schema. Knows no format."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .source import Malformed

MAX_SCHEMAS = 256  # that are looked at for the types of one parameter: alternatives and definitions
MAX_REFERENCE_PARTS = 16
_PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}
_ANY = frozenset({"string", "integer", "number", "boolean", "null", "array", "object"})


class Tools:
    """The tools that a request offers: names, and schemas of their parameters."""

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        """`tools`: in OpenAI's format, checked."""
        functions = [tool["function"] for tool in tools]
        self._parameters: dict[str, Any] = {function["name"]: function.get("parameters") for function in functions}

    def __contains__(self, name: str) -> bool:
        return name in self._parameters

    def types_of(self, name: str, key: str) -> frozenset[str]:
        """JSON types that the schema allows for a parameter; all types if it does not say."""
        schema = self._parameters.get(name)
        properties = schema.get("properties") if isinstance(schema, Mapping) else None
        given = properties.get(key) if isinstance(properties, Mapping) else None
        return _types(given, schema) or _ANY


def _types(schema: Any, root: Any) -> frozenset[str]:
    """Types that a schema names, itself or in its alternatives; empty if it names none."""
    found: set[str] = set()
    waiting = [schema]
    for _ in range(MAX_SCHEMAS):
        if not waiting:
            break
        schema = waiting.pop()
        if not isinstance(schema, Mapping):
            continue
        given = schema.get("type")
        if isinstance(reference := schema.get("$ref"), str):
            waiting.append(_referred(reference, root))
        elif isinstance(given, str):
            found.add(given)
        elif isinstance(given, Sequence):
            found.update(one for one in given if isinstance(one, str))
        else:
            alternatives = (schema.get(name) for name in ("anyOf", "oneOf", "allOf"))
            waiting += [one for listed in alternatives if isinstance(listed, list) for one in listed[:MAX_SCHEMAS]]
            values = schema.get("enum", [schema["const"]] if "const" in schema else [])
            found.update(_type_of(value) for value in (values if isinstance(values, list) else [])[:MAX_SCHEMAS])
    return frozenset(found)


def _referred(reference: str, root: Any) -> Any:
    """The definition that a local reference names, e.g. #/$defs/Place; None if there is none."""
    place = root
    for part in reference.removeprefix("#/").split("/")[:MAX_REFERENCE_PARTS]:
        place = place.get(part) if isinstance(place, Mapping) else None
    return place


def _type_of(value: Any) -> str:
    if value is None:
        return "null"
    for kind, name in ((bool, "boolean"), (int, "integer"), (float, "number"), (str, "string"), (list, "array")):
        if isinstance(value, kind):
            return name
    return "object"


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def loads(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is none, or it nests too deeply.
    """
    try:
        return json.loads(text, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("nests too deeply") from None


def dumps(value: Any) -> str:
    """JSON text of a value, encodable as UTF-8."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate, which must stay an escape
        return json.dumps(value)
    return text


def function_of(value: Any) -> tuple[str, str]:
    """Name and arguments of a call that is written as one JSON object.

    Raises:
        Malformed: it has no name, or its arguments are no object.
    """
    if not isinstance(value, dict) or not isinstance(name := value.get("name"), str) or not name:
        raise Malformed
    given = value.get("arguments", value.get("parameters"))
    if isinstance(given, str):
        return name, checked_object(given)
    if given is not None and not isinstance(given, dict):
        raise Malformed
    return name, dumps(given or {})


def checked_object(text: str) -> str:
    """A JSON object's text, unchanged if it is strict JSON; raw line ends and tabs in its strings become escapes.

    Raises:
        Malformed: it is no JSON object.
    """
    try:
        if isinstance(loads(text), dict):
            return text
    except ValueError:
        pass
    try:
        value = json.loads(text, strict=False, parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise Malformed from None
    if not isinstance(value, dict):
        raise Malformed
    return dumps(value)


def json_or_text(text: str) -> str:
    """JSON text of a value that is written as JSON; if it is none, it becomes a string."""
    stripped = text.strip()
    try:
        loads(stripped)
    except ValueError:
        return dumps(text)
    return stripped


def typed(text: str, types: frozenset[str]) -> str:
    """JSON text of a parameter that is written without quotes: strings as they are, other values as JSON.

    A text that may be a string and something else becomes the latter if it is one of the other allowed types.
    """
    if types == {"string"}:
        return dumps(text)
    stripped = text.strip()
    stripped = _PYTHON_WORDS.get(stripped, stripped)
    try:
        value = loads(stripped)
    except ValueError:
        return dumps(text)
    kind = _type_of(value)
    is_whole = kind == "integer" or (kind == "number" and value == value // 1)
    if kind in types or (kind == "integer" and "number" in types) or (is_whole and "integer" in types):
        return dumps(text) if kind == "string" and "string" in types else stripped
    return dumps(text) if "string" in types or kind == "string" else stripped


def object_text(members: Mapping[str, str]) -> str:
    """JSON text of an object, from the JSON texts of its members."""
    return "{" + ", ".join(f"{dumps(key)}: {value}" for key, value in members.items()) + "}"
