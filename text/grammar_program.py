"""Grammars as clients write them, translated to llguidance's form. Bounds of size and depth. Knows no tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import any_to_lark

from ..core.errors import InvalidRequest
from ..core.request import GRAMMAR_KINDS, Grammar
from ..core.sampling import MAX_GRAMMAR_CHARS
from .schemas import keepable

PARAM = "structured_outputs"
MAX_DEPTH = 48  # of lists and objects in a JSON schema
MAX_VALUES = 20_000  # lists, objects, texts and numbers in a JSON schema
MAX_CHOICES = 1024
MAX_CHOICE_CHARS = 4096  # of each
MAX_REGEX_CHARS = 16_384
MAX_TAGS = 64
MAX_INDENT = 32  # blanks at the beginning of a line of JSON
# Between two parts of a JSON text: one space, or a line break and an indentation. So blanks come to an end.
_BLANKS = rf"(\x20|\r?\n[\x20\x09]{{0,{MAX_INDENT}}})"
# A client's own options stand in its schema, under "x-guidance"; these come after them.
_JSON_OVERRIDES: Any = {"whitespace_pattern": _BLANKS, "whitespace_flexible": True, "lenient": False}
JSON_OPTIONS: Mapping[str, Any] = {"whitespace_pattern": _BLANKS, "lenient": False}  # of a schema within Lark
_ANY_OBJECT = '{"type":"object"}'


def refused(why: str) -> InvalidRequest:
    """The error of a grammar that is not taken."""
    return InvalidRequest(f"{PARAM}: {why}", param=PARAM)


def any_object() -> Grammar:
    """The grammar of OpenAI's `json_object`: any JSON object."""
    return Grammar("json", _ANY_OBJECT)


def grammar_of(said: Any) -> Grammar:
    """The grammar that a client's object describes: `{kind: rule}`. A rule is text, or values where it is JSON.

    The source of JSON kinds is written in one form, so that equal rules have one digest.

    Raises:
        InvalidRequest: no rule, several, one of an unknown kind, or one beyond a bound; names it.
    """
    if not isinstance(said, Mapping):
        raise refused(f"it is a {type(said).__name__}; give an object with one of {', '.join(GRAMMAR_KINDS)}")
    given = [(str(kind), rule) for kind, rule in said.items() if rule is not None]
    kinds = [kind for kind, _ in given]
    if len(given) != 1 or kinds[0] not in GRAMMAR_KINDS:
        shown = ", ".join(kind[:40] for kind in kinds[:8]) or "nothing"
        raise refused(f"it has {shown}; give exactly one of {', '.join(GRAMMAR_KINDS)}")
    kind, rule = given[0]
    if kind in ("regex", "grammar"):
        return Grammar(kind, _text(kind, rule))
    if isinstance(rule, str):
        rule = _parsed(kind, rule)
    _check_size(kind, rule)
    if kind == "choice":
        _check_choices(rule)
    elif not isinstance(rule, (dict, bool)) or (isinstance(rule, bool) and kind != "json"):
        raise refused(f"{kind} is a {type(rule).__name__}; give an object")
    try:
        source = json.dumps(rule, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise refused(f"{kind} is not JSON: {error}") from None
    return Grammar(kind, _text(kind, source))


def program_of(grammar: Grammar, is_special: Callable[[str], bool]) -> str:
    """Text of a grammar for llguidance. `is_special`: whether a text is one special token of the tokenizer.

    Raises:
        InvalidRequest: it cannot be translated.
    """
    kind, source = grammar
    try:
        if kind == "json":
            schema = json.loads(source)
            schema = {} if schema is True else keepable(schema)
            return str(LLMatcher.grammar_from_json_schema(schema, overrides=_JSON_OVERRIDES))
        if kind == "regex":
            return str(LLMatcher.grammar_from_regex(source))
        if kind == "choice":
            return str(LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, json.loads(source)))))
        if kind == "grammar":
            return str(LLMatcher.grammar_from_lark(any_to_lark(source)))
        return str(LLMatcher.grammar_from_lark(_tags(json.loads(source), is_special)))
    except InvalidRequest:
        raise
    except (ValueError, TypeError, RecursionError, AssertionError, IndexError, KeyError) as error:
        raise refused(f"{kind} cannot be read: {str(error)[:200]}") from None


# ---------------------------------------------------------------- bounds


def _text(kind: str, rule: Any) -> str:
    most = MAX_REGEX_CHARS if kind == "regex" else MAX_GRAMMAR_CHARS
    if not isinstance(rule, str) or not rule:
        raise refused(f"{kind} is a {type(rule).__name__}; give a text that is not empty")
    if len(rule) > most:
        raise refused(f"{kind} has {len(rule)} characters; at most {most} are taken")
    if "\0" in rule or any(0xD800 <= ord(letter) <= 0xDFFF for letter in rule):
        raise refused(f"{kind} holds a zero or a lone surrogate; send valid Unicode")
    return rule


def _parsed(kind: str, source: str) -> Any:
    try:
        return json.loads(_text(kind, source))
    except (ValueError, RecursionError) as error:
        raise refused(f"{kind} is not JSON: {str(error)[:120] or 'it is nested too deeply'}") from None


def _check_size(kind: str, rule: Any) -> None:
    layer, num_values = [rule], 1
    for _ in range(MAX_DEPTH + 1):
        layer = list(
            chain.from_iterable(
                one.values() if isinstance(one, Mapping) else one
                for one in layer
                if isinstance(one, (list, tuple, Mapping))
            )
        )
        num_values += len(layer)
        if num_values > MAX_VALUES:
            raise refused(f"{kind} has more than {MAX_VALUES} values; give a smaller one")
        if not layer:
            return
    raise refused(f"{kind} is nested more than {MAX_DEPTH} levels deep; give a flatter one, or use $defs and $ref")


def _check_choices(rule: Any) -> None:
    if not isinstance(rule, (list, tuple)) or not 1 <= len(rule) <= MAX_CHOICES:
        raise refused(f"choice must be a list of 1 to {MAX_CHOICES} texts")
    for place, text in enumerate(rule):
        if not isinstance(text, str) or not 1 <= len(text) <= MAX_CHOICE_CHARS:
            raise refused(f"choice[{place}] must be a text of 1 to {MAX_CHOICE_CHARS} characters")


# ---------------------------------------------------------------- structural tags


def _tags(rule: Mapping[str, Any], is_special: Callable[[str], bool]) -> str:
    """Lark of free text with tagged parts: after a trigger the text is `begin`, a value of `schema`, and `end`.

    The form is that of XGrammar's first structural tags, which vLLM's clients send: `structures` with begin, schema and
    end, and `triggers`, each the beginning of a `begin`.
    """
    structures, triggers = rule.get("structures"), rule.get("triggers")
    if not isinstance(structures, list) or not isinstance(triggers, list) or not structures or not triggers:
        raise refused("structural_tag needs structures and triggers, both lists that are not empty")
    if len(structures) > MAX_TAGS or len(triggers) > MAX_TAGS:
        raise refused(f"structural_tag has more than {MAX_TAGS} structures or triggers")
    lines = ["%llguidance {}", "start: (" + " | ".join(f"tag_{i}" for i in range(len(structures))) + ")* tag_end"]
    lines += ["tag_end: TAG_TEXT", r"TAG_TEXT: /(.|\n)*/"]
    for place, structure in enumerate(structures):
        begin, schema, end = _structure(place, structure)
        trigger = next((one for one in triggers if isinstance(one, str) and one and begin.startswith(one)), None)
        if trigger is None:
            raise refused(f"structures[{place}].begin is {begin[:40]!r}; it must begin with one of the triggers")
        rest = " ".join((*_quoted(begin[len(trigger) :]), f"%json {json.dumps(schema)}", *_quoted(end)))
        if is_special(trigger):
            lines.append(f"tag_{place}: TAG_TEXT {trigger} {rest}")
        else:
            lines.append(f"tag_{place}_trig[lazy]: TAG_TEXT {json.dumps(trigger)}")
            lines.append(f"tag_{place}: tag_{place}_trig {rest}")
    return "\n".join(lines) + "\n"


def _structure(place: int, structure: Any) -> tuple[str, Any, str]:
    where = f"structures[{place}]"
    if not isinstance(structure, Mapping):
        raise refused(f"{where} must be an object with begin, schema and end")
    begin, schema, end = structure.get("begin"), structure.get("schema", {}), structure.get("end", "")
    if not isinstance(begin, str) or not begin or not isinstance(end, str) or not isinstance(schema, Mapping):
        raise refused(f"{where} must have a text as begin, an object as schema and a text as end")
    return begin, {**keepable(schema), "x-guidance": JSON_OPTIONS}, end


def _quoted(text: str) -> tuple[str, ...]:
    return (json.dumps(text),) if text else ()
