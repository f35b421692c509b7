"""Tools of a Responses body, and the form of its text, as a chat has them. Knows no HTTP and no model.

Agents send tools of OpenAI's own servers beside their functions whether they need them or not. So such a tool is left
out and named, as llama.cpp's server does, unless no function stands beside it: then it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from .....core.errors import InvalidRequest, UnsupportedParameter
from ...checks import short
from ...ignored import Ignored

if TYPE_CHECKING:
    from .fields import ResponsesBody

_VERBOSITIES = ("low", "medium", "high")
_OF_A_FUNCTION = ("name", "description", "parameters", "strict")


class Offer(NamedTuple):
    """Tools and the choice among them, for the chat and as the response repeats them."""

    tools: list[dict[str, Any]]
    choice: str | dict[str, Any] | None
    tools_said: list[dict[str, Any]]
    choice_said: str | dict[str, Any]


def offer_of(body: ResponsesBody, ignored: Ignored) -> Offer:
    """The functions that a body offers; other tools beside them are added to `ignored`.

    Raises:
        UnsupportedParameter: it offers no function and another tool, or demands another one.
        InvalidRequest: a tool or the choice has not the form of the API.
    """
    tools: list[dict[str, Any]] = []
    said: list[dict[str, Any]] = []
    others: list[tuple[int, str]] = []
    for place, tool in enumerate(body.tools or ()):
        kind = tool.get("type")
        if kind == "function":
            function = _function(tool, f"tools[{place}]", ignored)
            tools.append({"type": "function", "function": function})
            said.append({"type": "function", "description": None, "parameters": None, "strict": False, **function})
        elif isinstance(kind, str):
            others.append((place, kind))
        else:
            raise InvalidRequest(
                f"tools[{place}].type is {short(kind)}; must be function", param=f"tools[{place}].type"
            )
    if others and not tools:
        place, kind = others[0]
        raise UnsupportedParameter(
            f"tools[{place}].type is {short(kind)}; only function is served: offer functions that your own code runs",
            param=f"tools[{place}].type",
        )
    for _, kind in others:
        ignored.add("tools", kind)
    return Offer(tools, _choice(body.tool_choice), said, "auto" if body.tool_choice is None else body.tool_choice)


def _function(tool: Mapping[str, Any], where: str, ignored: Ignored) -> dict[str, Any]:
    if isinstance(tool.get("function"), Mapping):
        raise InvalidRequest(
            f"{where}.function is the form of chats; here name and parameters stand in the tool itself",
            param=f"{where}.function",
        )
    for name, value in tool.items():
        if name not in ("type", *_OF_A_FUNCTION) and value:
            ignored.add("tools", name)
    return {name: tool[name] for name in _OF_A_FUNCTION if tool.get(name) is not None}


def _choice(choice: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    if choice is None or isinstance(choice, str):
        return choice
    kind = choice.get("type")
    if kind == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    if kind == "allowed_tools":
        listed = choice.get("tools")
        tools = (
            [_choice(one) if isinstance(one, dict) else one for one in listed] if isinstance(listed, list) else listed
        )
        return {"type": kind, "allowed_tools": {"mode": choice.get("mode"), "tools": tools}}
    if isinstance(kind, str):
        raise UnsupportedParameter(
            f"tool_choice.type is {short(kind)}; served: auto, none, required, function with its name, allowed_tools",
            param="tool_choice",
        )
    raise InvalidRequest(
        f'tool_choice is {short(choice)}; must be auto, none, required or {{"type": "function", "name": ...}}',
        param="tool_choice",
    )


def check_text(text: Mapping[str, Any], ignored: Ignored) -> None:
    """Check `text` of a body; fields without effect are added to `ignored`.

    Raises:
        InvalidRequest: a verbosity that the API does not have, or the errors of `format_of`.
    """
    for name in text:
        if name not in ("format", "verbosity"):
            ignored.add("text", name)
    verbosity = text.get("verbosity")
    if verbosity is not None and verbosity not in _VERBOSITIES:
        raise InvalidRequest(
            f"text.verbosity is {short(verbosity)}; must be one of {', '.join(_VERBOSITIES)}", param="text.verbosity"
        )
    format_of(text)


def format_of(text: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """`text.format` as the `response_format` of a chat; None: any text.

    Raises:
        InvalidRequest: it is none of text, json_object and json_schema with name and schema.
    """
    given = (text or {}).get("format")
    if given is None:
        return None
    kind = given.get("type") if isinstance(given, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "json_object"}
    if kind != "json_schema" or not isinstance(given.get("schema"), Mapping):
        raise InvalidRequest(
            f"text.format is {short(given)}; must have the type text, json_object, or json_schema with name and schema",
            param="text.format",
        )
    name = given.get("name")
    if not isinstance(name, str) or not name:
        raise InvalidRequest(f"text.format.name is {short(name)}; give the schema a name", param="text.format.name")
    named = {name: given[name] for name in ("name", "description", "schema", "strict") if given.get(name) is not None}
    return {"type": "json_schema", "json_schema": named}
