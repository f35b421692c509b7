"""Incremental reading of a model's output: the text that came so far, and the events that were made of it.

A format (hermes.py and its neighbours) is a generator that reads from a `Source` and yields whenever it needs more
text. What it reads is collected, and each event takes all that was read since the last one. So the raw texts of all
events together are the input, whatever a format does:

    input | raw of event 1 | raw of event 2 | read, no event yet | not read |

Reading never goes back, and a pattern is searched once per character: the cost is linear in the length of the input,
however it was cut. Knows no format, no network and no clock.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from enum import Enum
from typing import NamedTuple, TypeVar

from .scan import JsonScan, Markers

T = TypeVar("T")
Steps = Generator[None, None, T]  # yields when it needs more text; returns a T

MAX_NAME_CHARS = 256
MAX_TAG_CHARS = 4096  # of the attributes in a tag
MAX_TRIMMED = 64  # characters of whitespace before a marker that are held back, and dropped with it

_SPACES = re.compile(r"\s*")
_NAME = re.compile(r"[\w.:/-]*")


class Kind(Enum):
    """Kind of an event."""

    CONTENT = "content"
    REASONING = "reasoning"
    CALL = "call"
    MARK = "mark"  # text that no client sees: markers, and calls that never ended


class Call(NamedTuple):
    """A complete tool call."""

    name: str
    arguments: str  # text of a JSON object
    id: str | None = None  # if the format has ids


class Event(NamedTuple):
    """Part of an output. `raw` of all events together is the output."""

    kind: Kind
    raw: str
    text: str = ""  # of content and reasoning
    call: Call | None = None


class Malformed(Exception):
    """What was read since the last event is no tool call."""


class Unfinished(Exception):
    """The output ended within a tool call."""


class Source:
    """The output so far, and its events."""

    def __init__(self) -> None:
        self._text = ""
        self._at = 0  # what is before has been read
        self._raw: list[str] = []  # what was read since the last event
        self._events: list[Event] = []
        self._has_call = False
        self.is_over = False

    def feed(self, text: str) -> None:
        """Append text."""
        self._text = self._text[self._at :] + text
        self._at = 0

    @property
    def num_unread(self) -> int:
        """Characters that were not read yet. Small between two pieces, so that no piece makes the next one dear."""
        return len(self._text) - self._at

    def events(self) -> list[Event]:
        """Take the events since the last call."""
        events, self._events = self._events, []
        return events

    # ------------------------------------------------------------------ events

    def emit(self, kind: Kind, text: str = "", call: Call | None = None) -> None:
        """Add an event of all that was read since the last one."""
        self._has_call = self._has_call or kind is Kind.CALL
        self._events.append(Event(kind, "".join(self._raw), text, call))
        self._raw.clear()

    def emit_read(self, kind: Kind) -> None:
        """Add an event whose text is all that was read since the last one; none if that is nothing."""
        if raw := "".join(self._raw):
            self.emit(kind, "" if kind is Kind.MARK else raw)

    def emit_rest(self, kind: Kind) -> None:
        """Read everything, and add an event of it."""
        self._take(len(self._text))
        self.emit_read(kind)

    def _take(self, end: int) -> str:
        taken = self._text[self._at : end]
        self._at = end
        if taken:
            self._raw.append(taken)
        return taken

    # ------------------------------------------------------------------ text outside of calls

    def text_until(self, kind: Kind, markers: Markers, *, trim: bool = False) -> Steps[str | None]:
        """Give out text as events of `kind` up to a marker, which is read and returned; None at the end of the output.

        `trim`: whitespace right before the marker (at most MAX_TRIMMED characters) is read with it; so is whitespace
        at the end of an output with calls.
        """
        self.emit_read(Kind.MARK)
        while True:
            found = markers.search(self._text, self._at)
            end = found.start() if found else len(self._text)
            if not found and not self.is_over:
                end -= markers.overlap(self._text, self._at)
            shown = end
            if trim and (found or not self.is_over or self._has_call):
                lowest = max(self._at, end - MAX_TRIMMED)
                shown = lowest + len(self._text[lowest:end].rstrip())
            if shown > self._at:
                self.emit(kind, self._take(shown))
            if found:
                self._take(found.end())
                return found.group()
            if self.is_over:
                self.emit_rest(Kind.MARK)
                return None
            yield

    def opening(self, *words: str) -> Steps[str | None]:
        """Read one of `words` if it comes next, perhaps after whitespace; else read nothing and return None."""
        longest = max(map(len, words)) + MAX_TRIMMED
        while True:
            rest = self._text[self._at : self._at + longest]
            word = rest.lstrip()
            for opener in words:
                if word.startswith(opener):
                    self._take(self._at + len(rest) - len(word) + len(opener))
                    return opener
            may_come = any(opener.startswith(word) for opener in words) and len(rest) < longest
            if self.is_over or not may_come:
                return None
            yield

    # ------------------------------------------------------------------ parts of calls

    def peek(self) -> Steps[str]:
        """The next character, which is not read; empty at the end of the output."""
        while self._at == len(self._text) and not self.is_over:
            yield
        return self._text[self._at : self._at + 1]

    def spaces(self) -> Steps[str]:
        """Read whitespace."""
        return (yield from self._run_of(_SPACES))

    def name(self) -> Steps[str]:
        """Read a function's name.

        Raises:
            Malformed: it is empty or too long.
            Unfinished: the output ended in it.
        """
        name = yield from self._run_of(_NAME, MAX_NAME_CHARS)
        if not name:
            if (yield from self.peek()):
                raise Malformed
            raise Unfinished
        if not (yield from self.peek()):
            raise Unfinished
        return name

    def _run_of(self, pattern: re.Pattern[str], most: int | None = None) -> Steps[str]:
        parts: list[str] = []
        num_chars = 0
        while True:
            found = pattern.match(self._text, self._at)
            assert found is not None  # the pattern matches the empty text
            parts.append(self._take(found.end()))
            num_chars += len(parts[-1])
            if most is not None and num_chars > most:
                raise Malformed
            if self._at < len(self._text) or self.is_over:
                return "".join(parts)
            yield

    def literal(self, *words: str) -> Steps[str | None]:
        """Read the longest of `words` that comes next; else read nothing and return None."""
        longest = max(map(len, words))
        while True:
            rest = self._text[self._at : self._at + longest]
            may_come = [word for word in words if len(word) > len(rest) and word.startswith(rest)]
            if not may_come or self.is_over:
                found = max((word for word in words if rest.startswith(word)), key=len, default=None)
                if found is not None:
                    self._take(self._at + len(found))
                return found
            yield

    def expect(self, *words: str) -> Steps[str]:
        """Read one of `words`.

        Raises:
            Malformed: something else comes.
            Unfinished: the output ended before one of them was complete.
        """
        found = yield from self.literal(*words)
        if found is not None:
            return found
        rest = self._text[self._at :]
        if self.is_over and any(word.startswith(rest) for word in words):
            raise Unfinished
        raise Malformed

    def take_char(self) -> Steps[str]:
        """Read one character.

        Raises:
            Unfinished: the output ended.
        """
        if not (yield from self.peek()):
            raise Unfinished
        return self._take(self._at + 1)

    def run_until(self, chars: str) -> Steps[str]:
        """Read up to any of `chars`, which is not read.

        Raises:
            Unfinished: none came.
        """
        text = yield from self._run_of(re.compile(f"[^{re.escape(chars)}]*"))
        if not (yield from self.peek()):
            raise Unfinished
        return text

    def until(self, markers: Markers) -> Steps[tuple[str, str]]:
        """Read up to a marker and the marker; returns both.

        Raises:
            Unfinished: none came.
        """
        parts: list[str] = []
        while True:
            found = markers.search(self._text, self._at)
            end = found.start() if found else len(self._text)
            if not found and not self.is_over:
                end -= markers.overlap(self._text, self._at)
            parts.append(self._take(end))
            if found:
                return "".join(parts), self._take(found.end())
            if self.is_over:
                raise Unfinished
            yield

    def json_text(self, begun: str = "") -> Steps[str]:
        """Read one JSON object or array; returns it. Only its nesting is checked, up to MAX_DEPTH (scan.py).

        `begun`: its beginning, if that was read already.

        Raises:
            Malformed: something comes that no JSON has, or it nests too deeply.
            Unfinished: the output ended in it.
        """
        if not begun and (char := (yield from self.peek())) not in ("{", "["):
            raise Malformed if char else Unfinished
        scan = JsonScan()
        scan.advance(begun, 0)
        parts = [begun]
        while True:
            at = scan.advance(self._text, self._at)
            parts.append(self._take(at))
            if scan.is_wrong:
                raise Malformed
            if scan.depth == 0:
                return "".join(parts)
            if self.is_over:
                raise Unfinished
            yield
