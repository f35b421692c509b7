"""How formats write calls, as parts of Lark rules: for the grammars that enforce them. Knows no request.

Some formats write arguments as one JSON object, others every argument apart, in which strings stand without quotes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ..grammar_program import JSON_OPTIONS
from ..schemas import keepable

SpecialId = Callable[[str], int | None]  # id of the special token with this text; None: it is none
Function = Mapping[str, Any]  # of a checked tool in OpenAI's format

_DEFINITIONS = ("$defs", "definitions")
_WORDS_OF_TEXT = frozenset(("type", "title", "description", "default", "examples", "enum", "const"))


class Form(NamedTuple):
    """How a format writes calls."""

    opener: str  # word that begins a call; empty: none tells a call from text
    rest: str  # of a call, behind the opener
    separator: str | None  # between two calls; None: there is only one
    rules: tuple[str, ...] = ()  # further ones, which `rest` names
    is_only_opener: bool = True  # nothing else begins a call for the parser
    is_exact: bool = True  # the arguments conform to their schemas; else strings are any strings


class Words:
    """Words of a grammar: special tokens by their ids, others as text."""

    def __init__(self, special_id: SpecialId) -> None:
        self._special_id = special_id

    def is_special(self, text: str) -> bool:
        """Whether the model has a special token with this text."""
        return self._special_id(text) is not None

    def __call__(self, *texts: str) -> str:
        """The texts one after another, as a part of a rule."""
        ids = ((text, self._special_id(text)) for text in texts)
        return " ".join(json.dumps(text) if id_ is None else f"<[{id_}]>" for text, id_ in ids if text)

    def text_until(self, rule: str, end: str) -> list[str]:
        """Rules for free text up to and with a word."""
        if self.is_special(end):
            return [f"{rule}: TEXT {self(end)}"]
        return [f"{rule}[lazy]: TEXT {self(end)}"]


def form_of(format_name: str, functions: Sequence[Function], word: Words, parallel: bool) -> Form | None:
    """The form of a parser's format; None: it has no grammar for these functions."""
    make = _FORMS.get(format_name)
    return make(functions, word, parallel) if make is not None and functions else None


# ------------------------------------------------------------------ arguments as one JSON object


def _hermes(functions: Sequence[Function], word: Words, parallel: bool) -> Form:
    body = _any_of(_object(one, "arguments") for one in functions)
    return Form("<tool_call>", f'"\\n" ({body}) {word(chr(10), "</tool_call>")}', '"\\n"')


def _llama(functions: Sequence[Function], word: Words, parallel: bool) -> Form:
    return Form("", _any_of(_object(one, "parameters") for one in functions), None)


def _mistral(functions: Sequence[Function], word: Words, parallel: bool) -> Form:
    if word.is_special("[ARGS]"):
        each = (f"{word(one['name'], '[ARGS]')} %json {_schema(one)}" for one in functions)
        return Form("[TOOL_CALLS]", _any_of(each), "")
    item = _any_of(_object(one, "arguments") for one in functions)  # V3: one list of all calls
    more = f' (", " ({item}))*' if parallel else ""
    return Form("[TOOL_CALLS]", f'" [" ({item}){more} "]"', None)


def _harmony(functions: Sequence[Function], word: Words, parallel: bool) -> Form:
    header = word("<|channel|>", "commentary ", "<|constrain|>", "json", "<|message|>")
    each = (f"{json.dumps(' to=functions.' + one['name'])} {header} %json {_schema(one)}" for one in functions)
    return Form("", _any_of(each), None)


def _kimi(functions: Sequence[Function], word: Words, parallel: bool) -> Form:
    end = word("<|tool_call_end|>")
    each = (
        f"{word('<|tool_call_begin|>', 'functions.' + one['name'] + ':')} INDEX "
        f"{word('<|tool_call_argument_begin|>')} %json {_schema(one)} {end}"
        for one in functions
    )
    rest = f"({_any_of(each)}){'+' if parallel else ''} {word('<|tool_calls_section_end|>')}"
    return Form("<|tool_calls_section_begin|>", rest, None, ("INDEX: /[0-9]{1,3}/",))


def _deepseek(functions: Sequence[Function], word: Words, parallel: bool) -> Form | None:
    if word.is_special("｜DSML｜"):
        return None  # V3.2 and later have the older tokens, too, and write calls in another way
    begin, separator, end = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
    each = (
        f"{word(begin)} ({word('function', separator, one['name'])} {word(chr(10) + '```json' + chr(10))} "  # V3
        f"%json {_schema(one)} {word(chr(10) + '```', end)} | "
        f"{word(one['name'], separator)} %json {_schema(one)} {word(end)})"  # V3.1
        for one in functions
    )
    call = _any_of(each)
    more = f' ("\\n"? ({call}))*' if parallel else ""
    return Form("<｜tool▁calls▁begin｜>", f"({call}){more} {word('<｜tool▁calls▁end｜>')}", None)


def _any_of(rules: Iterable[str]) -> str:
    return " | ".join(f"({rule})" for rule in rules)


def _schema(function: Function) -> str:
    """The schema of a function's arguments: an object, whatever the client wrote; an empty one without parameters.

    It stands alone, because its references count from its own root.
    """
    return json.dumps({**keepable(_given(function)), "type": "object", "x-guidance": JSON_OPTIONS})


def _given(function: Function) -> Mapping[str, Any]:
    given: Mapping[str, Any] | None = function.get("parameters")
    return {"properties": {}, "additionalProperties": False} if given is None else given


def _object(function: Function, arguments: str) -> str:
    """A call that is written as one JSON object, in the form that chat templates print."""
    begin = f'{{"name": {json.dumps(function["name"])}, {json.dumps(arguments)}: '
    return f'{json.dumps(begin)} %json {_schema(function)} "}}"'


# ------------------------------------------------------------------ every argument apart


class _Tagged(NamedTuple):
    """A format that writes each argument between tags."""

    opener: str
    tail: str  # rule of what ends a call
    begin: Callable[[str], str]  # an argument by its name, up to its value
    end: str  # of a value
    any_begin: str  # rule of an argument whose name is not known


def _qwen_xml(functions: Sequence[Function], word: Words, parallel: bool) -> Form | None:
    end = "\n</parameter>\n"
    tail, any_begin = word("</function>\n", "</tool_call>"), f'"<parameter=" KEY {word(">" + chr(10))}'
    tags = _Tagged("<tool_call>", tail, lambda key: word(f"<parameter={key}>\n"), end, any_begin)
    heads = ("\n<function=" + one["name"] + ">\n" for one in functions)
    return _tagged(functions, word, tags, heads)._replace(is_only_opener=False)


def _glm(functions: Sequence[Function], word: Words, parallel: bool) -> Form | None:
    def begin(key: str) -> str:
        return f'"\\n"? {word("<arg_key>", key, "</arg_key>")} "\\n"? {word("<arg_value>")}'

    any_begin = f'"\\n"? {word("<arg_key>")} KEY {word("</arg_key>")} "\\n"? {word("<arg_value>")}'
    tags = _Tagged("<tool_call>", f'"\\n"? {word("</tool_call>")}', begin, "</arg_value>", any_begin)
    return _tagged(functions, word, tags, (one["name"] for one in functions))


def _tagged(functions: Sequence[Function], word: Words, tags: _Tagged, heads: Iterable[str]) -> Form:
    rules = [*word.text_until("raw", tags.end), r"KEY: /[A-Za-z_][A-Za-z0-9_.-]{0,63}/"]
    bodies, is_exact = [], True
    for function, head in zip(functions, heads, strict=True):
        members, exact = _members(_given(function), word, tags)
        bodies.append(f"{word(head)} {members}")
        is_exact &= exact
    return Form(tags.opener, f"({_any_of(bodies)}) {tags.tail}", '"\\n"?', tuple(rules), is_exact=is_exact)


def _members(schema: Mapping[str, Any], word: Words, tags: _Tagged) -> tuple[str, bool]:
    """Arguments in the order of their schema, those that are not required may be left out; and whether all is said."""
    properties = schema.get("properties")
    if not isinstance(properties, Mapping) or not all(isinstance(key, str) for key in properties):
        return f"({tags.any_begin} raw)*", schema.keys() <= {"type", "title", "description", "additionalProperties"}
    needed = schema.get("required")
    required = frozenset(key for key in needed if isinstance(key, str)) if isinstance(needed, list) else frozenset()
    said = {"type", "title", "description", "additionalProperties", "properties", "required", *_DEFINITIONS}
    is_exact = required <= properties.keys() and schema.keys() <= {*said, "$schema", "x-guidance"}
    parts = []
    for key, given in properties.items():
        value, exact = _value(given, schema, word, tags.end)
        member = f"{tags.begin(key)} {value}"
        parts.append(f"({member})" if key in required else f"({member})?")
        is_exact &= exact
    return " ".join(parts), is_exact


def _value(given: Any, root: Mapping[str, Any], word: Words, end: str) -> tuple[str, bool]:
    """A value with its end, and whether no other value could stand there. Strings stand as they are, others as JSON."""
    schema = given if isinstance(given, Mapping) else {}
    kinds = _strings_of(schema)
    if kinds is not None:
        return f"({_any_of(word(text) for text in kinds)}) {word(end)}", True
    if schema.get("type") in ("integer", "number", "boolean", "null", "array", "object"):
        whole = {**keepable(schema), **{name: keepable(root[name]) for name in _DEFINITIONS if name in root}}
        return f"%json {json.dumps({**whole, 'x-guidance': JSON_OPTIONS})} {word(end)}", True
    return "raw", schema.get("type") == "string" and schema.keys() <= _WORDS_OF_TEXT


def _strings_of(schema: Mapping[str, Any]) -> list[str] | None:
    """The strings that a schema lists; None: it lists none, or also something else."""
    listed = [schema["const"]] if "const" in schema else schema.get("enum")
    if schema.get("type", "string") != "string" or not isinstance(listed, list) or not listed:
        return None
    return listed if all(isinstance(one, str) and one for one in listed) else None


_FORMS: Mapping[str, Callable[[Sequence[Function], Words, bool], Form | None]] = {
    "hermes": _hermes,
    "llama3_json": _llama,
    "mistral": _mistral,
    "harmony": _harmony,
    "kimi_k2": _kimi,
    "deepseek": _deepseek,
    "qwen3_xml": _qwen_xml,
    "glm": _glm,
}
