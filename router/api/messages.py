"""Checks messages of a chat and reduces the API's variants to one form. Knows no chat template.

The result has `role` (system, developer, user, assistant, tool), `content` (text, a list of text parts, or null
if tool calls replace it), and those of the other fields that are not empty:

    tool_calls            arguments become objects: the API has JSON text, chat templates print objects
    function_call         becomes a tool call, and the role `function` becomes `tool`: their older names
    reasoning_content     also accepted as `reasoning` or `thinking`, as an object, blocks, or parts of the content
    refusal               becomes the content of a message without content
    other fields          are kept; the caller checks whether the template reads them
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...core.errors import InvalidRequest, UnsupportedParameter
from .checks import short, text_of
from .ignored import Ignored
from .toolcalls import Calls, calls_of, check_texts

MAX_MESSAGES = 2048
MAX_PARTS = 1024  # of one message
REASONING = ("reasoning_content", "reasoning", "thinking")

_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_TEXT_PARTS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
}  # the field of each kind
_THOUGHT_PARTS = ("thinking", "reasoning")
_THOUGHT_FIELDS = ("content", "text", "thinking", "reasoning")  # fields of an object that may have its text


def check_messages(messages: Sequence[Any], ignored: Ignored) -> list[dict[str, Any]]:
    """Check all messages; fields that are left out are added to `ignored`.

    Raises:
        InvalidRequest: a message does not conform to the API; `param` names the field.
        UnsupportedParameter: a message asks for something that is not served, e.g. audio.
    """
    if not messages:
        raise InvalidRequest("messages is empty; give at least one message", param="messages")
    if len(messages) > MAX_MESSAGES:
        raise InvalidRequest(f"messages has {len(messages)} entries; at most {MAX_MESSAGES}", param="messages")
    check_texts(messages)
    checked = [_message(message, f"messages[{place}]", ignored) for place, message in enumerate(messages)]
    _give_ids(checked)
    return checked


def _give_ids(messages: list[dict[str, Any]]) -> None:
    """Give an id to calls without one, e.g. of `function_call`, and to the result that follows.

    Ids have nine letters and digits, because Mistral's templates accept no others.
    """
    latest: str | None = None
    for place, message in enumerate(messages):
        for call in message.get("tool_calls", ()):
            if "id" not in call:
                latest = call["id"] = f"call{place:05}"
        if message["role"] == "tool" and latest is not None:
            message.setdefault("tool_call_id", latest)
            latest = None


def _message(given: Any, where: str, ignored: Ignored) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise InvalidRequest(f"{where} is {short(given)}; must be an object with role and content", param=where)
    fields = {name: value for name, value in given.items() if not _says_nothing(value) or name == "content"}
    role = fields.pop("role", None)
    if not isinstance(role, str) or role not in _ROLES:
        raise InvalidRequest(
            f"{where}.role is {short(role)}; must be one of {', '.join(_ROLES)}", param=f"{where}.role"
        )
    if "audio" in fields:
        raise UnsupportedParameter(f"{where}.audio is not served; give the answer's text", param=f"{where}.audio")
    content, thoughts = _apart(fields.pop("content", None), role)
    content = _content(content, f"{where}.content", ignored)
    calls = calls_of(Calls(fields.pop("tool_calls", None), fields.pop("function_call", None)), role, where, ignored)
    reasoning = _reasoning(fields | ({"thinking": thoughts} if thoughts else {}), where, ignored)
    for name in REASONING:
        fields.pop(name, None)
    refusal = fields.pop("refusal", None)
    if refusal is not None:
        if not isinstance(refusal, str):
            raise InvalidRequest(f"{where}.refusal is {short(refusal)}; must be a string", param=f"{where}.refusal")
        if content:
            ignored.add("messages", "refusal")
        else:
            content = refusal
    if content is None:
        content = _without_content(role, bool(calls), given.get("content"), f"{where}.content")
    message: dict[str, Any] = {"role": "tool" if role == "function" else role, "content": content}
    for name in ("name", "tool_call_id"):
        if name in fields and not isinstance(fields[name], str):
            raise InvalidRequest(f"{where}.{name} is {short(fields[name])}; must be a string", param=f"{where}.{name}")
    return message | fields | ({"tool_calls": calls} if calls else {}) | reasoning


def _says_nothing(value: Any) -> bool:
    """True for null and for an empty text, list or object, which some clients send for every unused field."""
    return value is None or (isinstance(value, (str, list, tuple, dict)) and not value)


def _without_content(role: str, has_calls: bool, given: Any, where: str) -> str | None:
    if role in ("tool", "function"):
        return ""  # the tool had no output
    if role == "assistant":
        return None if has_calls else ""  # an empty turn; many templates join text to it
    raise InvalidRequest(f"{where} is {short(given)}; must be a string or a list of text parts", param=where)


def _apart(content: Any, role: str) -> tuple[Any, list[Any]]:
    """Split an assistant's content into the parts without reasoning, and the parts of reasoning."""
    if role != "assistant" or not isinstance(content, (list, tuple)):
        return content, []
    thoughts = [part for part in content if _is_thought(part)]
    return ([part for part in content if not _is_thought(part)] if thoughts else content), thoughts


def _is_thought(part: Any) -> bool:
    kind = part.get("type") if isinstance(part, Mapping) else None
    return isinstance(kind, str) and kind in _THOUGHT_PARTS


def _reasoning(fields: Mapping[str, Any], where: str, ignored: Ignored) -> dict[str, str]:
    """The reasoning as `reasoning_content`. Other fields of its objects, e.g. a signature, are added to `ignored`."""
    for name in REASONING:
        text = "".join(_thoughts(fields.get(name), f"{where}.{name}", ignored))
        if text:
            return {"reasoning_content": text_of(f"{where}.{name}", text)}
    return {}


def _thoughts(value: Any, where: str, ignored: Ignored) -> list[str]:
    """The texts of a text, of an object, or of a list of either."""
    parts = value if isinstance(value, (list, tuple)) else () if value is None else (value,)
    if len(parts) > MAX_PARTS:
        raise InvalidRequest(f"{where} has {len(parts)} parts; at most {MAX_PARTS}", param=where)
    return [_thought(part, where, ignored) for part in parts]


def _thought(value: Any, where: str, ignored: Ignored) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, Mapping):
        raise InvalidRequest(f"{where} is {short(value)}; must be a string, or objects with text", param=where)
    name = where.rpartition(".")[2]
    field = next((field for field in _THOUGHT_FIELDS if isinstance(value.get(field), str)), None)
    if field is None:
        ignored.add("messages", name)
        return ""
    for other, said in value.items():
        if other not in ("type", field) and not _says_nothing(said):
            ignored.add("messages", name, str(other))
    return str(value[field])


def _content(content: Any, where: str, ignored: Ignored) -> str | list[dict[str, str]] | None:
    """Check a content: text, or OpenAI's list of parts if all of them are text; None if there is none."""
    if content is None or isinstance(content, str):
        return content if content is None else text_of(where, content)
    if not isinstance(content, (list, tuple)):
        raise InvalidRequest(f"{where} is {short(content)}; must be a string or a list of text parts", param=where)
    if len(content) > MAX_PARTS:
        raise InvalidRequest(f"{where} has {len(content)} parts; at most {MAX_PARTS}", param=where)
    parts = [_part(part, f"{where}[{place}]", ignored) for place, part in enumerate(content)]
    return parts or None


def _part(part: Any, where: str, ignored: Ignored) -> dict[str, str]:
    if isinstance(part, str):
        return {"type": "text", "text": text_of(where, part)}
    if not isinstance(part, Mapping):
        raise InvalidRequest(f"{where} is {short(part)}; must be an object with type and text", param=where)
    kind = part.get("type")
    if not isinstance(kind, str) or kind not in _TEXT_PARTS:
        raise InvalidRequest(
            f"{where}.type is {short(kind)}; only text is served: give parts of type text", param=f"{where}.type"
        )
    field = _TEXT_PARTS[kind]
    text = part.get(field)
    if not isinstance(text, str):
        raise InvalidRequest(f"{where}.{field} is {short(text)}; must be a string", param=f"{where}.{field}")
    for name, value in part.items():
        if name not in ("type", field) and not _says_nothing(value):
            ignored.add("messages", "content", str(name))
    return {"type": "text", "text": text_of(f"{where}.{field}", text)}
