"""Checks the tools that a chat offers, and the choice among them. Knows no format of calls and runs no tool."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...core.errors import InvalidRequest, UnsupportedParameter
from ...text.parsing.parsers import NONE, TOOL_PARSERS
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


def offered_tools(call: GenerateCall, model: ServedModel, ignored: Ignored) -> Offered | None:
    """The tools that the model may call; None: it has none, or may call none (`tool_choice: none`).

    Raises:
        InvalidRequest: a tool or the choice has not the form of the API; `param` names the field.
        UnsupportedParameter: the model's template takes no tools, its calls cannot be parsed, or the choice needs a
            grammar.
    """
    tools = _tools(call.tools, ignored)
    choice = _choice(call.tool_choice, {tool["function"]["name"] for tool in tools})
    if not tools or choice == "none":
        return None
    if choice != "auto":
        raise UnsupportedParameter(
            f"tool_choice is {short(call.tool_choice)}; a call cannot be enforced yet: give auto, and ask for the call "
            "in a message",
            param="tool_choice",
        )
    if model.template is not None and not model.template.asks_for("tools"):
        raise UnsupportedParameter(
            "tools: the model's chat template reads none; describe them in a message, or serve a model with tools",
            param="tools",
        )
    if model.parsers.tools == NONE and not model.leaves_calls:
        raise UnsupportedParameter(
            "tools: no parser is known for the calls of this model's chat template; start the router with "
            f"--tool-parser, one of {', '.join(TOOL_PARSERS)}",
            param="tools",
        )
    return Offered(tools, call.parallel_tool_calls is not False)


def _tools(given: Any, ignored: Ignored) -> tuple[dict[str, Any], ...]:
    if given is None:
        return ()
    if not isinstance(given, (list, tuple)):
        raise InvalidRequest(f"tools is {short(given)}; must be a list of functions", param="tools")
    if len(given) > MAX_TOOLS:
        raise InvalidRequest(f"tools has {len(given)} entries; at most {MAX_TOOLS}", param="tools")
    tools = tuple(_tool(tool, f"tools[{place}]", ignored) for place, tool in enumerate(given))
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


def _tool(tool: Any, where: str, ignored: Ignored) -> dict[str, Any]:
    """One tool as chat templates print it: what the client sent, nulls and fields of no template left out."""
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
    if function.get("strict") or tool.get("strict"):
        ignored.add("tools", "strict")  # arguments are not forced into the schema
    kept = {key: value for key, value in function.items() if value is not None and key != "strict"}
    return {"type": "function", "function": kept}


def _choice(given: Any, names: set[str]) -> str:
    """`auto`, `none`, `required`, or `named`."""
    if given is None:
        return "auto"
    if isinstance(given, str):
        if given not in _CHOICES:
            raise InvalidRequest(
                f"tool_choice is {short(given)}; must be {', '.join(_CHOICES)}, or an object that names a function",
                param="tool_choice",
            )
        if given == "required" and not names:
            raise InvalidRequest("tool_choice is 'required' without tools; give tools", param="tool_choice")
        return given
    function = given.get("function") if isinstance(given, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise InvalidRequest(
            f"tool_choice is {short(given)}; must be {', '.join(_CHOICES)}, or "
            '{"type": "function", "function": {"name": ...}}',
            param="tool_choice",
        )
    if name not in names:
        raise InvalidRequest(f"tool_choice names {short(name)}, which is none of the tools", param="tool_choice")
    return "named"
