"""Parses the output of one choice: reasoning, content and tool calls. A pure fold over its text.

The state is a function of the text pushed so far, and the events do not depend on how it was cut, beyond the
boundaries of content and reasoning. So after a worker is lost, the same parser goes on with the text of another.
"""

from __future__ import annotations

from collections.abc import Iterable

from .parsers import Parsers, reading_of
from .source import Event, Kind, Source, Unfinished
from .values import Tools

PROMPT_END_CHARS = 512  # of a prompt's text that `OutputParser` looks at


class OutputParser:
    """Parser of one output: `push` is its step, `finish` its end."""

    def __init__(self, parsers: Parsers, prompt_end: str = "", tools: Tools | None = None) -> None:
        """`prompt_end`: the last PROMPT_END_CHARS of the prompt's text. `tools` None: calls stay content."""
        self._source = Source()
        self._steps = reading_of(parsers, self._source, prompt_end[-PROMPT_END_CHARS:], tools)
        self._rest: Kind | None = None  # kind of all further text; None: the format reads on
        self._unfinished = Kind.CONTENT

    @property
    def num_unread(self) -> int:
        """Characters that were pushed and must be looked at again with the next piece: a bounded number."""
        return self._source.num_unread

    def push(self, text: str) -> list[Event]:
        """Add text; returns the events that are certain now. A call comes when it is complete, and never in part."""
        self._source.feed(text)
        self._resume()
        return self._source.events()

    def finish(self, *, is_cut: bool = False) -> list[Event]:
        """End the text; returns the last events.

        `is_cut`: the model had not ended it. A call that is not complete is then shown to nobody; else it is no call,
        and content.
        """
        self._source.is_over = True
        self._unfinished = Kind.MARK if is_cut else Kind.CONTENT
        self._resume()
        return self._source.events()

    def _resume(self) -> None:
        if self._rest is None:
            try:
                next(self._steps)
                return
            except StopIteration:
                self._source.emit_read(Kind.MARK)
                self._rest = Kind.CONTENT
            except Unfinished:
                self._rest = self._unfinished
        self._source.emit_rest(self._rest)


def parse(
    pieces: Iterable[str],
    parsers: Parsers,
    prompt_end: str = "",
    tools: Tools | None = None,
    *,
    is_cut: bool = False,
) -> list[Event]:
    """All events of an output: the fold of `push` over its pieces."""
    parser = OutputParser(parsers, prompt_end, tools)
    events = [event for piece in pieces for event in parser.push(piece)]
    return events + parser.finish(is_cut=is_cut)
