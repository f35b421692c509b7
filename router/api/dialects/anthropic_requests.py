"""Conversion of Anthropic's message bodies to the fields of an OpenAI chat. Knows no HTTP and no model.

Fields are served, accepted without effect, refused by name, or unknown, by the rules of router/api/fields.py.
Source of the fields: Anthropic's API reference of Messages, and the types of its Python client.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from ....core.errors import InvalidRequest, UnsupportedParameter
from ..checks import short
from ..fields import ChatBody, Known, Whole
from ..ignored import Ignored
from ..messages import MAX_MESSAGES, MAX_PARTS
from ..openai_requests import checked, parse
from ..tools import MAX_TOOLS

ACCEPTED = frozenset(
    {
        *("metadata", "service_tier", "cache_control", "inference_geo", "diagnostics", "speed"),
        *("user_profile_id", "workspace_id", "betas"),
    }
)
REFUSED: dict[str, tuple[Any, ...]] = {
    "container": (),
    "mcp_servers": ([],),
    "output_format": (),  # its older name; output_config.format is served
}
_QUIET_OF_TOOLS = ("cache_control", "eager_input_streaming", "type")
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


class MessagesBody(Known):
    """Body of POST /v1/messages."""

    model: str
    messages: list[dict[str, Any]] = Field(max_length=MAX_MESSAGES, fail_fast=True)
    max_tokens: Annotated[Whole, Field(ge=1)]
    system: str | list[dict[str, Any]] | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Whole | None = None
    tools: list[dict[str, Any]] | None = Field(None, max_length=MAX_TOOLS, fail_fast=True)
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None


class CountBody(MessagesBody):
    """Body of POST /v1/messages/count_tokens."""

    max_tokens: Annotated[Whole, Field(ge=1)] = 1


class Asked(NamedTuple):
    """A body of Anthropic's, as a chat."""

    chat: ChatBody
    stops: tuple[str, ...]  # its stop sequences
    shows_thinking: bool


def asked_of(
    values: dict[str, Any], kind: type[MessagesBody] = MessagesBody, *, strict: bool
) -> tuple[Asked, list[str]]:
    """The chat that a body asks for, with the names of its fields without effect.

    Raises:
        InvalidRequest: a field has a wrong form; with `strict` also an unknown field.
        UnsupportedParameter: a field, a block or a tool that is not served.
    """
    body, unknown = checked(values, kind, ACCEPTED, REFUSED, strict=strict)
    ignored = Ignored()
    stops = tuple(body.stop_sequences or ())
    chat: dict[str, Any] = {
        "model": body.model,
        "messages": [*_system(body.system, ignored), *_turns(body.messages, ignored)],
        "max_tokens": body.max_tokens,
        "stream": body.stream,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "stop": list(stops) or None,
        "include_stop_str_in_output": True if stops else None,  # so that the answer can say which one ended it
        "tools": [_tool(tool, f"tools[{place}]", ignored) for place, tool in enumerate(body.tools or ())] or None,
        **_tool_choice(body.tool_choice, ignored),
        **_output_config(body.output_config, ignored),
    }
    if chat["messages"][-1:] and chat["messages"][-1]["role"] == "assistant":
        chat["continue_final_message"] = True  # Anthropic's prefill
    wants_thoughts = _thinking(body.thinking, ignored)
    if wants_thoughts is not None:
        chat["chat_template_kwargs"] = {"enable_thinking": wants_thoughts}
    parsed, _ = parse(chat, ChatBody)
    return Asked(parsed, stops, bool(wants_thoughts)), [*unknown, *ignored.names()]


# ------------------------------------------------------------------ messages


def _system(system: str | Sequence[Any] | None, ignored: Ignored) -> Iterator[dict[str, Any]]:
    if isinstance(system, str) and system:
        yield {"role": "system", "content": system}
    elif system:
        blocks = [_text(_block(block, f"system[{place}]"), ignored) for place, block in enumerate(system)]
        yield {"role": "system", "content": blocks}


def _turns(messages: Sequence[Mapping[str, Any]], ignored: Ignored) -> Iterator[dict[str, Any]]:
    for place, message in enumerate(messages):
        where = f"messages[{place}]"
        role, content = message.get("role"), message.get("content")
        if role not in ("user", "assistant"):
            raise InvalidRequest(
                f"{where}.role is {short(role)}; must be user or assistant, and the system prompt is the field system",
                param=f"{where}.role",
            )
        for name in message:
            if name not in ("role", "content"):
                ignored.add("messages", name)
        if isinstance(content, str):
            yield {"role": role, "content": content}
            continue
        if not isinstance(content, list) or len(content) > MAX_PARTS:
            raise InvalidRequest(
                f"{where}.content is {short(content)}; must be a string or a list of at most {MAX_PARTS} blocks",
                param=f"{where}.content",
            )
        blocks = [_block(block, f"{where}.content[{index}]") for index, block in enumerate(content)]
        yield from _of_user(blocks, ignored) if role == "user" else (_of_assistant(blocks, ignored),)


class _Block(NamedTuple):
    where: str
    kind: str
    said: Mapping[str, Any]


def _block(block: Any, where: str) -> _Block:
    kind = block.get("type") if isinstance(block, Mapping) else None
    if not isinstance(kind, str):
        raise InvalidRequest(f"{where} is {short(block)}; must be an object with a type", param=where)
    return _Block(where, kind, block)


def _of_user(blocks: Sequence[_Block], ignored: Ignored) -> Iterator[dict[str, Any]]:
    """A turn of the user: results of tools are messages of their own."""
    texts: list[dict[str, str]] = []
    for block in blocks:
        if block.kind != "tool_result":
            texts.append(_text(block, ignored))
            continue
        if texts:
            yield {"role": "user", "content": texts}
            texts = []
        yield _result(block, ignored)
    if texts:
        yield {"role": "user", "content": texts}


def _result(block: _Block, ignored: Ignored) -> dict[str, Any]:
    content = block.said.get("content")
    if isinstance(content, list):
        inner = [_block(one, f"{block.where}.content[{index}]") for index, one in enumerate(content)]
        content = [_text(one, ignored) for one in inner]
    if block.said.get("is_error"):
        ignored.add("messages", "content", "is_error")
    return {"role": "tool", "tool_call_id": block.said.get("tool_use_id"), "content": content or ""}


def _of_assistant(blocks: Sequence[_Block], ignored: Ignored) -> dict[str, Any]:
    texts: list[dict[str, str]] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for block in blocks:
        if block.kind == "tool_use":
            calls.append(_call(block))
        elif block.kind == "thinking":
            thoughts.append(_string(block, "thinking"))
        elif block.kind == "redacted_thinking":
            ignored.add("messages", "content", "redacted_thinking")
        else:
            texts.append(_text(block, ignored))
    message: dict[str, Any] = {"role": "assistant", "content": texts or (None if calls or thoughts else "")}
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    return message | ({"tool_calls": calls} if calls else {})


def _call(block: _Block) -> dict[str, Any]:
    given = block.said.get("input")
    if not isinstance(given, Mapping):
        raise InvalidRequest(f"{block.where}.input is {short(given)}; must be an object", param=f"{block.where}.input")
    function = {"name": _string(block, "name"), "arguments": json.dumps(given, ensure_ascii=False)}
    return {"id": _string(block, "id"), "type": "function", "function": function}


def _text(block: _Block, ignored: Ignored) -> dict[str, str]:
    if block.kind != "text":
        raise UnsupportedParameter(
            f"{block.where}.type is {short(block.kind)}; served: text, tool_use, tool_result and thinking, each in its "
            "place: give text",
            param=f"{block.where}.type",
        )
    for name, value in block.said.items():
        if name not in ("type", "text", "cache_control") and value:
            ignored.add("messages", "content", name)
    return {"type": "text", "text": _string(block, "text")}


def _string(block: _Block, name: str) -> str:
    value = block.said.get(name)
    if not isinstance(value, str):
        raise InvalidRequest(f"{block.where}.{name} is {short(value)}; must be a string", param=f"{block.where}.{name}")
    return value


# ------------------------------------------------------------------ tools, thinking, output


def _tool(tool: Mapping[str, Any], where: str, ignored: Ignored) -> dict[str, Any]:
    kind = tool.get("type")
    if kind not in (None, "custom"):
        raise UnsupportedParameter(
            f"{where}.type is {short(kind)}; only the client's own tools are served, with name and input_schema",
            param=f"{where}.type",
        )
    if not isinstance(tool.get("input_schema"), Mapping):
        raise InvalidRequest(
            f"{where}.input_schema is {short(tool.get('input_schema'))}; must be a JSON schema, an object",
            param=f"{where}.input_schema",
        )
    for name, value in tool.items():
        if name not in ("name", "description", "input_schema", "strict", *_QUIET_OF_TOOLS) and value:
            ignored.add("tools", name)
    function = {name: tool[name] for name in ("name", "description", "strict") if tool.get(name) is not None}
    return {"type": "function", "function": {**function, "parameters": tool["input_schema"]}}


def _tool_choice(choice: Mapping[str, Any] | None, ignored: Ignored) -> dict[str, Any]:
    if choice is None:
        return {}
    kind, single = choice.get("type"), choice.get("disable_parallel_tool_use")
    for name in choice:
        if name not in ("type", "name", "disable_parallel_tool_use"):
            ignored.add("tool_choice", name)
    found = {} if single is None else {"parallel_tool_calls": not single}
    if kind == "tool":
        return found | {"tool_choice": {"type": "function", "function": {"name": choice.get("name")}}}
    if not isinstance(kind, str) or kind not in _CHOICES:
        raise InvalidRequest(
            f"tool_choice.type is {short(kind)}; must be {', '.join(_CHOICES)} or tool", param="tool_choice"
        )
    return found | {"tool_choice": _CHOICES[kind]}


def _thinking(thinking: Mapping[str, Any] | None, ignored: Ignored) -> bool | None:
    """Whether the model thinks, and shows it; None: as its template has it, and it is not shown."""
    if thinking is None:
        return None
    kind = thinking.get("type")
    if kind not in ("enabled", "adaptive", "disabled"):
        raise InvalidRequest(f"thinking.type is {short(kind)}; must be enabled, adaptive or disabled", param="thinking")
    for name in thinking:
        if name != "type":
            ignored.add("thinking", name)  # among them budget_tokens: reasoning has no bound of its own
    return bool(kind != "disabled")


def _output_config(config: Mapping[str, Any] | None, ignored: Ignored) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in (config or {}).items():
        if value is None:
            continue
        if name == "effort":
            found["reasoning_effort"] = value
        elif name == "format":
            kind = value.get("type") if isinstance(value, Mapping) else None
            if kind != "json_schema" or not isinstance(value.get("schema"), Mapping):
                raise InvalidRequest(
                    f"output_config.format is {short(value)}; must have the type json_schema, and a schema",
                    param="output_config",
                )
            json_schema = {"name": "output", "schema": value["schema"]}
            found["response_format"] = {"type": "json_schema", "json_schema": json_schema}
        else:
            ignored.add("output_config", name)
    return found
