"""Random JSON schemas whose texts are short, for tests of structured output."""

from __future__ import annotations

import random
from typing import Any

MAX_LEVELS = 3
_NAMES = ("a", "name", "größe", 'quo"te', "list", "x y", "n1")
_TEXTS = ("red", "", "a b", "ü", '"', "\\", "line\nbreak", "null")


def random_schema(draw: random.Random, level: int = 0) -> dict[str, Any]:
    """A schema; nested at most MAX_LEVELS deep, with short texts, lists and numbers."""
    kinds = ["integer", "number", "text", "pattern", "enum", "const", "boolean", "null", "nullable"]
    if level < MAX_LEVELS:
        kinds += ["object", "object", "object", "array", "tuple", "any_of", "ref"]
    return globals()[f"_{draw.choice(kinds) if level else draw.choice(['object', 'object', 'array', 'any_of'])}"](
        draw, level + 1
    )


def _integer(draw: random.Random, _: int) -> dict[str, Any]:
    low = draw.randint(-50, 50)
    return {"type": "integer", "minimum": low, "maximum": low + draw.choice((0, 3, 1000))}


def _number(draw: random.Random, _: int) -> dict[str, Any]:
    return {"type": "number", "minimum": 0, "exclusiveMaximum": draw.choice((1, 10))}


def _text(draw: random.Random, _: int) -> dict[str, Any]:
    least = draw.randint(0, 3)
    return {"type": "string", "minLength": least, "maxLength": least + draw.randint(0, 6)}


def _pattern(draw: random.Random, _: int) -> dict[str, Any]:
    return {
        "type": "string",
        "pattern": draw.choice((r"^[a-f]{2,4}$", r"^(yes|no)!?$", r"^\d{2}-\d{2}$", r"^[^x]{3}$")),
    }


def _enum(draw: random.Random, _: int) -> dict[str, Any]:
    return {"enum": draw.sample([*_TEXTS, 1, -2.5, True, None, [1], {"k": "v"}], draw.randint(1, 4))}


def _const(draw: random.Random, _: int) -> dict[str, Any]:
    return {"const": draw.choice([*_TEXTS, 7, False])}


def _boolean(*_: Any) -> dict[str, Any]:
    return {"type": "boolean"}


def _null(*_: Any) -> dict[str, Any]:
    return {"type": "null"}


def _nullable(*_: Any) -> dict[str, Any]:
    return {"type": ["null", "boolean"]}


def _object(draw: random.Random, level: int) -> dict[str, Any]:
    names = draw.sample(_NAMES, draw.randint(0, 3))
    needed = [name for name in names if draw.random() < 0.7]
    properties = {name: random_schema(draw, level) for name in names}
    return {"type": "object", "properties": properties, "required": needed, "additionalProperties": False}


def _array(draw: random.Random, level: int) -> dict[str, Any]:
    least = draw.randint(0, 2)
    return {
        "type": "array",
        "items": random_schema(draw, level),
        "minItems": least,
        "maxItems": least + draw.randint(0, 2),
    }


def _tuple(draw: random.Random, level: int) -> dict[str, Any]:
    parts = [random_schema(draw, level) for _ in range(draw.randint(1, 2))]
    return {"type": "array", "prefixItems": parts, "items": False, "minItems": len(parts)}


def _any_of(draw: random.Random, level: int) -> dict[str, Any]:
    return {"anyOf": [random_schema(draw, level) for _ in range(2)]}


def _ref(draw: random.Random, level: int) -> dict[str, Any]:
    return {"allOf": [random_schema(draw, MAX_LEVELS)], "description": f"level {level}"}
