"""Output of gpt-oss in the Harmony format: messages with a header each.

    <|channel|>analysis<|message|>...<|end|><|start|>assistant to=functions.NAME<|channel|>commentary
    <|constrain|>json<|message|>{...}<|call|>

analysis is reasoning; final and commentary are content; a message to a function is a call; messages to other tools
are shown to nobody. The recipient stands before or behind the channel. A tag within a text ends it only before
`<|start|>` or at the end of the output. An output that does not begin as a header does is the text of a message: so a
rule for the text (structured output) asks for it, or the prompt ends within a message. Source: openai/harmony,
docs/format.md.
"""

from __future__ import annotations

import re

from .formats import Reading
from .scan import Markers
from .source import Call, Kind, Malformed, Source, Steps, Unfinished
from .values import checked_object

_MESSAGE, _END = "<|message|>", ("<|end|>", "<|call|>", "<|return|>")
_HEADER_ENDS = Markers(_MESSAGE, *_END)
_TEXT_ENDS = Markers(*_END)
# How a header may begin without its tags, as servers that hide special tokens give it.
_HEADER_WORDS = ("to=", "assistant", "functions.", "analysis", "commentary", "final")
_RECIPIENT = re.compile(r"to=([^\s<]+)")


def read_harmony(source: Source, reading: Reading) -> Steps[None]:
    """Read an output to its end."""
    begun = yield from _header_begin(source)
    if begun is None:
        kind = Kind.REASONING if reading.is_thinking else Kind.CONTENT
        source.emit_read(kind)
        yield from _text(source, kind)
        if not (yield from source.peek()):
            return
    while True:
        header, end = yield from source.until(_HEADER_ENDS)
        if end == _MESSAGE:
            recipient, channel = _parsed((begun or "") + header)
            begun = None
            if recipient is not None and recipient.startswith("functions.") and reading.calls is not None:
                yield from _call(source, recipient.removeprefix("functions."))
            yield from _text(source, _kind(recipient, channel, reading))
        source.emit_read(Kind.MARK)
        if not (yield from source.peek()):
            return


def _header_begin(source: Source) -> Steps[str | None]:
    """Read what a header may begin with before its first tag; None: text comes, of which its whitespace was read."""
    spaces = yield from source.spaces()
    if (yield from source.peek()) in ("<", ""):
        return spaces
    word = yield from source.literal(*_HEADER_WORDS)
    return None if word is None else spaces + word


def _parsed(header: str) -> tuple[str | None, str]:
    """Recipient and channel of a header. Of several channels the last counts, which models write after a mistake."""
    role, _, _ = header.partition("<|channel|>")
    _, _, rest = header.rpartition("<|channel|>")
    found = _RECIPIENT.search(rest) or _RECIPIENT.search(role)
    channel = re.match(r"\s*\w*", rest)
    return found[1] if found else None, channel[0].strip() if channel else ""


def _kind(recipient: str | None, channel: str, reading: Reading) -> Kind:
    if recipient is not None and recipient != "assistant":
        return Kind.CONTENT if reading.calls is None else Kind.MARK
    return Kind.REASONING if channel == "analysis" and reading.tags is not None else Kind.CONTENT


def _call(source: Source, name: str) -> Steps[None]:
    """Read a call's arguments and emit the call; if they are no JSON, the text remains for the reader."""
    yield from source.spaces()
    try:
        text = yield from source.json_text()
        source.emit(Kind.CALL, call=Call(name, checked_object(text)))
    except Malformed:
        source.emit_read(Kind.CONTENT)


def _text(source: Source, kind: Kind) -> Steps[None]:
    """Read a message's text and its end."""
    while (yield from source.text_until(kind, _TEXT_ENDS)) is not None:
        try:
            if not (yield from source.peek()):
                return
            yield from source.expect("<|start|>")
        except Unfinished:
            return
        except Malformed:
            source.emit_read(kind)
            continue
        return
