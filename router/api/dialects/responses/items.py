"""Items of a conversation: checked and stored in one form, and as the messages of a chat. Knows no HTTP and no model.

    message                  {role, content: [{type: input_text | output_text, text}]}; also as {role, content: "text"}
    reasoning                {content: [{type: reasoning_text, text}], summary: [...]}
    function_call            {call_id, name, arguments}
    function_call_output     {call_id, output: "text" | [{type: input_text, text}]}

Reasoning, text and calls that follow each other are one message of the assistant.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from .....core.errors import InvalidRequest, UnsupportedParameter
from ...checks import short
from ...ignored import Ignored
from ...messages import MAX_PARTS

MAX_ITEMS = 4096
MAX_ID_CHARS = 128

_ROLES = ("user", "assistant", "system", "developer")
_TEXTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
_SERVED = "served: message, reasoning, function_call, function_call_output"
_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc", "function_call_output": "fco"}
_QUIET = frozenset(
    {
        *("type", "id", "status", "role", "content", "call_id", "name", "arguments", "output", "summary"),
        *("encrypted_content", "phase", "created_by", "internal_chat_message_metadata_passthrough"),
    }
)

Item = dict[str, Any]


def items_of(given: str | Sequence[Any], ignored: Ignored) -> list[Item]:
    """The items of an input, in the form in which they are stored; fields without effect are added to `ignored`.

    Raises:
        InvalidRequest: an item has a wrong form; `param` names it.
        UnsupportedParameter: a kind of item or content that is not served.
    """
    if isinstance(given, str):
        return [_message("user", [_part("input_text", given)], _new_id("message"))] if given else []
    return [_item(one, f"input[{place}]", ignored) for place, one in enumerate(given)]


def check_number(num_items: int, param: str) -> None:
    """Check the number of items of a conversation.

    Raises:
        InvalidRequest: there are too many.
    """
    if num_items > MAX_ITEMS:
        raise InvalidRequest(f"{param}: the conversation has {num_items} items; at most {MAX_ITEMS}", param=param)


def check_calls(items: Sequence[Item]) -> None:
    """Check that every call of a whole conversation has its output behind it, and every output its call before it.

    Raises:
        InvalidRequest: one has not; OpenAI's API refuses it in these words.
    """
    known: set[str] = set()
    unanswered: dict[str, None] = {}
    for item in items:
        if item["type"] == "function_call":
            known.add(item["call_id"])
            unanswered[item["call_id"]] = None
        elif item["type"] == "function_call_output":
            name = item["call_id"]
            if name not in known:
                raise InvalidRequest(
                    f"No tool call found for function call output with call_id {short(name)}; send its function_call "
                    "before it, or the previous_response_id of the response that made the call",
                    param="input",
                )
            unanswered.pop(name, None)
    for name in unanswered:
        raise InvalidRequest(
            f"No tool output found for function call {short(name)}; send its function_call_output, or leave the call "
            "out",
            param="input",
        )


def num_parts(items: str | Sequence[Any]) -> int:
    """Number of items and of their parts, checked or not: what the work on them depends on."""
    lists = (item.get("content") for item in items if isinstance(item, Mapping)) if isinstance(items, list) else ()
    return len(items if isinstance(items, list) else ()) + sum(len(one) for one in lists if isinstance(one, list))


def _item(given: Any, where: str, ignored: Ignored) -> Item:
    if not isinstance(given, Mapping):
        raise InvalidRequest(f"{where} is {short(given)}; must be an object", param=where)
    kind = given.get("type", "message" if "role" in given else None)
    if not isinstance(kind, str):
        raise InvalidRequest(f"{where}.type is {short(kind)}; {_SERVED}", param=f"{where}.type")
    if kind not in _PREFIXES:
        instead = "give the item itself, or previous_response_id" if kind == "item_reference" else _SERVED
        raise UnsupportedParameter(f"{where}.type is {short(kind)}; {instead}", param=f"{where}.type")
    for name, value in given.items():
        if name not in _QUIET and value:
            ignored.add("input", name)
    name = given.get("id")
    item_id = name if isinstance(name, str) and 0 < len(name) <= MAX_ID_CHARS else _new_id(kind)
    match kind:
        case "message":
            return _said(given, where, item_id, ignored)
        case "reasoning":
            return _thought(given, where, item_id, ignored)
        case "function_call":
            call = {name: _string(given, name, where) for name in ("name", "arguments")}
            return {"id": item_id, "type": "function_call", "status": "completed", **_called(given, where), **call}
    output = given.get("output")
    if not isinstance(output, str):
        output = [] if output is None else _parts(output, f"{where}.output", "input_text", ignored)
    return {
        "id": item_id,
        "type": "function_call_output",
        "status": "completed",
        **_called(given, where),
        "output": output,
    }


def _called(given: Mapping[str, Any], where: str) -> dict[str, str]:
    name = _string(given, "call_id", where)
    if not name:
        raise InvalidRequest(f"{where}.call_id is ''; must name the call", param=f"{where}.call_id")
    return {"call_id": name}


def _said(given: Mapping[str, Any], where: str, item_id: str, ignored: Ignored) -> Item:
    role, content = given.get("role"), given.get("content")
    if not isinstance(role, str) or role not in _ROLES:
        raise InvalidRequest(
            f"{where}.role is {short(role)}; must be one of {', '.join(_ROLES)}", param=f"{where}.role"
        )
    kind = "output_text" if role == "assistant" else "input_text"
    if isinstance(content, str):
        return _message(role, [_part(kind, content)], item_id)
    return _message(role, _parts(content, f"{where}.content", kind, ignored), item_id)


def _message(role: str, parts: list[dict[str, Any]], item_id: str) -> Item:
    return {"id": item_id, "type": "message", "role": role, "status": "completed", "content": parts}


def _part(kind: str, text: str) -> dict[str, Any]:
    return {"type": kind, "text": text, **({"annotations": []} if kind == "output_text" else {})}


def _parts(given: Any, where: str, kind: str, ignored: Ignored) -> list[dict[str, Any]]:
    """Parts of text, all of one kind."""
    if not isinstance(given, list) or len(given) > MAX_PARTS:
        raise InvalidRequest(
            f"{where} is {short(given)}; must be a string or a list of at most {MAX_PARTS} parts of text", param=where
        )
    parts = []
    for place, part in enumerate(given):
        at = f"{where}[{place}]"
        said = part.get("type") if isinstance(part, Mapping) else None
        if not isinstance(said, str):
            raise InvalidRequest(f"{at} is {short(part)}; must be an object with type and text", param=at)
        if said not in _TEXTS:
            raise UnsupportedParameter(f"{at}.type is {short(said)}; only text is served", param=f"{at}.type")
        for name, value in part.items():
            if name not in ("type", _TEXTS[said], "annotations", "logprobs") and value:
                ignored.add("input", "content", name)
        parts.append(_part(kind, _string(part, _TEXTS[said], at)))
    return parts


def _thought(given: Mapping[str, Any], where: str, item_id: str, ignored: Ignored) -> Item:
    """An item of reasoning: its own text, or where that is missing its summary."""
    texts = {
        name: [_string(part, "text", f"{where}.{name}[{place}]") for place, part in _numbered(given, name, where)]
        for name in ("content", "summary")
    }
    if given.get("encrypted_content") and not any(texts.values()):
        ignored.add("input", "encrypted_content")  # of another server: it cannot be read here
    return {
        "id": item_id,
        "type": "reasoning",
        "status": "completed",
        "summary": [{"type": "summary_text", "text": text} for text in texts["summary"]],
        "content": [{"type": "reasoning_text", "text": text} for text in texts["content"]],
        "encrypted_content": None,
    }


def _numbered(given: Mapping[str, Any], name: str, where: str) -> list[tuple[int, Mapping[str, Any]]]:
    parts = given.get(name) or []
    if not isinstance(parts, list) or len(parts) > MAX_PARTS or not all(isinstance(part, Mapping) for part in parts):
        raise InvalidRequest(
            f"{where}.{name} is {short(parts)}; must be a list of at most {MAX_PARTS} objects with text",
            param=f"{where}.{name}",
        )
    return list(enumerate(parts))


def _string(given: Mapping[str, Any], name: str, where: str) -> str:
    value = given.get(name)
    if not isinstance(value, str):
        raise InvalidRequest(f"{where}.{name} is {short(value)}; must be a string", param=f"{where}.{name}")
    return value


def _new_id(kind: str) -> str:
    return f"{_PREFIXES[kind]}_{secrets.token_hex(16)}"


# ------------------------------------------------------------------ as messages of a chat


def messages_of(items: Sequence[Item], instructions: str | None) -> list[dict[str, Any]]:
    """The messages of a chat: the instructions first, then the conversation."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": instructions}] if instructions else []
    turn: list[Item] = []
    for item in items:
        is_said = item["type"] == "message"
        if item["type"] == "function_call_output" or (is_said and item["role"] != "assistant"):
            messages += [*_turn(turn), _other(item)]
            turn = []
            continue
        if is_said and any(one["type"] != "reasoning" for one in turn):
            messages += _turn(turn)
            turn = []
        turn.append(item)
    return messages + _turn(turn)


def _turn(items: Sequence[Item]) -> list[dict[str, Any]]:
    """The message of the assistant that these items are; none if they say nothing."""
    thoughts, texts, calls = [], [], []
    for item in items:
        match item["type"]:
            case "reasoning":
                thoughts += [part["text"] for part in item["content"] or item["summary"]]
            case "message":
                texts += _texts(item["content"])
            case _:
                function = {"name": item["name"], "arguments": item["arguments"]}
                calls.append({"id": item["call_id"], "type": "function", "function": function})
    if not (any(thoughts) or texts or calls):
        return []
    content = None if calls and not texts else _content(texts)  # many templates join the content of other messages
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if any(thoughts):
        message["reasoning_content"] = "\n".join(thoughts)
    return [message | ({"tool_calls": calls} if calls else {})]


def _other(item: Item) -> dict[str, Any]:
    if item["type"] == "message":
        return {"role": item["role"], "content": _content(_texts(item["content"]))}
    output = item["output"]
    content = output if isinstance(output, str) else _content(_texts(output))
    return {"role": "tool", "tool_call_id": item["call_id"], "content": content}


def _texts(parts: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    return [{"type": "text", "text": part["text"]} for part in parts]


def _content(texts: list[dict[str, str]]) -> str | list[dict[str, str]]:
    """The text of one part; a list of several."""
    return texts or "" if len(texts) != 1 else texts[0]["text"]
