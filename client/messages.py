"""Writes a conversation (OpenAI's message dicts) into wire messages. Refuses unsupported fields by name."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from ..core.errors import InvalidRequest
from ..protos import inference_pb2
from .fields import set_field, shown

Message = Mapping[str, Any]

_REASONING = ("reasoning_content", "reasoning", "thinking")
_TEXTS = ("name", "tool_call_id")
_OTHERS = ("role", "content", "refusal", "tool_calls", "function_call")
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}


class TemplateOptions(TypedDict, total=False):
    """Options for the model's chat template. An absent option has the template's default."""

    chat_template_kwargs: Mapping[str, Any]  # e.g. {"enable_thinking": False}
    add_generation_prompt: bool  # the prompt ends with the beginning of an assistant message
    continue_final_message: bool  # the prompt ends within the last message, which the answer continues
    documents: Sequence[Mapping[str, Any]]
    reasoning_effort: str
    tools: Sequence[Mapping[str, Any]]  # functions in OpenAI's format
    tool_choice: str | Mapping[str, Any]
    parallel_tool_calls: bool


def add_messages(request: inference_pb2.ChatRequest | inference_pb2.TokenizeChat, messages: Sequence[Message]) -> None:
    """Write a conversation into `request`.

    Raises:
        InvalidRequest: a message has a wrong form, or an unsupported field; names it.
    """
    if isinstance(messages, (str, bytes, Mapping)):
        raise InvalidRequest(
            f"messages is a {type(messages).__name__}; give a list of {{'role': ..., 'content': ...}}", param="messages"
        )
    for place, message in enumerate(messages):
        where = f"messages[{place}]"
        if not isinstance(message, Mapping):
            raise InvalidRequest(f"{where} is {shown(message)}; give a dict with role and content", param=where)
        _add(request.messages.add(), _said(message), where)


def set_template_options(options: inference_pb2.ChatOptions, given: Mapping[str, Any]) -> None:
    """Write those of the `given` options that belong to `TemplateOptions`."""
    for name in ("chat_template_kwargs", "documents", "tools", "tool_choice"):
        if given.get(name) is not None:
            set_field(options, name, _json(given[name], name), name)
    for name in ("add_generation_prompt", "continue_final_message", "reasoning_effort", "parallel_tool_calls"):
        if given.get(name) is not None:
            set_field(options, name, given[name])


def _said(message: Message) -> dict[str, Any]:
    """Fields with a value. Messages of the openai client have null for every absent field."""
    return {
        name: value
        for name, value in message.items()
        if name in ("role", "content")
        or not (value is None or (isinstance(value, (str, Sequence, Mapping)) and not value))
    }


def _add(added: inference_pb2.ChatMessage, message: dict[str, Any], where: str) -> None:
    for name in message:
        if name not in _OTHERS and name not in _TEXTS and name not in _REASONING:
            raise InvalidRequest(
                f"{where}.{shown(name)} has no place in a message here; leave it out", param=f"{where}.{str(name)[:64]}"
            )
    if message.get("role") is None:
        raise InvalidRequest(f"{where} has no role; give role and content", param=where)
    set_field(added, "role", message["role"], f"{where}.role")
    for name in _TEXTS:
        if name in message:
            set_field(added, name, message[name], f"{where}.{name}")
    for name in _REASONING:
        if name in message and not added.HasField("reasoning_content"):
            set_field(added, "reasoning_content", message[name], f"{where}.{name}")
    _add_calls(added, message, where)
    content = message.get("content") or message.get("refusal", message.get("content"))
    if content is None:
        if added.role not in ("assistant", "tool", "function"):
            raise InvalidRequest(f"{where} has no content; give role and content", param=where)
    elif isinstance(content, (list, tuple)):
        for place, part in enumerate(content):
            _add_part(added, part, f"{where}.content[{place}]")
    else:
        set_field(added, "content", content, f"{where}.content")


def _add_part(added: inference_pb2.ChatMessage, part: Any, where: str) -> None:
    kind = part.get("type") if isinstance(part, Mapping) else "text" if isinstance(part, str) else None
    if not isinstance(kind, str) or kind not in _TEXT_PARTS:
        raise InvalidRequest(f"{where}.type is {shown(kind)}; give parts of type text", param=f"{where}.type")
    field = _TEXT_PARTS[kind]
    fields = {"type": kind, field: part} if isinstance(part, str) else part
    for name, value in fields.items():
        if name not in ("type", field) and value:
            raise InvalidRequest(f"{where}.{name} has no place here; leave it out", param=f"{where}.{name}")
    set_field(added.parts.add(), "text", fields.get(field), f"{where}.{field}")


def _add_calls(added: inference_pb2.ChatMessage, message: dict[str, Any], where: str) -> None:
    calls = message.get("tool_calls", ())
    where_calls = f"{where}.tool_calls"
    if not isinstance(calls, (list, tuple)):
        raise InvalidRequest(f"{where_calls} is {shown(calls)}; give a list of calls", param=where_calls)
    for place, call in enumerate(calls):
        _add_call(added, call, f"{where_calls}[{place}]")
    if not calls and "function_call" in message:  # the older name of tool_calls
        _add_call(added, {"function": message["function_call"]}, f"{where}.function_call")


def _add_call(added: inference_pb2.ChatMessage, call: Any, where: str) -> None:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or call.get("type") not in (None, "function"):
        raise InvalidRequest(
            f"{where} is {shown(call)}; give {{'id', 'type': 'function', 'function': {{'name', 'arguments'}}}}",
            param=where,
        )
    wire = added.tool_calls.add()
    if call.get("id") is not None:
        set_field(wire, "id", call["id"], f"{where}.id")
    set_field(wire, "name", function.get("name"), f"{where}.function.name")
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        arguments = _json({} if arguments is None else arguments, f"{where}.function.arguments")
    set_field(wire, "arguments", arguments, f"{where}.function.arguments")


def _json(value: Any, param: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"{param} is {shown(value)}: {error}", param=param) from None
