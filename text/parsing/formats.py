"""What all formats share: reasoning between tags, then content with calls in it. Knows no model."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from .scan import Markers
from .source import Call, Kind, Malformed, Source, Steps
from .values import Tools, checked_object

Run = Callable[["Source", "Reading"], Steps[None]]


class Tags(NamedTuple):
    """Tags around reasoning."""

    openers: tuple[str, ...]
    closers: tuple[str, ...]
    label: str | None = None  # word behind an opener that belongs to it
    comes_again: bool = False  # also behind content; else only at the beginning of the output


class CallFormat:
    """How a model writes tool calls into its content. One object per output."""

    openers: tuple[str, ...] = ()
    openers_in_reasoning: tuple[str, ...] = ()  # of calls that end the reasoning without its closing tag
    trims = True  # whitespace before a call is not content

    def __init__(self, tools: Tools) -> None:
        self.tools = tools

    def begin(self, source: Source) -> Steps[None]:
        """Read calls that need no opener, at the beginning of the content."""
        return
        yield

    def read(self, source: Source, opener: str, *, only_offered: bool = False) -> Steps[None]:
        """Read what follows an opener, and emit its calls. `only_offered`: a call of another tool is malformed.

        Raises:
            Malformed, Unfinished: it is no call, or does not end.
        """
        raise NotImplementedError
        yield

    def emit(self, source: Source, call: Call, *, only_offered: bool = False) -> None:
        """Emit a call.

        Raises:
            Malformed: its tool must be offered, and is not.
        """
        if only_offered and call.name not in self.tools:
            raise Malformed
        source.emit(Kind.CALL, call=call)


class Reading(NamedTuple):
    """What to read in one output."""

    tags: Tags | None  # None: reasoning is content
    calls: CallFormat | None  # None: calls are content
    is_thinking: bool  # the prompt ended within reasoning


def read_output(source: Source, reading: Reading) -> Steps[None]:
    """Read an output of reasoning, content and calls to its end."""
    tags, calls = reading.tags, reading.calls
    if tags is not None and (reading.is_thinking or (yield from source.opening(*tags.openers)) is not None):
        yield from _thoughts(source, tags, calls)
    again = tags.openers if tags is not None and tags.comes_again else ()
    if calls is not None:
        yield from calls.begin(source)
    markers = Markers(*again, *(calls.openers if calls else ()))
    while True:
        opener = yield from source.text_until(Kind.CONTENT, markers, trim=calls is not None and calls.trims)
        if opener is None:
            return
        if tags is not None and opener in again:
            yield from _thoughts(source, tags, calls)
        elif calls is not None:
            try:
                yield from calls.read(source, opener)
            except Malformed:
                source.emit_read(Kind.CONTENT)


def _thoughts(source: Source, tags: Tags, calls: CallFormat | None) -> Steps[None]:
    """Read reasoning up to its end: a closing tag, or a call of an offered tool."""
    if tags.label:
        yield from source.literal(tags.label)
    yield from source.spaces()
    in_reasoning = calls.openers_in_reasoning if calls else ()
    markers = Markers(*tags.closers, *in_reasoning)
    while True:
        found = yield from source.text_until(Kind.REASONING, markers, trim=True)
        if found is None:
            return
        if found in tags.closers:
            yield from source.spaces()
            source.emit_read(Kind.MARK)
            return
        assert calls is not None
        try:
            yield from calls.read(source, found, only_offered=True)
        except Malformed:
            source.emit_read(Kind.REASONING)
        else:
            return


def json_call(source: Source, name: str, call_id: str | None = None) -> Steps[Call]:
    """Read the arguments of a call as JSON, after optional whitespace.

    Raises:
        Malformed, Unfinished: they are no JSON object.
    """
    yield from source.spaces()
    text = yield from source.json_text()
    return Call(name, checked_object(text), call_id)
