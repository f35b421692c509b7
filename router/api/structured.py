"""Fields of a body that ask for structured output, reduced to one rule, which text/grammar_program.py reads.

Served: OpenAI's `response_format`, vLLM's `structured_outputs` and its older `guided_*`, and `structural_tag`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ...core.errors import InvalidRequest, UnsupportedParameter
from ...text.grammar_program import PARAM, any_object
from ...text.schemas import told
from .call import GenerateCall
from .checks import short

# Field to the kind of its rule.
SPELLINGS: Mapping[str, str] = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "structural_tag": "structural_tag",
}
# Options beside the rule of `structured_outputs`, without effect on which texts are allowed.
_HINTS = (
    "disable_fallback",
    "disable_any_whitespace",
    "disable_additional_properties",
    "whitespace_pattern",
    "_backend",
)
_SCHEMA_FIELDS = ("name", "schema", "strict", "description")


class Rule(NamedTuple):
    """The rule of a body, `{kind: rule}`, and the field that gave it."""

    field: str
    said: Mapping[str, Any]


def rule_of(fields: Mapping[str, Any]) -> Rule | None:
    """The rule of a body's fields, of which those not given are None; None: any text.

    Raises:
        InvalidRequest: a field has a wrong form, or several give a rule; names it.
        UnsupportedParameter: a type of `response_format` that is not served.
    """
    found = [Rule(name, {kind: fields[name]}) for name, kind in SPELLINGS.items() if _says(fields.get(name))]
    if _says(fields.get(PARAM)):
        said = fields[PARAM]
        rule = {key: value for key, value in said.items() if key not in _HINTS and value not in (None, False)}
        if rule.get("json_object") is True:
            rule = {**{key: value for key, value in rule.items() if key != "json_object"}, "json": any_object().source}
        if rule:
            found.append(Rule(PARAM, rule))
    formatted = _formatted(fields.get("response_format"))
    if formatted is not None:
        found.append(Rule("response_format", formatted))
    if len(found) > 1:
        raise InvalidRequest(f"{found[0].field} and {found[1].field} both give a rule; give one", param=found[1].field)
    return found[0] if found else None


def field_of_rule(call: GenerateCall) -> str:
    """The field of the client that gave the rule of a call: the one that says so, or the tools of its choice."""
    return call.rule_field if call.sampling.get(PARAM) is not None else "tools"


def named(error: InvalidRequest, field: str, tools: Any = None) -> InvalidRequest:
    """An error about the rule, under the name of the field that gave it. `tools`: those of a rule that calls made."""
    if error.param != PARAM or field == PARAM:
        return error
    message = error.message
    if field == "tools":
        where = _tool_at_fault(tools, message)
        message = f"{field}{where}; leave it out, or give tool_choice auto" if where else _first_words(message)
    return InvalidRequest(message.replace(f"{PARAM}:", f"{field}:", 1), param=field)


def _tool_at_fault(tools: Any, message: str) -> str | None:
    """Place and reason within the tools, for the rule that a compiler refused; None: nothing was recognised."""
    for place, tool in enumerate(tools or ()):
        about = told(tool["function"].get("parameters"), message)
        if about is not None:
            return f"[{place}].function.parameters.{about}"
    return None


def _first_words(message: str) -> str:
    """The message without the text of the grammar, which is ours and tells a client nothing."""
    return message.partition(" 2 | start:")[0]


def _says(value: Any) -> bool:
    return value is not None and value not in ("", [], {})


def _formatted(said: Any) -> Mapping[str, Any] | None:
    """The rule of OpenAI's `response_format`."""
    if not _says(said):
        return None
    kind = said.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"json": said.get("schema") or any_object().source}
    if kind == "structural_tag":
        return {"structural_tag": said}
    if kind != "json_schema":
        raise UnsupportedParameter(
            f"response_format.type is {short(kind)}; served: text, json_object, json_schema, structural_tag",
            param="response_format",
        )
    given = said.get("json_schema")
    if not isinstance(given, Mapping):
        raise InvalidRequest(
            f"response_format.json_schema is {short(given)}; must be an object with name and schema",
            param="response_format",
        )
    for key in given:
        if key not in _SCHEMA_FIELDS:
            raise InvalidRequest(
                f"response_format.json_schema has the key {short(key)}; it has {', '.join(_SCHEMA_FIELDS)}",
                param="response_format",
            )
    schema = given.get("schema")
    return {"json": any_object().source if schema is None else schema}
