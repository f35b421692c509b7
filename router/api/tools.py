"""Checks the tools that a chat offers and the choice among them, and makes the rule that enforces the choice.

Knows no format of calls and runs no tool.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ...core.errors import InvalidRequest, UnsupportedParameter
from ...core.sampling import SamplingOptions
from ...text.grammar_program import PARAM
from ...text.parsing.grammar import free_grammar_of, grammar_of
from ...text.parsing.parser import PROMPT_END_CHARS
from ...text.parsing.parsers import NONE, TOOL_PARSERS, begins_reasoning
from .call import GenerateCall
from .checks import deeper_than, short
from .ignored import Ignored
from .models import ServedModel

MAX_TOOLS = 128
MAX_DEPTH = 32  # of a tool's schema

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:/-]{0,127}")
_CHOICES = ("auto", "none", "required")
_OTHER_GRAMMARS = ("custom", "grammar", "web_search", "file_search", "code_interpreter", "computer_use", "mcp")


@dataclass(frozen=True, slots=True)
class Offered:
    """Checked tools of a chat."""

    tools: tuple[dict[str, Any], ...]
    parallel: bool  # more than one call per answer is given out
    must_call: bool = False
    only: str | None = None  # the only tool that may be called; None: any
    strict: frozenset[str] = frozenset()  # names of those whose calls must have valid arguments


def offered_tools(call: GenerateCall, model: ServedModel) -> Offered | None:
    """The tools that the model may call; None: it has none, or may call none (`tool_choice: none`).

    Raises:
        InvalidRequest: a tool or the choice has not the form of the API; `param` names the field.
        UnsupportedParameter: the model's template takes no tools, or its calls cannot be parsed.
    """
    tools = _tools(call.tools)
    names = {tool["function"]["name"] for tool in tools}
    if isinstance(call.tool_choice, Mapping) and call.tool_choice.get("type") == "allowed_tools":
        choice, allowed = _allowed(call.tool_choice, names)
        tools = tuple(tool for tool in tools if tool["function"]["name"] in allowed)
        only = None
    else:
        choice, only = _choice(call.tool_choice, names)
    if not tools or choice == "none":
        return None
    if model.template is not None and not model.template.asks_for("tools"):
        raise UnsupportedParameter(
            "tools: the model's chat template reads none; describe them in a message, or start the router with a "
            "--chat-template that reads them",
            param="tools",
        )
    if model.parsers.tools == NONE and not model.leaves_calls:
        raise UnsupportedParameter(
            "tools: no parser is known for the calls of this model's chat template; start the router with "
            f"--tool-parser, one of {', '.join(TOOL_PARSERS)}",
            param="tools",
        )
    return Offered(
        tools=tuple({"type": "function", "function": _printed(tool["function"])} for tool in tools),
        parallel=call.parallel_tool_calls is not False,
        must_call=choice != "auto",
        only=only,
        strict=frozenset(tool["function"]["name"] for tool in tools if tool["function"].get("strict")),
    )


def with_rule(
    call: GenerateCall, offered: Offered | None, prompt: str, model: ServedModel, ignored: Ignored
) -> GenerateCall:
    """The call with the grammar that its tools need; unchanged if they need none.

    Raises:
        InvalidRequest: another field gives a rule for the text, too.
        UnsupportedParameter: no grammar can enforce calls of the model's format.
    """
    if offered is None or not (offered.must_call or offered.strict):
        return call
    is_thinking = begins_reasoning(model.parsers, prompt[-PROMPT_END_CHARS:])
    if offered.must_call:
        if call.sampling.get(PARAM) is not None:
            raise InvalidRequest(
                f"{call.rule_field} gives a rule for the text, and tool_choice is {short(call.tool_choice)}, which "
                "allows calls only; leave one out",
                param=call.rule_field,
            )
        source = grammar_of(
            offered.tools,
            offered.only,
            model.parsers,
            model.special_id,
            parallel=offered.parallel and offered.only is None,  # a named function is called once
            is_thinking=is_thinking,
        )
        if source is None:
            raise UnsupportedParameter(
                f"tool_choice is {short(call.tool_choice)}; calls in the format of {model.name} "
                f"({model.parsers.tools}) cannot be enforced: give auto, and ask for the call in a message",
                param="tool_choice",
            )
    else:
        said = call.sampling
        is_free = said.get(PARAM) is None and not said.get("ignore_eos") and not said.get("min_tokens")
        source = None
        if is_free:
            source = free_grammar_of(
                offered.tools, offered.strict, model.parsers, model.special_id, is_thinking=is_thinking
            )
        if source is None:
            ignored.add("tools", "strict")
            return call
    sampling: SamplingOptions = {**call.sampling, "structured_outputs": {"grammar": source}}
    return replace(call, sampling=sampling, rule_field="tools")


def _printed(function: Mapping[str, Any]) -> dict[str, Any]:
    """A function as chat templates print it: what the client sent, without fields of no template."""
    return {key: value for key, value in function.items() if key != "strict"}


def _tools(given: Any) -> tuple[dict[str, Any], ...]:
    if given is None:
        return ()
    if not isinstance(given, (list, tuple)):
        raise InvalidRequest(f"tools is {short(given)}; must be a list of functions", param="tools")
    if len(given) > MAX_TOOLS:
        raise InvalidRequest(f"tools has {len(given)} entries; at most {MAX_TOOLS}", param="tools")
    tools = tuple(_tool(tool, f"tools[{place}]") for place, tool in enumerate(given))
    names: set[str] = set()
    for place, tool in enumerate(tools):
        name = tool["function"]["name"]
        if name in names:
            raise InvalidRequest(
                f"tools[{place}].function.name is {name!r}, as another tool's; name it otherwise",
                param=f"tools[{place}].function.name",
            )
        names.add(name)
    return tools


def _tool(tool: Any, where: str) -> dict[str, Any]:
    """One tool: what the client sent, without nulls, and with `strict` if it stood there or beside the function."""
    if not isinstance(tool, Mapping):
        raise InvalidRequest(f"{where} is {short(tool)}; must be an object with type and function", param=where)
    kind = tool.get("type", "function")
    if kind != "function":
        if isinstance(kind, str) and kind in _OTHER_GRAMMARS:
            raise UnsupportedParameter(f"{where}.type is {kind}; only function is served", param=f"{where}.type")
        raise InvalidRequest(f"{where}.type is {short(kind)}; must be function", param=f"{where}.type")
    function = tool.get("function")
    if not isinstance(function, Mapping):
        raise InvalidRequest(
            f"{where}.function is {short(function)}; must be an object with name and parameters",
            param=f"{where}.function",
        )
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"{where}.function.name is {short(name)}; 1 to 128 of letters, digits, '_', '-', '.', ':' and '/'",
            param=f"{where}.function.name",
        )
    description, parameters = function.get("description"), function.get("parameters")
    if description is not None and not isinstance(description, str):
        raise InvalidRequest(
            f"{where}.function.description is {short(description)}; must be a string",
            param=f"{where}.function.description",
        )
    if parameters is not None and not isinstance(parameters, Mapping):
        raise InvalidRequest(
            f"{where}.function.parameters is {short(parameters)}; must be a JSON schema, an object",
            param=f"{where}.function.parameters",
        )
    if deeper_than(tool, MAX_DEPTH):
        raise InvalidRequest(f"{where} is nested more than {MAX_DEPTH} levels deep; flatten its schema", param=where)
    strict = function.get("strict") or tool.get("strict")
    if strict not in (None, True, False):
        raise InvalidRequest(
            f"{where}.function.strict is {short(strict)}; must be true or false", param=f"{where}.function.strict"
        )
    kept = {key: value for key, value in function.items() if value is not None}
    return {"type": "function", "function": {**kept, "strict": bool(strict)}}


def _allowed(given: Mapping[str, Any], names: set[str]) -> tuple[str, set[str]]:
    """`auto` or `required`, and the names among which it is: the model sees no other tool."""
    where = "tool_choice.allowed_tools"
    said = given.get("allowed_tools")
    mode, listed = (said.get("mode"), said.get("tools")) if isinstance(said, Mapping) else (None, None)
    if mode not in ("auto", "required"):
        raise InvalidRequest(f"{where}.mode is {short(mode)}; must be auto or required", param="tool_choice")
    if not isinstance(listed, (list, tuple)) or not 1 <= len(listed) <= MAX_TOOLS:
        raise InvalidRequest(
            f"{where}.tools is {short(listed)}; must be a list of 1 to {MAX_TOOLS} functions", param="tool_choice"
        )
    allowed = set()
    for place, one in enumerate(listed):
        function = one.get("function") if isinstance(one, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or name not in names:
            raise InvalidRequest(
                f"{where}.tools[{place}] names {short(one if name is None else name)}, which is none of the tools",
                param="tool_choice",
            )
        allowed.add(name)
    return mode, allowed


def _choice(given: Any, names: set[str]) -> tuple[str, str | None]:
    """`auto`, `none`, `required`, or `named` with the name."""
    if given is None:
        return "auto", None
    if isinstance(given, str):
        if given not in _CHOICES:
            raise InvalidRequest(
                f"tool_choice is {short(given)}; must be {', '.join(_CHOICES)}, or an object that names a function",
                param="tool_choice",
            )
        if given == "required" and not names:
            raise InvalidRequest("tool_choice is 'required' without tools; give tools", param="tool_choice")
        return given, None
    function = given.get("function") if isinstance(given, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise InvalidRequest(
            f"tool_choice is {short(given)}; must be {', '.join(_CHOICES)}, allowed_tools, or "
            '{"type": "function", "function": {"name": ...}}',
            param="tool_choice",
        )
    if name not in names:
        raise InvalidRequest(f"tool_choice names {short(name)}, which is none of the tools", param="tool_choice")
    return "named", name
