"""Conversion of gRPC chat messages to the form of HTTP bodies, so that one validator checks both. Checks sizes only."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ....core.errors import InvalidRequest
from ....protos import inference_pb2
from ..checks import refuse_constant, short
from ..messages import MAX_MESSAGES

MAX_ITEMS = 16_384  # parts and tool calls of all messages
MAX_JSON_VALUES = 16_384  # of a template's options or documents


def chat_messages(messages: Sequence[inference_pb2.ChatMessage]) -> list[dict[str, Any]]:
    """Messages in the form of an HTTP body.

    Raises:
        InvalidRequest: there are too many messages, parts or tool calls.
    """
    if len(messages) > MAX_MESSAGES:
        raise InvalidRequest(f"messages has {len(messages)} entries; at most {MAX_MESSAGES}", param="messages")
    num_items = sum(len(message.parts) + len(message.tool_calls) for message in messages)
    if num_items > MAX_ITEMS:
        raise InvalidRequest(f"messages have {num_items} parts and calls; at most {MAX_ITEMS}", param="messages")
    return [_message(message) for message in messages]


def template_options(options: inference_pb2.ChatOptions) -> dict[str, Any]:
    """The fields of a `GenerateCall` that `options` gives.

    Raises:
        InvalidRequest: a field is no JSON, or has too many values.
    """
    found: dict[str, Any] = {
        name: getattr(options, name)
        for name in ("add_generation_prompt", "continue_final_message", "reasoning_effort", "parallel_tool_calls")
        if options.HasField(name)
    }
    for name in ("chat_template_kwargs", "documents", "tools", "tool_choice"):
        text = getattr(options, name)
        if text:
            found[name] = _json(text, name)
    return found


def _message(message: inference_pb2.ChatMessage) -> dict[str, Any]:
    found: dict[str, Any] = {"role": message.role}
    for name in ("name", "tool_call_id", "reasoning_content"):
        if message.HasField(name):
            found[name] = getattr(message, name)
    if message.tool_calls:
        found["tool_calls"] = [_call(call) for call in message.tool_calls]
    if message.parts:
        found["content"] = [{"type": "text", "text": part.text} for part in message.parts]
    elif message.HasField("content"):
        found["content"] = message.content
    elif not message.tool_calls and not message.reasoning_content:
        found["content"] = ""  # older clients leave an empty content out
    return found


def _call(call: inference_pb2.ToolCall) -> dict[str, Any]:
    identity = {"id": call.id} if call.HasField("id") else {}
    return {**identity, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _json(text: str, name: str) -> Any:
    _check_size(text, name)
    try:
        return json.loads(text, parse_constant=refuse_constant)
    except RecursionError:
        raise InvalidRequest(f"{name} is nested too deeply", param=name) from None
    except ValueError as error:
        raise InvalidRequest(f"{name} is {short(text)}: no JSON ({str(error)[:100]})", param=name) from None


def _check_size(text: str, name: str) -> None:
    """Refuse JSON with too many values, counted by the brackets and commas outside of strings."""
    num_quotes = text.count('"')
    if num_quotes > 4 * MAX_JSON_VALUES:
        raise InvalidRequest(f"{name} has {num_quotes // 2} texts; at most {2 * MAX_JSON_VALUES}", param=name)
    outside = "".join(text.replace("\\\\", "").replace('\\"', "").split('"')[::2])
    num_values = sum(outside.count(mark) for mark in "[{,")
    if num_values > MAX_JSON_VALUES:
        raise InvalidRequest(f"{name} has {num_values} values; at most {MAX_JSON_VALUES}", param=name)
