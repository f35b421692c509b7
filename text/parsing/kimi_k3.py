"""Output of Kimi K3: elements of reasoning, answer and calls, in tags of control tokens.

    <|open|>think<|sep|>...<|close|>think<|sep|><|open|>response<|sep|>...<|close|>response<|sep|>
    <|open|>tools<|sep|><|open|>call tool="NAME" index="1"<|sep|>
    <|open|>argument key="KEY" type="string"<|sep|>VALUE<|close|>argument<|sep|>
    <|close|>call<|sep|><|close|>tools<|sep|>

Values of type string are as they are, others are JSON. The text `<|close|>argument<|sep|>` within a value counts as its
end only before the next tag of the call.
"""

from __future__ import annotations

import re

from .formats import Reading
from .scan import Markers
from .source import MAX_TAG_CHARS, Call, Kind, Malformed, Source, Steps
from .values import dumps, json_or_text, object_text

_OPEN, _CLOSE, _SEP = "<|open|>", "<|close|>", "<|sep|>"
_TAGS = Markers(_OPEN, _CLOSE, "<|end_of_msg|>")
_SEPARATORS = Markers(_SEP)
_ARGUMENT, _CALL_END = "<|open|>argument ", "<|close|>call<|sep|>"
_VALUE_END = Markers("<|close|>argument<|sep|>")
_ATTRIBUTE = re.compile(r'([\w-]+)="([^"]*)"')
_ENTITIES = (("&quot;", '"'), ("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&"))


def read_kimi_k3(source: Source, reading: Reading) -> Steps[None]:
    """Read an output to its end."""
    element = "think" if reading.is_thinking else "response"
    while True:
        is_thought = element == "think" and reading.tags is not None
        tag = yield from source.text_until(Kind.REASONING if is_thought else Kind.CONTENT, _TAGS)
        if tag is None:
            return
        if tag not in (_OPEN, _CLOSE):
            source.emit_read(Kind.MARK)
            continue
        name, _ = yield from source.until(_SEPARATORS)
        if tag == _CLOSE:
            element = "response"
        elif name in ("think", "response"):
            element = name
        elif name.startswith("call ") and reading.calls is not None:
            try:
                source.emit(Kind.CALL, call=(yield from _call(source, name)))
            except Malformed:
                source.emit_read(Kind.CONTENT)
        source.emit_read(Kind.MARK if reading.calls is not None or name in ("think", "response") else Kind.CONTENT)


def _call(source: Source, tag: str) -> Steps[Call]:
    name = _attributes(tag).get("tool")
    if not name:
        raise Malformed
    members: dict[str, str] = {}
    yield from source.spaces()
    tag = yield from source.expect(_ARGUMENT, _CALL_END)
    while tag == _ARGUMENT:
        attributes = _attributes((yield from source.until(_SEPARATORS))[0])
        if "key" not in attributes:
            raise Malformed
        value, tag = yield from _value(source)
        members[attributes["key"]] = dumps(value) if attributes.get("type") == "string" else json_or_text(value)
    return Call(name, object_text(members))


def _value(source: Source) -> Steps[tuple[str, str]]:
    """Read a value and the tag that follows; returns both."""
    parts: list[str] = []
    while True:
        text, tag = yield from source.until(_VALUE_END)
        space = yield from source.spaces()
        following = yield from source.literal(_ARGUMENT, _CALL_END)
        parts.append(text)
        if following is not None:
            return "".join(parts), following
        parts += [tag, space]


def _attributes(tag: str) -> dict[str, str]:
    if len(tag) > MAX_TAG_CHARS:
        raise Malformed
    return {name: _unescaped(value) for name, value in _ATTRIBUTE.findall(tag)}


def _unescaped(value: str) -> str:
    for entity, char in _ENTITIES:
        value = value.replace(entity, char)
    return value
