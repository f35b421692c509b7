"""Calls of GLM-4.5 and later, compact or with line ends between the tags:

    <tool_call>NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value></tool_call>

Values are not quoted; a parameter's schema tells strings from JSON.
"""

from __future__ import annotations

from .formats import CallFormat
from .scan import Markers
from .source import Call, Source, Steps
from .values import object_text, typed

_KEY_ENDS = Markers("</arg_key>")
_VALUE_ENDS = Markers("</arg_value>", "</tool_call>")


class GlmCalls(CallFormat):
    """A call is complete with `</tool_call>`."""

    openers = ("<tool_call>",)

    def read(self, source: Source, opener: str, *, only_offered: bool = False) -> Steps[None]:
        """Read one call."""
        yield from source.spaces()
        name = yield from source.name()
        members: dict[str, str] = {}
        while True:
            yield from source.spaces()
            if (yield from source.expect("<arg_key>", "</tool_call>")) == "</tool_call>":
                break
            key, _ = yield from source.until(_KEY_ENDS)
            yield from source.spaces()
            yield from source.expect("<arg_value>")
            value, ended = yield from self._value(source)
            members[key.strip()] = typed(value, self.tools.types_of(name, key.strip()))
            if ended:
                break
        self.emit(source, Call(name, object_text(members)), only_offered=only_offered)

    def _value(self, source: Source) -> Steps[tuple[str, bool]]:
        """Read a value; also returns whether the call ended with it.

        `</tool_call>` within a value is text, unless the output ends there: the model forgot the value's closing tag.
        """
        parts: list[str] = []
        while True:
            text, tag = yield from source.until(_VALUE_ENDS)
            parts.append(text)
            if tag == "</arg_value>":
                return "".join(parts), False
            space = yield from source.spaces()
            if not (yield from source.peek()):
                return "".join(parts), True
            parts += [tag, space]
