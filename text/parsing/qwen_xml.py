"""Calls of Qwen3-Coder and Qwen3.5 to 3.8:

    <tool_call>
    <function=NAME>
    <parameter=KEY>
    VALUE
    </parameter>
    </function>
    </tool_call>

Values are not quoted; a parameter's schema tells strings from JSON. A tag within a value counts if it stands where the
model would write it: at the beginning of a line if the value began with one, and before another tag. Models forget
`<tool_call>`, and `</parameter>` before the next parameter or the end of the function.
"""

from __future__ import annotations

from .formats import CallFormat
from .scan import Markers
from .source import Call, Kind, Malformed, Source, Steps
from .values import object_text, typed

_TAG_ENDS = Markers(">", "\n")
_VALUE_ENDS = Markers("</parameter>", "<parameter=", "</function>")


class QwenXmlCalls(CallFormat):
    """A call is complete with `</function>`."""

    openers = ("<tool_call>", "<function=")
    openers_in_reasoning = ("<tool_call>",)

    def read(self, source: Source, opener: str, *, only_offered: bool = False) -> Steps[None]:
        """Read the function of one call."""
        if opener == "<tool_call>":
            yield from source.spaces()
            yield from source.expect("<function=")
        name = yield from self._tag(source)
        members: dict[str, str] = {}
        yield from source.spaces()
        tag = yield from source.expect("<parameter=", "</function>")
        while tag == "<parameter=":
            key = yield from self._tag(source)
            value, tag = yield from self._value(source)
            members[key] = typed(value, self.tools.types_of(name, key))
        is_bare = opener != "<tool_call>"
        self.emit(source, Call(name, object_text(members)), only_offered=only_offered or is_bare)
        yield from source.spaces()
        closed = yield from source.literal("</tool_call>")
        source.emit_read(Kind.MARK if closed else Kind.CONTENT)

    def _tag(self, source: Source) -> Steps[str]:
        """Read the rest of a tag: a name and `>`."""
        name, end = yield from source.until(_TAG_ENDS)
        if end != ">" or not name.strip():
            raise Malformed
        return name.strip()

    def _value(self, source: Source) -> Steps[tuple[str, str]]:
        """Read a value; returns it with the tag that follows: `<parameter=` or `</function>`."""
        has_lines = (yield from source.literal("\n")) is not None
        parts: list[str] = []
        while True:
            text, tag = yield from source.until(_VALUE_ENDS)
            parts.append(text)
            begins_line = text.endswith("\n") or (not text and has_lines and len(parts) == 1)
            if has_lines and not begins_line:
                parts.append(tag)
                continue
            if tag == "</parameter>":
                space = yield from source.spaces()
                following = yield from source.literal("<parameter=", "</function>")
                if following is None:
                    parts += [tag, space]
                    continue
                tag = following
            value = "".join(parts)
            return (value.removesuffix("\n") if has_lines else value), tag
