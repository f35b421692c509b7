"""Converts messages of the API to the form that one chat template needs. Knows the template's traits, no template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ...core.errors import InvalidRequest
from .traits import LISTS, CallForm, ContentForm, NoContent, TemplateTraits, as_parts

INSTRUCTIONS = ("system", "developer")


class Placed(NamedTuple):
    """Message with its index among those that the client sent; merged messages have the index of the first."""

    place: int
    message: dict[str, Any]


def adapt(messages: Sequence[Mapping[str, Any]], traits: TemplateTraits) -> list[Placed]:
    """Convert messages to the form that the template needs, without loss of text.

    - `developer` becomes `system` if the template does not know it;
    - system messages at the start are merged if the template shows or accepts only one;
    - `content` becomes text or a list of parts, by role;
    - arguments of tool calls become JSON text, and absent content empty or null, if the template shows only that.

    Raises:
        InvalidRequest: the template would leave out instructions, a tool's result or tool calls; names the message.
    """
    placed = [Placed(place, dict(message)) for place, message in enumerate(messages)]
    for _, message in placed:
        if message["role"] == "developer" and not traits.knows_developer:
            message["role"] = "system"
    if traits.takes_one_system:
        placed = _with_one_system(placed)
    in_turns = False
    for place, message in placed:
        role = message["role"]
        if role in traits.vanishing_roles and role not in ("user", "assistant"):  # a template may leave these two out
            raise InvalidRequest(
                f"messages[{place}].role is {role!r}; the model's chat template leaves such messages out",
                param=f"messages[{place}].role",
            )
        if role in INSTRUCTIONS and in_turns and traits.drops_late_system:
            raise InvalidRequest(
                f"messages[{place}].role is {role!r} after the first turn; the model's chat template shows such "
                "messages only at the start: put it there, or make it a user message",
                param=f"messages[{place}].role",
            )
        in_turns = in_turns or role not in INSTRUCTIONS
        if "tool_calls" in message:
            _put_calls(place, message, traits.call_form)
        if message.get("content") is not None:
            message["content"] = _in_form(message["content"], traits.content_forms.get(role, ContentForm.TEXT))
    return placed


def text_of_parts(content: str | Sequence[Mapping[str, Any]]) -> str:
    """Content as one text; parts become its lines."""
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def _in_form(content: Any, form: ContentForm) -> Any:
    if form is ContentForm.TEXT:
        return text_of_parts(content)
    if form is ContentForm.PART or (form in LISTS and isinstance(content, str)):
        return as_parts(text_of_parts(content))
    return content


def _with_one_system(placed: list[Placed]) -> list[Placed]:
    leading = 0
    while leading < len(placed) and placed[leading].message["role"] in INSTRUCTIONS:
        leading += 1
    if leading < 2:
        return placed
    texts = [text_of_parts(message["content"]) for _, message in placed[:leading]]
    # Keep the other fields of the first message, which the template would have shown.
    first = placed[0].message | {"content": "\n\n".join(text for text in texts if text)}
    return [Placed(placed[0].place, first), *placed[leading:]]


def _put_calls(place: int, message: dict[str, Any], form: CallForm | None) -> None:
    if form is None:
        raise InvalidRequest(
            f"messages[{place}].tool_calls: the model's chat template shows no tool calls with their arguments; "
            "leave them out",
            param=f"messages[{place}].tool_calls",
        )
    if len(message["tool_calls"]) > 1 and not form.shows_several:
        raise InvalidRequest(
            f"messages[{place}].tool_calls has {len(message['tool_calls'])} calls; the model's chat template shows one "
            "per message: give each call a message of its own, before its result",
            param=f"messages[{place}].tool_calls",
        )
    if form.arguments_as_text:
        message["tool_calls"] = [_with_text_arguments(call) for call in message["tool_calls"]]
    empty = message.get("content") in (None, "", [])
    if message.get("content") is None or (empty and not form.beside_empty_text):
        message.pop("content", None)
        if form.no_content is not NoContent.ABSENT:
            message["content"] = "" if form.no_content is NoContent.EMPTY else None


def _with_text_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = function["arguments"]
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": {**function, "arguments": text}}
