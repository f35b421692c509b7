"""Schemas as clients' libraries write them: said otherwise they allow the same values, and errors name the place."""

import datetime
import ipaddress
import json
import uuid
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import jsonschema
import pydantic
import pytest
from llguidance import LLMatcher

from twostroke.core.errors import InvalidRequest
from twostroke.core.request import Grammar
from twostroke.text.grammar import GrammarCompiler
from twostroke.text.grammar_program import grammar_of
from twostroke.text.schemas import FORMATS, keepable, told
from twostroke.text.tokenizer import Tokenizer

BUNDLED = Path(__file__).resolve().parents[2] / "model" / "bundled"
DECIMAL = r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$"
OBJECT = {"type": "object"}
SAID_OTHERWISE: list[tuple[dict[str, Any], str]] = [
    ({"type": "string", "format": "binary"}, "format"),
    ({**OBJECT, "propertyNames": {"type": "string"}, "additionalProperties": {"type": "integer"}}, "propertyNames"),
    ({**OBJECT, "propertyNames": True}, "propertyNames"),
    ({**OBJECT, "propertyNames": {"enum": ["a", "b"]}, "additionalProperties": {"type": "integer"}}, "propertyNames"),
    ({**OBJECT, "propertyNames": {"const": "a"}}, "propertyNames"),
    ({**OBJECT, "propertyNames": {"pattern": "^a"}, "additionalProperties": {"type": "integer"}}, "propertyNames"),
    ({**OBJECT, "properties": {"a": {"items": {"type": "string", "format": "path"}}}}, "format"),
    ({"anyOf": [{"type": "number"}, {"type": "string", "pattern": DECIMAL}]}, "?!"),
]
LEFT_ALONE: list[dict[str, Any]] = [
    {"type": "string", "format": "date"},
    {**OBJECT, "propertyNames": {"pattern": "^a"}, "properties": {"b": {}}},
    {**OBJECT, "propertyNames": {"minLength": 3}},
    {**OBJECT, "propertyNames": False},
    {"enum": [{"format": "binary"}], "default": {"format": "path"}},
    {**OBJECT, "properties": {"format": {"type": "string"}, "propertyNames": {"type": "integer"}}},
]
NAMES = ("a", "ab", "b", "c", "format")
DECIMALS = ("", "-", ".", "+.", "0", "-0", "1.", ".5", "+00.50", "1.2.3", "1e5", "x", "--1")
VALUES: list[Any] = [7, 1.5, None, *DECIMALS, {}, [], {"format": "binary"}]
VALUES += [{name: value} for name in NAMES for value in (1, "x", [1], ["x"])]


@pytest.mark.parametrize(("schema", "word"), SAID_OTHERWISE)
def test_the_same_values_are_valid(schema, word):
    other = keepable(schema)
    assert word in json.dumps(schema)
    assert word not in json.dumps(other)
    for value in VALUES:
        before, after = (jsonschema.Draft202012Validator(one).is_valid(value) for one in (schema, other))
        assert before == after, value


@pytest.mark.parametrize("schema", LEFT_ALONE)
def test_what_cannot_be_said_otherwise_stays(schema):
    assert keepable(schema) == schema


def test_the_formats_are_those_of_the_compiler():
    names = FORMATS | {"binary", "path", "password", "iri", "regex", "byte", "int32", "idn-email", "json-pointer"}
    for name in names:
        error = LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema({"type": "string", "format": name}))
        assert (not error) == (name in FORMATS), name


class Everything(pydantic.BaseModel):
    """Types that pydantic writes with formats, patterns and names."""

    price: Decimal
    counts: dict[Literal["x", "y"], int]
    raw: bytes
    file: Path
    took: datetime.timedelta
    seen: datetime.datetime
    address: ipaddress.IPv4Address
    id: uuid.UUID | None
    pair: tuple[int, str]
    secret: pydantic.SecretStr
    inner: pydantic.Json
    url: pydantic.AnyUrl


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    tokenizer = Tokenizer.load(BUNDLED)
    return GrammarCompiler(tokenizer, tokenizer.vocab_size, tokenizer.eos_ids or (0,))


@pytest.mark.parametrize("mode", ["validation", "serialization"])
def test_schemas_of_pydantic_are_kept(compiler, mode):
    compiler.check(grammar_of({"json": Everything.model_json_schema(mode=mode)}))
    compiler.check(grammar_of({"json": {"type": "string", "pattern": DECIMAL}}))


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"properties": {"a": {"items": {"uniqueItems": True}}}}, "properties.a.items: uniqueItems cannot be kept"),
        ({"anyOf": [{}, {**OBJECT, "minProperties": 2, "dependentRequired": {}}]}, r"anyOf\[1\]: \w+ cannot be kept"),
        (
            {"$defs": {"X": {"type": "string", "pattern": "(?=a)b"}}, "$ref": "#/$defs/X"},
            r"\$defs.X: the pattern cannot",
        ),
        ({"uniqueItems": True}, "the schema: uniqueItems cannot be kept"),
    ],
)
def test_an_error_names_the_place(compiler, schema, words):
    with pytest.raises(InvalidRequest, match=f"json is refused: {words}"):
        compiler.check(Grammar("json", json.dumps(schema)))


def test_an_error_about_something_else_has_no_place():
    assert told({"uniqueItems": True}, "schema is too large") is None
    assert told({"pattern": "a"}, "regex parse error: ( error: unclosed group") is None
