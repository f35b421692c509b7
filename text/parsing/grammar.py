"""The grammar of an output that must call a tool, in llguidance's Lark: for `tool_choice` required or named.

Exists for formats whose arguments are JSON. What it accepts, the parser of the same format reads as calls.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .parsers import Parsers

SpecialId = Callable[[str], int | None]  # id of the special token with this text; None: it is none

_TEXT = r"TEXT: /(.|\n)*/"
_SPACES = r"SPACES: /[ \n]{0,4}/"


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
    make = _CALLS.get(parsers.tools)
    if make is None or not functions:
        return None
    word = _Words(special_id)
    call, separator, end = make(functions, word)
    calls = f"call{f' ({separator} call)*' if parallel and separator is not None else ''}{end}"
    thoughts = _thoughts(parsers, word, is_thinking)
    lines = [
        "%llguidance {}",
        f"start: {'thoughts ' if is_thinking else 'thoughts? ' if thoughts else ''}{calls}",
        call,
    ]
    return "\n".join([*lines, *thoughts, _TEXT, _SPACES]) + "\n"


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


# Rules of one call, text between two calls (None: there is only one), and text behind the last one.
_Rules = tuple[str, str | None, str]


def _hermes(functions: Sequence[Mapping[str, Any]], word: _Words) -> _Rules:
    value = _object(functions, "arguments")
    return f"call: {word('<tool_call>', chr(10))} %json {value} {word(chr(10), '</tool_call>')}", '"\\n"', ""


def _llama(functions: Sequence[Mapping[str, Any]], word: _Words) -> _Rules:
    return f"call: %json {_object(functions, 'parameters')}", None, ""


def _mistral(functions: Sequence[Mapping[str, Any]], word: _Words) -> _Rules:
    if not word.is_special("[ARGS]"):  # V3: one list of all calls
        listed = {"type": "array", "minItems": 1, "items": json.loads(_object(functions, "arguments"))}
        return f"call: {word('[TOOL_CALLS]', ' ')} %json {json.dumps(listed)}", None, ""
    each = [f"{word('[TOOL_CALLS]', one['name'], '[ARGS]')} %json {_schema(one)}" for one in functions]
    return f"call: {' | '.join(each)}", "", ""


def _harmony(functions: Sequence[Mapping[str, Any]], word: _Words) -> _Rules:
    header = word("<|channel|>", "commentary ", "<|constrain|>", "json", "<|message|>")
    each = [f"{json.dumps(' to=functions.' + one['name'])} {header} %json {_schema(one)}" for one in functions]
    return f"call: {' | '.join(f'({one})' for one in each)}", None, ""


_CALLS: Mapping[str, Callable[[Sequence[Mapping[str, Any]], _Words], _Rules]] = {
    "hermes": _hermes,
    "llama3_json": _llama,
    "mistral": _mistral,
    "harmony": _harmony,
}


def _schema(function: Mapping[str, Any]) -> str:
    """The schema of a function's arguments: an object, whatever the client wrote."""
    return json.dumps({"type": "object", **(function.get("parameters") or {})})


def _object(functions: Sequence[Mapping[str, Any]], arguments: str) -> str:
    """The schema of a call that is written as one JSON object."""
    each = [
        {
            "type": "object",
            "properties": {"name": {"const": one["name"]}, arguments: json.loads(_schema(one))},
            "required": ["name", arguments],
            "additionalProperties": False,
        }
        for one in functions
    ]
    return json.dumps(each[0] if len(each) == 1 else {"anyOf": each})
