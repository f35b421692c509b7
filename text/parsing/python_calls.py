"""A list of calls in Python's notation, read token by token and written as JSON. Evaluates nothing."""

from __future__ import annotations

import re

from .scan import MAX_DEPTH, Markers
from .source import Call, Malformed, Source, Steps
from .values import dumps, loads, object_text

_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "0": "\0", "a": "\a", "v": "\v", "\n": ""}
_WORDS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
_STRING_ENDS = {quote: Markers(quote, "\\") for quote in "'\""}
_HEX_LENGTHS = {"x": 2, "u": 4, "U": 8}
_NUMBER = re.compile(r"[+-]?(\d[\d_]*)?(\.\d*)?([eE][+-]?\d+)?")
_CLOSERS = {"[": "]", "{": "}", "(": ")"}


def python_calls(source: Source) -> Steps[list[Call]]:
    """Read `NAME(KEY=VALUE, ...), ...]`: the rest of a list whose `[` was read.

    Raises:
        Malformed, Unfinished: it is no list of calls with named arguments, or does not end.
    """
    calls: list[Call] = []
    while True:
        yield from source.spaces()
        name = yield from source.name()
        yield from source.expect("(")
        calls.append(Call(name, (yield from _arguments(source))))
        yield from source.spaces()
        if (yield from source.expect(",", "]")) == "]":
            return calls


def _arguments(source: Source) -> Steps[str]:
    members: dict[str, str] = {}
    while True:
        yield from source.spaces()
        if (yield from source.literal(")")):
            return object_text(members)
        key = yield from source.name()
        yield from source.spaces()
        yield from source.expect("=")
        text = yield from _value(source)
        try:
            loads(text)
        except ValueError:
            raise Malformed from None
        members[key] = text
        yield from source.spaces()
        if (yield from source.expect(",", ")")) == ")":
            return object_text(members)


def _value(source: Source) -> Steps[str]:
    """Read a value; returns it as JSON, which the caller checks. Brackets are counted, not recursed into."""
    parts: list[str] = []
    open_brackets: list[str] = []
    while True:
        yield from source.spaces()
        char = yield from source.peek()
        if char in _STRING_ENDS:
            parts.append(dumps((yield from _string(source))))
        elif char and char in "[{(":
            yield from source.expect(char)
            open_brackets.append(_CLOSERS[char])
            parts.append("{" if char == "{" else "[")
            if len(open_brackets) > MAX_DEPTH:
                raise Malformed
            continue
        elif char and open_brackets and char in ":,":
            yield from source.expect(char)
            yield from source.spaces()
            if char == "," and (yield from source.peek()) == open_brackets[-1]:
                continue  # Python allows a comma behind the last item
            parts.append(char)
            continue
        elif not (char and open_brackets and char == open_brackets[-1]):
            parts.append((yield from _word(source)))
        while open_brackets:
            yield from source.spaces()
            if not (yield from source.literal(open_brackets[-1])):
                break
            parts.append("}" if open_brackets.pop() == "}" else "]")
        if not open_brackets:
            return "".join(parts)


def _word(source: Source) -> Steps[str]:
    sign = (yield from source.literal("+", "-")) or ""
    word = yield from source.name()
    if word[-1] in "eE" and (exponent := (yield from source.literal("+", "-"))):
        word += exponent + (yield from source.name())
    if not sign and word in _WORDS:
        return _WORDS[word]
    if not _NUMBER.fullmatch(sign + word):
        raise Malformed
    number = (sign + word).removeprefix("+").replace("_", "")
    try:
        loads(number)
    except ValueError:  # Python allows ".5", "5." and "007", JSON does not
        try:
            return dumps(float(number))
        except ValueError:
            raise Malformed from None
    return number


def _string(source: Source) -> Steps[str]:
    quote = yield from source.expect("'", '"')
    parts: list[str] = []
    while True:
        text, end = yield from source.until(_STRING_ENDS[quote])
        parts.append(text)
        if end == quote:
            return "".join(parts)
        char = yield from source.take_char()
        if char in _HEX_LENGTHS:
            digits = ""
            for _ in range(_HEX_LENGTHS[char]):
                digits += yield from source.take_char()
            try:
                parts.append(chr(int(digits, 16)))
            except (ValueError, OverflowError):
                raise Malformed from None
        else:
            parts.append(_ESCAPES.get(char, char if char in "'\"\\" else "\\" + char))
