"""Cuts of a long text into pieces whose tokens, joined, are the tokens of the text. Knows no request.

    text    … the quick brown│ fox jumps …          before a blank between a letter or digit and a letter
            … end of line.\\n│Next line …            after a single line break, before a letter
    pieces  [16 Ki characters] [16 Ki characters] …

Known vocabularies separate words there before any merge. This is checked: a kind of place is used only if no token of
the vocabulary crosses it and samples have the same tokens with and without the cut; and at each cut of a text its
surroundings are tokenised both ways. A tokenizer without such places encodes every text as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import tokenizers

from ..core.errors import InvalidRequest
from .token_bounds import is_byte_level

PIECE_CHARS = 16_384
MAX_UNCUT_CHARS = 262_144  # longest stretch without a place to cut, for tokenizers that have such places
_WINDOW_CHARS = 64  # characters on each side of a cut that are tokenised both ways
_MAX_TRIES = 4  # places tried in the second half of a piece

_BYTE_BLANK, _BYTE_LINE = "\u0120", "\u010a"  # space and line break in byte-level vocabularies
_BYTE_BLANKS = "\u0120\u010a\u0109\u010d"


class Piece(NamedTuple):
    """Part of a text that is tokenised separately."""

    start: int  # index of its first character in the whole text
    text: str


@dataclass(frozen=True, slots=True)
class _Kind:
    """One kind of place for cuts: the next piece begins `num_dropped` characters after the cut."""

    places: re.Pattern[str]  # matches are empty, at the cut
    num_dropped: int


_WORD, _LINE = re.compile(r"(?<=[A-Za-z0-9])(?= [A-Za-z])"), re.compile(r"(?<=\S\n)(?=[^\W\d_])")
_SAMPLES = {
    _WORD: (
        ("the quick brown fox", "x = 12", "na\u00efve caf\u00e9 \u00fcber bar", "\u65e5\u672c abc", "don't", "a", "A1"),
        (" jumps over", " b", " Z\u00fcrich 7", " x'y", " I'm", " a  b"),
    ),
    _LINE: (
        ("end.\n", "foo\n", "foo();\n", "(a, b) {\n", "\u65e5\u672c\u3002\n", "1\n", "a */\n", "\U0001f600\n"),
        ("jumps over", "b 1", "\u65e5\u672c", "\u00e9t\u00e9", "I'm"),
    ),
}


class Cuts:
    """Places to cut that are valid for one tokenizer."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._kinds = tuple(kind for kind in _kinds(backend) if self._holds(kind))

    def pieces(self, text: str) -> Iterator[Piece]:
        """Yield the pieces of a text, found one by one. A piece is longer than PIECE_CHARS if it has no place to cut.

        Raises:
            InvalidRequest: this tokenizer has places to cut, but a too long stretch of this text has none.
        """
        start = 0
        while self._kinds and len(text) - start > PIECE_CHARS:
            cut = self._cut(text, start)
            if cut is None:
                break
            end, start_of_next = cut
            yield Piece(start, text[start:end])
            start = start_of_next
        yield Piece(start, text[start:] if start else text)

    def _cut(self, text: str, start: int) -> tuple[int, int] | None:
        """End of the piece from `start`, and start of the next one. None: the rest is one piece."""
        low = start + PIECE_CHARS // 2
        while low < len(text):
            high = min(low + PIECE_CHARS // 2, len(text))
            for kind in self._kinds:
                found = [match.start() for match in kind.places.finditer(text, low, high)]
                for place in reversed(found[-_MAX_TRIES:]):
                    left, right = text[max(start, place - _WINDOW_CHARS) : place], text[place : place + _WINDOW_CHARS]
                    if self._is_same(left, right, kind.num_dropped):
                        return place, place + kind.num_dropped
            if high - start > MAX_UNCUT_CHARS:
                raise InvalidRequest(
                    f"the text has {high - start} characters or more from character {start} on without a space between "
                    f"words or a line break before a word; at most {MAX_UNCUT_CHARS} are taken: break it up"
                )
            low = high
        return None

    def _is_same(self, left: str, right: str, num_dropped: int) -> bool:
        texts = [left + right, left, right[num_dropped:]]
        whole, one, other = (e.ids for e in encode_all(self._backend, texts, add_special_tokens=False))
        return bool(whole == one + other)

    def _holds(self, kind: _Kind) -> bool:
        lefts, rights = _SAMPLES[kind.places]
        return all(self._is_same(left, right, kind.num_dropped) for left in lefts for right in rights)


def is_long(text: str) -> bool:
    """Return whether a text is long enough to be cut."""
    return len(text) > PIECE_CHARS


def encode_all(backend: tokenizers.Tokenizer, texts: list[str], add_special_tokens: bool) -> list[tokenizers.Encoding]:
    """Encode texts to ids without offsets. Releases the GIL, which `encode` does not.

    The result takes a third of the memory of an encoding with offsets, and is freed faster.
    """
    found: list[tokenizers.Encoding] = backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
    return found


def _kinds(backend: tokenizers.Tokenizer) -> Iterator[_Kind]:
    """Kinds of places that no token crosses. A space is dropped for tokenizers that put one before every text."""
    spelt = is_byte_level(backend)
    blank, line, blanks = (_BYTE_BLANK, _BYTE_LINE, _BYTE_BLANKS) if spelt else ("\u2581", "\n", "\u2581\t\r")
    vocab = "\0".join(backend.get_vocab(with_added_tokens=True))
    if not re.search(rf"[A-Za-z0-9][ {blank}]", vocab):
        yield _Kind(_WORD, 0)
        yield _Kind(_WORD, 1)
    if not re.search(rf"[\n{line}](?![\s{blanks}])[A-Za-z\x80-\U0010ffff]", vocab):
        yield _Kind(_LINE, 0)
