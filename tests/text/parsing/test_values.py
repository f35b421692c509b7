"""Values of arguments: Python's notation, and texts by the types of a tool's schema."""

from __future__ import annotations

import json
from typing import Any

import pytest

from twostroke.text.parsing.parser import parse
from twostroke.text.parsing.parsers import Parsers
from twostroke.text.parsing.values import Tools, typed

F = Tools([{"type": "function", "function": {"name": "f"}}])


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("[1, 2, ]", [1, 2]),
        ("(1,)", [1]),
        ("{'a': 1,}", {"a": 1}),
        ("[[1,],]", [[1]]),
        ("1e5", 1e5),
        ("1E5", 1e5),
        ("-2.5E-3", -0.0025),
        ("2E+3", 2000.0),
        ("1_000", 1000),
        (".5", 0.5),
        ("007", 7.0),
        ("True", True),
        (r"'\x41\u00e9\n\q'", "Aé\n\\q"),
        ('"it\'s"', "it's"),
    ],
)
def test_values_in_pythons_notation(written: str, value: Any):
    events = parse([f"[f(a={written})]"], Parsers("llama4_pythonic", "none"), tools=F)
    (call,) = [event.call for event in events if event.call is not None]
    assert json.loads(call.arguments) == {"a": value}


@pytest.mark.parametrize(
    ("text", "types", "written"),
    [
        ("3", {"string"}, '"3"'),
        ("3", {"integer", "string"}, "3"),
        ("3.0", {"integer", "string"}, "3.0"),
        ("3.5", {"integer", "string"}, '"3.5"'),
        ("3", {"number", "string"}, "3"),
        ("true", {"string", "null"}, '"true"'),
        ("None", {"string", "null"}, "null"),
        (" True ", {"boolean"}, "true"),
        ("[1]", {"array", "string"}, "[1]"),
        ("[1", {"array"}, '"[1"'),
    ],
)
def test_a_text_becomes_what_the_schema_allows(text: str, types: set[str], written: str):
    assert typed(text, frozenset(types)) == written
