"""The grammar of an output that calls tools, in llguidance's Lark: for `tool_choice` and `strict`.

Exists for the formats of `call_forms`. What it accepts, the parser of the same format reads as calls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .call_forms import SpecialId, Words, form_of
from .parsers import Parsers

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
    word = Words(special_id)
    form = form_of(parsers.tools, functions, word, parallel)
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
    return "\n".join([*lines, *form.rules, *thoughts, _TEXT, _SPACES]) + "\n"


def free_grammar_of(
    tools: Sequence[Mapping[str, Any]],
    strict: frozenset[str],
    parsers: Parsers,
    special_id: SpecialId,
    *,
    is_thinking: bool = False,
) -> str | None:
    """Lark of an output of any text whose calls have valid arguments; None: the format has no such grammar.

    `strict`: names of the tools whose schemas hold; the arguments of the others are any objects. Also None: the format
    cannot hold one of these schemas whole, or begins calls in several ways.
    """
    functions = [
        tool["function"] if tool["function"]["name"] in strict else {**tool["function"], "parameters": {}}
        for tool in tools
    ]
    word = Words(special_id)
    form = form_of(parsers.tools, functions, word, True)
    if form is None or not (form.opener and form.is_only_opener and form.is_exact):
        return None
    thoughts = _thoughts(parsers, word, True) if is_thinking else []
    lines = [
        "%llguidance {}",
        f"start: {'thoughts ' if thoughts else ''}(before rest)* after",
        *word.text_until("before", form.opener),
        f"rest: {form.rest}",
        "after: TEXT",
    ]
    return "\n".join([*lines, *form.rules, *thoughts, _TEXT, _SPACES]) + "\n"


def _thoughts(parsers: Parsers, word: Words, is_thinking: bool) -> list[str]:
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
