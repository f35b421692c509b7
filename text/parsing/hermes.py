"""Hermes calls, of Qwen2.5, Qwen3 and others: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`."""

from __future__ import annotations

from .formats import CallFormat
from .source import Call, Kind, Malformed, Source, Steps
from .values import function_of, loads


class HermesCalls(CallFormat):
    """A call is one JSON object between tags. It is complete with the object."""

    openers = ("<tool_call>",)

    def read(self, source: Source, opener: str, *, only_offered: bool = False) -> Steps[None]:
        """Read one call and its closing tag."""
        yield from source.spaces()
        text = yield from source.json_text()
        try:
            name, arguments = function_of(loads(text))
        except ValueError:
            raise Malformed from None
        self.emit(source, Call(name, arguments), only_offered=only_offered)
        yield from source.spaces()
        closed = yield from source.literal("</tool_call>")
        source.emit_read(Kind.MARK if closed else Kind.CONTENT)
