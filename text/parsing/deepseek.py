"""Calls of DeepSeek V3 and R1, V3.1, and the markup of V3.2 to V4.1.

V3     <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME, a fenced JSON block, <｜tool▁call▁end｜>
V3.1   <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{...}<｜tool▁call▁end｜>
V3.2   <｜DSML｜function_calls><｜DSML｜invoke name="NAME"><｜DSML｜parameter name="KEY" string="true">VALUE
       </｜DSML｜parameter></｜DSML｜invoke></｜DSML｜function_calls>; V4 says tool_calls, V4.1 " calls" with a space
"""

from __future__ import annotations

import re

from .formats import CallFormat, json_call
from .scan import Markers
from .source import MAX_TAG_CHARS, Call, Kind, Malformed, Source, Steps
from .values import dumps, json_or_text, object_text, typed

_BEGIN, _END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_CALL, _CALL_END, _SEPARATOR = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
_SECTION = Markers(_CALL, _END)
_SEPARATORS = Markers(_SEPARATOR)
_LINE = Markers("\n")
_DSML = {
    "<｜DSML｜function_calls>": ("", "function_calls"),
    "<｜DSML｜tool_calls>": ("", "tool_calls"),
    "<｜DSML｜ calls>": (" ", "calls"),
}
_TAG_END = Markers(">")
_ATTRIBUTE = re.compile(r'(\w+)="([^"]*)"')


class DeepSeekCalls(CallFormat):
    """The opener of a section tells its version."""

    openers = (_BEGIN, *_DSML)

    def read(self, source: Source, opener: str, *, only_offered: bool = False) -> Steps[None]:
        """Read one section of calls."""
        yield from self._section(source) if opener == _BEGIN else self._markup(source, *_DSML[opener])

    def _section(self, source: Source) -> Steps[None]:
        num_calls = 0
        while True:
            noise, tag = yield from source.until(_SECTION)
            if tag == _END:
                if noise.strip() and not num_calls:
                    raise Malformed
                source.emit_read(Kind.MARK)
                return
            name, _ = yield from source.until(_SEPARATORS)
            if (yield from source.peek()) != "{":  # V3: the type comes before the separator, the name behind it
                name, _ = yield from source.until(_LINE)
                yield from source.literal("```json")
            if not name.strip():
                raise Malformed
            self.emit(source, (yield from json_call(source, name.strip())))
            num_calls += 1
            yield from source.spaces()
            yield from source.literal("```")
            yield from source.spaces()
            yield from source.literal(_CALL_END)

    def _markup(self, source: Source, gap: str, section: str) -> Steps[None]:
        begin, close = f"<｜DSML｜{gap}", f"</｜DSML｜{gap}"
        while True:
            yield from source.spaces()
            if (yield from source.expect(f"{begin}invoke ", f"{close}{section}>")) == f"{close}{section}>":
                source.emit_read(Kind.MARK)
                return
            tag, _ = yield from source.until(_TAG_END)
            name = _attributes(tag).get("name")
            if not name:
                raise Malformed
            members: dict[str, str] = {}
            is_open = not tag.endswith("/")
            while is_open:
                yield from source.spaces()
                if (yield from source.expect(f"{begin}parameter ", f"{close}invoke>")) == f"{close}invoke>":
                    break
                attributes = _attributes((yield from source.until(_TAG_END))[0])
                if "name" not in attributes:
                    raise Malformed
                key = attributes["name"]
                value, _ = yield from source.until(Markers(f"{close}parameter>"))
                members[key] = self._value(name, key, value, attributes.get("string"))
            self.emit(source, Call(name, object_text(members)))

    def _value(self, name: str, key: str, value: str, is_string: str | None) -> str:
        if is_string == "true":
            return dumps(value)
        return json_or_text(value) if is_string == "false" else typed(value, self.tools.types_of(name, key))


def _attributes(tag: str) -> dict[str, str]:
    if len(tag) > MAX_TAG_CHARS:
        raise Malformed
    return dict(_ATTRIBUTE.findall(tag))
