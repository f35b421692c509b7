"""Calls of Gemma 4: `<|tool_call>call:NAME{KEY:<|"|>TEXT<|"|>,KEY:1.5,KEY:[...],KEY:{...}}<tool_call|>`.

Strings stand between `<|"|>` as they are; keys are not quoted, and may hold spaces.
"""

from __future__ import annotations

from .formats import CallFormat
from .scan import MAX_DEPTH, Markers
from .source import Call, Kind, Malformed, Source, Steps
from .values import checked_object, dumps, json_or_text

_QUOTE = '<|"|>'
_QUOTES = Markers(_QUOTE)
_KEY_ENDS = Markers(":", "}", "\n")


class GemmaCalls(CallFormat):
    """A call is complete with the brace that closes its arguments."""

    openers = ("<|tool_call>",)
    trims = False

    def read(self, source: Source, opener: str, *, only_offered: bool = False) -> Steps[None]:
        """Read one call and its closing tag."""
        yield from source.expect("call:")
        name = yield from source.name()
        yield from source.expect("{")
        arguments = yield from _members(source)
        self.emit(source, Call(name, checked_object(arguments)), only_offered=only_offered)
        yield from source.literal("<tool_call|>")
        source.emit_read(Kind.MARK)


def _members(source: Source) -> Steps[str]:
    """Read the rest of an object whose brace was read, as JSON. Brackets are counted, not recursed into."""
    parts, open_brackets = ["{"], ["}"]
    is_first = True  # in its object or list
    while open_brackets:
        yield from source.spaces()
        closer = open_brackets[-1]
        if (yield from source.literal(closer)):
            parts.append(open_brackets.pop())
            is_first = False
            continue
        if not is_first:
            yield from source.expect(",")
            parts.append(", ")
            yield from source.spaces()
        if closer == "}":
            parts.append((yield from _key(source)) + ": ")
            yield from source.spaces()
        opened = yield from source.literal("{", "[", _QUOTE)
        is_first = opened in ("{", "[")
        if opened == _QUOTE:
            parts.append(dumps((yield from source.until(_QUOTES))[0]))
        elif opened:
            parts.append(opened)
            open_brackets.append("}" if opened == "{" else "]")
            if len(open_brackets) > MAX_DEPTH:
                raise Malformed
        else:
            parts.append(json_or_text((yield from source.run_until(",}]"))))
    return "".join(parts)


def _key(source: Source) -> Steps[str]:
    if (yield from source.literal(_QUOTE)):
        key, _ = yield from source.until(_QUOTES)
        yield from source.spaces()
        yield from source.expect(":")
        return dumps(key)
    key, end = yield from source.until(_KEY_ENDS)
    if end != ":" or not key.strip():
        raise Malformed
    return dumps(key.strip().strip('"'))
