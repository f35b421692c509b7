"""Calls of Kimi K2, whose ids hold the function's name: `functions.NAME:INDEX`.

<|tool_calls_section_begin|><|tool_call_begin|>ID<|tool_call_argument_begin|>{...}<|tool_call_end|>
<|tool_calls_section_end|>
"""

from __future__ import annotations

import re

from .formats import CallFormat, json_call
from .scan import Markers
from .source import MAX_TAG_CHARS, Kind, Malformed, Source, Steps

_CALL, _END = "<|tool_call_begin|>", "<|tool_calls_section_end|>"
_SECTION = Markers(_CALL, _END)
_ARGUMENTS = Markers("<|tool_call_argument_begin|>")
_ID = re.compile(r"(?:functions\.)?([\w.:/-]+?)(?::\d+)?")


class KimiCalls(CallFormat):
    """A call is complete with its JSON object. Text between calls is not content."""

    openers = ("<|tool_calls_section_begin|>",)
    trims = False

    def read(self, source: Source, opener: str, *, only_offered: bool = False) -> Steps[None]:
        """Read one section of calls."""
        num_calls = 0
        while True:
            noise, tag = yield from source.until(_SECTION)
            if tag == _END:
                if noise.strip() and not num_calls:
                    raise Malformed
                source.emit_read(Kind.MARK)
                return
            given, _ = yield from source.until(_ARGUMENTS)
            found = _ID.fullmatch(given.strip()) if len(given) <= MAX_TAG_CHARS else None
            if found is None:
                raise Malformed
            call_id = given.strip() if given.strip() != found[1] else None
            self.emit(source, (yield from json_call(source, found[1], call_id)))
            num_calls += 1
            yield from source.spaces()
            yield from source.literal("<|tool_call_end|>")
