"""The grammar of an output that calls tools, in llguidance's Lark: for `tool_choice` and `strict`.

Exists for formats whose arguments are JSON. What it accepts, the parser of the same format reads as calls.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ..grammar_program import JSON_OPTIONS
from ..schemas import keepable
from .parsers import Parsers

SpecialId = Callable[[str], int | None]  # id of the special token with this text; None: it is none

_TEXT = r"TEXT: /(.|\n)*/"
_SPACES = r"SPACES: /[ \n]{0,4}/"


class _Form(NamedTuple):
    """How a format writes calls, as parts of Lark rules."""

    opener: str  # word that begins a call; empty: none tells a call from text
    rest: str  # of a call, behind the opener
    separator: str | None  # between two calls; None: there is only one


def grammar_of(
    tools: Sequence[Mapping[str, Any]],
    name: str | None,
    parsers: Parsers,
    special_id: SpecialId,
    *,
    parallel: bool = True,
    is_thinking: bool = False,
) -> str | None:
    """Lark of an output that is reasoning, then one call or more; None: the format has no such grammar.

    `tools`: checked, in OpenAI's format. `name`: the only tool that may be called; None: any. `is_thinking`: the prompt
    has begun the reasoning.
    """
    functions = [tool["function"] for tool in tools if name in (None, tool["function"]["name"])]
    word = _Words(special_id)
    form = _form(functions, parsers, word, parallel)
    if form is None:
        return None
    more = f" ({form.separator} call)*" if parallel and form.separator is not None else ""
    thoughts = _thoughts(parsers, word, is_thinking)
    lines = [
        "%llguidance {}",
        f"start: {'thoughts ' if is_thinking else 'thoughts? ' if thoughts else ''}call{more}",
        f"call: {word(form.opener)} rest",
        f"rest: {form.rest}",
    ]
    return "\n".join([*lines, *thoughts, _TEXT, _SPACES]) + "\n"


def free_grammar_of(
    tools: Sequence[Mapping[str, Any]],
    strict: frozenset[str],
    parsers: Parsers,
    special_id: SpecialId,
    *,
    is_thinking: bool = False,
) -> str | None:
    """Lark of an output of any text whose calls have valid arguments; None: the format has no such grammar.

    `strict`: names of the tools whose schemas hold; the arguments of the others are any objects.
    """
    functions = [
        tool["function"] if tool["function"]["name"] in strict else {**tool["function"], "parameters": {}}
        for tool in tools
    ]
    word = _Words(special_id)
    form = _form(functions, parsers, word, True)
    if form is None or not form.opener:
        return None
    thoughts = _thoughts(parsers, word, True) if is_thinking else []
    lines = [
        "%llguidance {}",
        f"start: {'thoughts ' if thoughts else ''}(before rest)* after",
        *word.text_until("before", form.opener),
        f"rest: {form.rest}",
        "after: TEXT",
    ]
    return "\n".join([*lines, *thoughts, _TEXT, _SPACES]) + "\n"


def _form(functions: Sequence[Mapping[str, Any]], parsers: Parsers, word: _Words, parallel: bool) -> _Form | None:
    make = _FORMS.get(parsers.tools)
    return make(functions, word, parallel) if make is not None and functions else None


class _Words:
    """Words of a grammar: special tokens by their ids, others as text."""

    def __init__(self, special_id: SpecialId) -> None:
        self._special_id = special_id

    def is_special(self, text: str) -> bool:
        return self._special_id(text) is not None

    def __call__(self, *texts: str) -> str:
        ids = ((text, self._special_id(text)) for text in texts)
        return " ".join(json.dumps(text) if id_ is None else f"<[{id_}]>" for text, id_ in ids if text)

    def text_until(self, rule: str, end: str) -> list[str]:
        """Rules for free text up to and with a word."""
        if self.is_special(end):
            return [f"{rule}: TEXT {self(end)}"]
        return [f"{rule}[lazy]: TEXT {self(end)}"]


def _thoughts(parsers: Parsers, word: _Words, is_thinking: bool) -> list[str]:
    """Rules of the reasoning before the calls; none if the model has no reasoning."""
    if parsers.reasoning == "think":
        begin = "" if is_thinking else f"{word('<think>')} "
        return [f"thoughts: {begin}thought SPACES", *word.text_until("thought", "</think>")]
    if parsers.reasoning == "mistral":
        begin = "" if is_thinking else f"{word('[THINK]')} "
        return [f"thoughts: {begin}thought", *word.text_until("thought", "[/THINK]")]
    if parsers.reasoning == "harmony":
        begin = word("<|channel|>", "analysis", "<|message|>")
        return [f"thoughts: {begin} thought {word('<|start|>', 'assistant')}", *word.text_until("thought", "<|end|>")]
    return []


def _hermes(functions: Sequence[Mapping[str, Any]], word: _Words, parallel: bool) -> _Form:
    body = _any_of(_object(one, "arguments") for one in functions)
    return _Form("<tool_call>", f'"\\n" ({body}) {word(chr(10), "</tool_call>")}', '"\\n"')


def _llama(functions: Sequence[Mapping[str, Any]], word: _Words, parallel: bool) -> _Form:
    return _Form("", _any_of(_object(one, "parameters") for one in functions), None)


def _mistral(functions: Sequence[Mapping[str, Any]], word: _Words, parallel: bool) -> _Form:
    if word.is_special("[ARGS]"):
        each = (f"{word(one['name'], '[ARGS]')} %json {_schema(one)}" for one in functions)
        return _Form("[TOOL_CALLS]", _any_of(each), "")
    item = _any_of(_object(one, "arguments") for one in functions)  # V3: one list of all calls
    more = f' (", " ({item}))*' if parallel else ""
    return _Form("[TOOL_CALLS]", f'" [" ({item}){more} "]"', None)


def _harmony(functions: Sequence[Mapping[str, Any]], word: _Words, parallel: bool) -> _Form:
    header = word("<|channel|>", "commentary ", "<|constrain|>", "json", "<|message|>")
    each = (f"{json.dumps(' to=functions.' + one['name'])} {header} %json {_schema(one)}" for one in functions)
    return _Form("", _any_of(each), None)


_FORMS: Mapping[str, Callable[[Sequence[Mapping[str, Any]], _Words, bool], _Form]] = {
    "hermes": _hermes,
    "llama3_json": _llama,
    "mistral": _mistral,
    "harmony": _harmony,
}


def _any_of(rules: Iterable[str]) -> str:
    return " | ".join(f"({rule})" for rule in rules)


def _schema(function: Mapping[str, Any]) -> str:
    """The schema of a function's arguments: an object, whatever the client wrote; an empty one without parameters.

    It stands alone, because its references count from its own root.
    """
    given = function.get("parameters")
    schema = {"properties": {}, "additionalProperties": False} if given is None else given
    return json.dumps({**keepable(schema), "type": "object", "x-guidance": JSON_OPTIONS})


def _object(function: Mapping[str, Any], arguments: str) -> str:
    """A call that is written as one JSON object, in the form that chat templates print."""
    begin = f'{{"name": {json.dumps(function["name"])}, {json.dumps(arguments)}: '
    return f'{json.dumps(begin)} %json {_schema(function)} "}}"'
