"""Searches that go on where the last piece of text ended: words, and the end of a JSON value. Knows no format."""

from __future__ import annotations

import re

MAX_DEPTH = 128  # of JSON in a call

_IN_STRING = re.compile(r'[^"\\]*')
_OUT_OF_STRING = re.compile(r"[\s:,0-9eE+\-.a-z]*")


class Markers:
    """Words that end a text, searched together in one pass."""

    def __init__(self, *words: str) -> None:
        self._pattern = re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True)))) if words else None
        self._begins = {word[:length] for word in words for length in range(1, len(word))}
        self._first = re.compile("|".join(re.escape(char) for char in sorted({word[0] for word in words})))
        self._longest = max(map(len, words), default=0)

    def search(self, text: str, start: int) -> re.Match[str] | None:
        """The first word in `text` from `start` on; of several at one place the longest."""
        return self._pattern.search(text, start) if self._pattern else None

    def overlap(self, text: str, start: int) -> int:
        """Length of the longest end of `text[start:]` that may be the beginning of a word."""
        if self._pattern is None:
            return 0
        found = self._first.search(text, max(start, len(text) - self._longest + 1))
        if found is None:
            return 0
        return next((len(text) - at for at in range(found.start(), len(text)) if text[at:] in self._begins), 0)


class JsonScan:
    """Finds the end of a JSON value: depth of nesting, and whether a string is open."""

    def __init__(self) -> None:
        self.depth = 0
        self.is_wrong = False
        self._is_string = False

    def advance(self, text: str, at: int) -> int:
        """Read on from `at`; returns where the value ended, went wrong, or needs more text."""
        while at < len(text):
            pattern = _IN_STRING if self._is_string else _OUT_OF_STRING
            found = pattern.match(text, at)
            assert found is not None  # the patterns match the empty text
            at = found.end()
            if at == len(text):
                break
            char = text[at]
            if char == "\\" and self._is_string:
                if at + 1 == len(text):
                    break
                at += 2
                continue
            at += 1
            if char == '"':
                self._is_string = not self._is_string
            elif char in "{[":
                self.depth += 1
            elif char in "}]":
                self.depth -= 1
            else:
                self.is_wrong = True
                return at - 1
            if self.depth > MAX_DEPTH:
                self.is_wrong = True
                return at
            if self.depth == 0:
                return at
        return at
