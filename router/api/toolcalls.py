"""Checks tool calls of earlier turns. Knows no chat template and runs no tool."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ...core.errors import InvalidRequest
from .checks import deeper_than, refuse_constant, short, text_of
from .http.structure import MAX_CONTAINERS, Bounds, check, num_containers
from .ignored import Ignored

MAX_CALLS = 128  # of one message
MAX_DEPTH = 32  # of arguments
SMALL_CHARS = 4096  # arguments up to this size are built without a check of their structure
ARGUMENTS = Bounds(containers=8192, keys=16_384, commas=65_536, depth=MAX_DEPTH)  # of one call's JSON text


class Calls(NamedTuple):
    """The tool calls of a message, by their present and their older name."""

    tool_calls: Any
    function_call: Any


def calls_of(given: Calls, role: str, where: str, ignored: Ignored) -> list[dict[str, Any]]:
    """Tool calls of one message in the form of chat templates: `{"id", "type", "function": {"name", "arguments"}}`.

    Arguments in JSON text become values, as in vLLM; text that is no JSON stays text, because a model wrote it and must
    see it again.

    Raises:
        InvalidRequest: they do not have that form, or the message has another role; `param` names the field.
    """
    if given.tool_calls is None and given.function_call is None:
        return []
    name = "tool_calls" if given.tool_calls is not None else "function_call"
    where = f"{where}.{name}"
    if role != "assistant":
        raise InvalidRequest(f"{where} stands in a message of role {role}; only assistant has {name}", param=where)
    if given.tool_calls is None:
        return [{"type": "function", "function": _function(given.function_call, where, ignored, name)}]
    if given.function_call is not None:
        ignored.add("messages", "function_call")
    if not isinstance(given.tool_calls, (list, tuple)):
        raise InvalidRequest(f"{where} is {short(given.tool_calls)}; must be a list of calls", param=where)
    if len(given.tool_calls) > MAX_CALLS:
        raise InvalidRequest(f"{where} has {len(given.tool_calls)} entries; at most {MAX_CALLS}", param=where)
    return [_call(call, f"{where}[{place}]", ignored) for place, call in enumerate(given.tool_calls)]


def check_texts(messages: Sequence[Any]) -> None:
    """Refuse messages whose JSON arguments have more lists and objects in total than one body may have.

    Raises:
        InvalidRequest: they have too many lists and objects.
    """
    texts = [text for message in messages for text in _argument_texts(message)]
    if sum(text.count("[") + text.count("{") for text in texts) <= MAX_CONTAINERS:
        return  # few enough even if none of them is inside a string
    num_opening = 0
    for text in texts:
        num = num_containers(text)
        num_opening += num if num <= ARGUMENTS.containers else 0  # a single text with more is refused by `_arguments`
        if num_opening > MAX_CONTAINERS:
            raise InvalidRequest(
                f"the tool calls' arguments hold {num_opening} lists and objects or more; at most {MAX_CONTAINERS}",
                param="messages",
            )


def _argument_texts(message: Any) -> Iterator[str]:
    if not isinstance(message, Mapping):
        return
    calls = message.get("tool_calls")
    listed = calls if isinstance(calls, (list, tuple)) else ()
    functions = [message.get("function_call"), *(call.get("function") for call in listed if isinstance(call, Mapping))]
    for function in functions:
        arguments = function.get("arguments") if isinstance(function, Mapping) else None
        if isinstance(arguments, str):
            yield arguments


def _call(call: Any, where: str, ignored: Ignored) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        raise InvalidRequest(f"{where} is {short(call)}; must be an object with function", param=where)
    kind = call.get("type")
    if kind is not None and (not isinstance(kind, str) or kind != "function"):
        raise InvalidRequest(f"{where}.type is {short(kind)}; must be function", param=f"{where}.type")
    found: dict[str, Any] = {"type": "function"}
    if call.get("id") is not None:
        if not isinstance(call["id"], str):
            raise InvalidRequest(f"{where}.id is {short(call['id'])}; must be a string", param=f"{where}.id")
        found = {"id": call["id"], **found}
    _note_others(call, ("id", "type", "function"), ignored, "tool_calls")
    return {**found, "function": _function(call.get("function"), f"{where}.function", ignored, "tool_calls")}


def _function(function: Any, where: str, ignored: Ignored, field: str) -> dict[str, Any]:
    if not isinstance(function, Mapping):
        raise InvalidRequest(f"{where} is {short(function)}; must be an object with name and arguments", param=where)
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise InvalidRequest(f"{where}.name is {short(name)}; must be the function's name", param=f"{where}.name")
    _note_others(function, ("name", "arguments"), ignored, field)
    return {"name": name, "arguments": _arguments(function.get("arguments"), f"{where}.arguments")}


def _arguments(arguments: Any, where: str) -> Any:
    if isinstance(arguments, str):
        text = text_of(where, arguments)
        if not text.strip():
            return {}
        if len(text) > SMALL_CHARS:
            _check_structure(text, where)
        try:
            arguments = json.loads(text, parse_constant=refuse_constant)
        except RecursionError:
            raise _too_deep(where) from None
        except ValueError:
            return text
    if arguments is None:
        return {}
    if deeper_than(arguments, MAX_DEPTH):
        raise _too_deep(where)
    return arguments


def _check_structure(text: str, where: str) -> None:
    try:
        check(text, ARGUMENTS)
    except InvalidRequest as error:
        raise InvalidRequest(f"{where}: {error.message}", param=where) from None


def _too_deep(where: str) -> InvalidRequest:
    return InvalidRequest(f"{where} is nested more than {MAX_DEPTH} levels deep; flatten it", param=where)


def _note_others(given: Mapping[str, Any], known: tuple[str, ...], ignored: Ignored, field: str) -> None:
    for name, value in given.items():
        if name not in known and value is not None:
            ignored.add("messages", field, str(name))
