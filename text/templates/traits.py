"""Traits of a chat template: forms of messages that it can show, found by rendering small chats. Knows no request.

Templates are programs, and their source can be written in many ways, so it is not analysed. A probe puts a marker into
a message and searches the output for it. All probes of a template take some milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

Message = Mapping[str, Any]
Render = Callable[[Sequence[Message]], str | None]  # the output, or None if the template raised

_MARK = "qzjxkv"  # marker; no template contains it
_OTHER = _MARK[::-1]
_QUESTION: Message = {"role": "user", "content": "q"}
_ANSWER: Message = {"role": "assistant", "content": "b"}
_CALL_ID = "call12345"  # nine letters and digits: Mistral's templates require this


class ContentForm(Enum):
    """Form of a role's `content`."""

    TEXT = "text"
    PART = "part"  # a list of one {"type": "text", "text": ...}
    PARTS = "parts"  # a list of any number of them
    EITHER = "either"  # text or a list, with the same output


LISTS = (ContentForm.PART, ContentForm.PARTS)  # forms for which text must become a list


class NoContent(Enum):
    """Form of the content of a message with tool calls and no text."""

    ABSENT = "absent"  # as in transformers
    EMPTY = "empty"  # the empty string
    NULL = "null"


@dataclass(frozen=True, slots=True)
class CallForm:
    """Form in which tool calls of an assistant message reach the prompt."""

    no_content: NoContent = NoContent.ABSENT
    arguments_as_text: bool = False  # JSON text instead of an object
    beside_empty_text: bool = True  # calls are also shown if the content is the empty string
    shows_text: bool = True  # the text of a message with calls is in the output too
    shows_several: bool = True  # all calls of a message are in the output


@dataclass(frozen=True, slots=True)
class TemplateTraits:
    """Support of one chat template for the API's messages. The defaults describe a template that supports all."""

    knows_developer: bool = False
    vanishing_roles: frozenset[str] = frozenset()  # rendered without an error, but not in the output
    takes_one_system: bool = False  # several leading system messages are refused, or not all shown
    drops_late_system: bool = False  # if a system message comes after the first turn, it or the first one is not shown
    content_forms: Mapping[str, ContentForm] = field(default_factory=dict)  # by role; a missing one: text
    call_form: CallForm | None = field(default_factory=CallForm)  # None: tool calls are not shown


def find_traits(render: Render) -> TemplateTraits:
    """Find the traits of a template by probes. `render` must be bounded."""
    forms = {role: _content_form(render, role) for role in ("system", "user", "assistant", "tool")}
    calls = _call_form(render, forms)
    talk = _Talk(render, forms)
    knows_developer = _knows_developer(render, talk)
    if knows_developer:
        forms["developer"] = _content_form(render, "developer")
    roles = ("system", "user", "assistant", "tool")
    return TemplateTraits(
        knows_developer=knows_developer,
        vanishing_roles=frozenset(role for role in roles if _shows(render, talk.about(role)) is False),
        takes_one_system=not _shows_both(render, talk, knows_developer),
        drops_late_system=_shows(
            render, [talk.of("system", _OTHER), _QUESTION, _ANSWER, talk.of("system"), _QUESTION], (_MARK, _OTHER)
        )
        is False,
        content_forms=forms,
        call_form=calls,
    )


def as_parts(text: str) -> list[dict[str, str]]:
    """Text as a list with one part."""
    return [{"type": "text", "text": text}]


@dataclass(frozen=True, slots=True)
class _Talk:
    """Small chats in the forms that the template needs."""

    render: Render
    forms: Mapping[str, ContentForm]

    def of(self, role: str, text: str = _MARK) -> Message:
        form = self.forms.get(role, self.forms["system"])
        return {"role": role, "content": as_parts(text) if form in LISTS else text}

    def about(self, role: str) -> list[Message]:
        return _with_forms(_probe(self.render, role, self.of(role)["content"]), self.forms)


def _chat_about(role: str, content: Any, form: CallForm | None = None) -> list[Message]:
    """Shortest usual chat with a message of this role. `form`: form of the call before a tool's result."""
    if role == "user":
        return [{"role": "user", "content": content}]
    if role == "assistant":
        return [_QUESTION, {"role": "assistant", "content": content}, _QUESTION]
    if role == "tool":
        return [*_call_chat(form or CallForm(), "v")[:2], _result(content)]
    return [{"role": role, "content": content}, _QUESTION]


def _result(content: Any) -> Message:
    return {"role": "tool", "tool_call_id": f"{_CALL_ID[:-1]}0", "name": "look", "content": content}


def _call_chat(form: CallForm, *values: str) -> list[Message]:
    """Chat whose second message calls a tool once for each value."""
    calls = []
    for place, value in enumerate(values):
        arguments = f'{{"key": "{value}"}}' if form.arguments_as_text else {"key": value}
        function = {"name": "look", "arguments": arguments}
        calls.append({"id": f"{_CALL_ID[:-1]}{place}", "type": "function", "function": function})
    message: dict[str, Any] = {"role": "assistant", "tool_calls": calls}
    if form.no_content is not NoContent.ABSENT:
        message["content"] = "" if form.no_content is NoContent.EMPTY else None
    results = [{**_result("x"), "tool_call_id": call["id"]} for call in calls]
    return [_QUESTION, message, *results]


def _shows(render: Render, chat: Sequence[Message], marks: Sequence[str] = (_MARK,)) -> bool | None:
    """Return whether all markers are in the output. None: the template refuses the chat."""
    output = render(chat)
    return None if output is None else all(mark in output for mark in marks)


def _content_form(render: Render, role: str) -> ContentForm:
    texts = parts = None
    for _ in range(2):  # twice: the output may contain the time
        texts, parts = render(_probe(render, role, _MARK)), render(_probe(render, role, as_parts(_MARK)))
        if texts is not None and texts == parts:
            break
    shows_several = _shows(render, _probe(render, role, as_parts(_MARK) + as_parts(_OTHER)), (_MARK, _OTHER))
    if texts is not None and _MARK in texts:
        return ContentForm.EITHER if texts == parts and shows_several else ContentForm.TEXT
    if parts is None or _MARK not in parts:
        return ContentForm.TEXT
    return ContentForm.PARTS if shows_several else ContentForm.PART


def _probe(render: Render, role: str, content: Any) -> list[Message]:
    """Chat for a probe of a role; for tool results with the first form of calls that the template does not refuse."""
    if role != "tool":
        return _chat_about(role, content)
    chats = [_chat_about(role, content, form) for form in _CALL_FORMS]
    return next((chat for chat in chats if render(chat) is not None), chats[0])


_CALL_FORMS = tuple(CallForm(no_content, as_text) for as_text in (False, True) for no_content in NoContent)


def _call_form(render: Render, forms: Mapping[str, ContentForm]) -> CallForm | None:
    """First form in which the marker reaches the output. Objects are tried before text, as in transformers."""
    refused = True
    for form in _CALL_FORMS:
        chat = _with_forms(_call_chat(form, _MARK), forms)
        output = render(chat) or render(chat[:2])  # retry without the result: the template may not know tools
        refused &= output is None
        if output is None or _MARK not in output:
            continue
        textual = replace(form, arguments_as_text=True)
        if f"{{'key': '{_MARK}'}}" in output and _shows(render, _with_forms(_call_chat(textual, _MARK), forms)):
            found = textual  # the output is Python's repr of an object, so the template expects text
        else:
            found = form
        return _with_details(render, found, forms)
    return CallForm() if refused else None


def _with_details(render: Render, form: CallForm, forms: Mapping[str, ContentForm]) -> CallForm:
    """Add to the form: effect of empty text, of text, and of a second call beside a call."""

    def shows(chat: list[Message], *marks: str) -> bool | None:
        return _shows(render, _with_forms(chat, forms), marks)

    empty = _call_chat(replace(form, no_content=NoContent.EMPTY), _MARK)
    spoken = _call_chat(form, _MARK)
    spoken[1] = {**spoken[1], "content": _OTHER}
    return replace(
        form,
        beside_empty_text=bool(shows(empty, _MARK)),
        shows_text=shows(spoken, _MARK, _OTHER) is not False,
        shows_several=shows(_call_chat(form, _MARK, _OTHER), _MARK, _OTHER) is not False,
    )


def _with_forms(chat: list[Message], forms: Mapping[str, ContentForm]) -> list[Message]:
    return [
        {**message, "content": as_parts(message["content"])}
        if isinstance(message.get("content"), str) and forms.get(message["role"]) in LISTS
        else message
        for message in chat
    ]


def _knows_developer(render: Render, talk: _Talk) -> bool:
    """Return whether the output for `developer` differs from that for an unknown role."""
    other = "wizzzard"
    known, unknown = render(talk.about("developer")), render(talk.about(other))
    if known is None or _MARK not in known:
        return False
    return unknown is None or known != unknown.replace(other, "developer")


def _shows_both(render: Render, talk: _Talk, knows_developer: bool) -> bool:
    pairs = [("system", "system")]
    if knows_developer:
        pairs += [("system", "developer"), ("developer", "system"), ("developer", "developer")]
    return all(
        _shows(render, [talk.of(one, _OTHER), talk.of(other), _QUESTION], (_MARK, _OTHER)) for one, other in pairs
    )
