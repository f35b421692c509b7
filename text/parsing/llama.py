"""Calls of Llama 3 and 4, which begin the answer and have no markers of their own.

    Llama 3   {"name": ..., "parameters": {...}}, perhaps after <|python_tag|>, several separated by ";"
    Llama 4   [NAME(KEY=VALUE, ...), ...] in Python's notation, perhaps after <|python_start|>

An answer that only looks like a call stays content: only offered tools are called.
"""

from __future__ import annotations

from .formats import CallFormat
from .python_calls import python_calls
from .source import Call, Kind, Malformed, Source, Steps, Unfinished
from .values import function_of, loads

_KEYS = tuple(f'"{key}"' for key in ("name", "type", "parameters", "arguments", "function", "id"))


class LlamaJsonCalls(CallFormat):
    """Calls of Llama 3."""

    openers = ("<|python_tag|>",)
    trims = False

    def begin(self, source: Source) -> Steps[None]:
        """Read calls that the answer begins with."""
        if (yield from source.opening("{")) is not None:
            yield from self._attempt(source, has_brace=True)

    def read(self, source: Source, opener: str, *, only_offered: bool = False) -> Steps[None]:
        """Read calls after the marker."""
        yield from source.spaces()
        yield from self._attempt(source, has_brace=False)

    def _attempt(self, source: Source, *, has_brace: bool) -> Steps[None]:
        try:
            yield from self._calls(source, has_brace=has_brace)
        except (Malformed, Unfinished):
            source.emit_read(Kind.CONTENT)

    def _calls(self, source: Source, *, has_brace: bool) -> Steps[None]:
        while True:
            if not has_brace:
                yield from source.expect("{")
            space = yield from source.spaces()
            key = yield from source.expect(*_KEYS)  # other objects are content at once
            text = yield from source.json_text(begun="{" + space + key)
            try:
                name, arguments = function_of(loads(text))
            except ValueError:
                raise Malformed from None
            self.emit(source, Call(name, arguments), only_offered=True)
            yield from source.spaces()
            if not (yield from source.literal(";")) and (yield from source.peek()) != "{":
                source.emit_read(Kind.MARK if not (yield from source.peek()) else Kind.CONTENT)
                return
            yield from source.spaces()
            has_brace = False


class LlamaPythonCalls(CallFormat):
    """Calls of Llama 4."""

    openers = ("<|python_start|>",)
    trims = False

    def begin(self, source: Source) -> Steps[None]:
        """Read calls that the answer begins with."""
        if (yield from source.opening("[")) is not None:
            yield from self._attempt(source)

    def read(self, source: Source, opener: str, *, only_offered: bool = False) -> Steps[None]:
        """Read calls after the marker."""
        yield from source.spaces()
        if (yield from source.literal("[")) is None:
            raise Malformed
        yield from self._attempt(source)

    def _attempt(self, source: Source) -> Steps[None]:
        try:
            calls = yield from python_calls(source)
            if not all(call.name in self.tools for call in calls):
                raise Malformed
        except (Malformed, Unfinished):
            source.emit_read(Kind.CONTENT)
            return
        for call in calls:
            self.emit(source, call)
        yield from source.literal("<|python_end|>")
        source.emit_read(Kind.MARK)
