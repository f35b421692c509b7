"""Calls of Mistral, by version of its tokenizer.

V3           [TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]
V11 to V13   [TOOL_CALLS]NAME[ARGS]{...}[TOOL_CALLS]...; perhaps with [CALL_ID]ID before [ARGS]
"""

from __future__ import annotations

from .formats import CallFormat, json_call
from .source import Call, Malformed, Source, Steps
from .values import function_of, loads


class MistralCalls(CallFormat):
    """A call is complete with its JSON."""

    openers = ("[TOOL_CALLS]",)
    trims = False

    def read(self, source: Source, opener: str, *, only_offered: bool = False) -> Steps[None]:
        """Read the calls after one marker."""
        yield from source.spaces()
        if (yield from source.peek()) in ("[", "{"):
            for call in _listed((yield from source.json_text())):
                self.emit(source, call)
            return
        name = yield from source.name()
        call_id = None
        if (yield from source.literal("[CALL_ID]")):
            call_id = yield from source.name()
        yield from source.literal("[ARGS]")
        self.emit(source, (yield from json_call(source, name, call_id)))


def _listed(text: str) -> list[Call]:
    try:
        value = loads(text)
    except ValueError:
        raise Malformed from None
    listed = value if isinstance(value, list) else [value]
    calls = [Call(*function_of(one), _id(one)) for one in listed]
    if not calls:
        raise Malformed
    return calls


def _id(value: dict[str, object]) -> str | None:
    return given if isinstance(given := value.get("id"), str) and given else None
