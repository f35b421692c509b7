"""Where a long text can be cut so that its tokens are those of its pieces, one after the other. Knows no request.

    text    … the quick brown│ fox jumps …          a blank between a letter or digit and a letter
            … end of line.\\n│Next line …            behind a single line break, before a letter
    pieces  [16 Ki characters] [16 Ki characters] …

Every vocabulary in use cuts words there before any merge. That is not believed but looked at: a kind of place counts
only where no token of the vocabulary reaches across it and samples have the same tokens cut and uncut; and at each cut
of a text its surroundings are tokenised both ways. A tokenizer without such places takes every text as a whole.
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
MAX_UNCUT_CHARS = 262_144  # without one place to cut; of a tokenizer that has such places
_WINDOW_CHARS = 64  # on each side of a cut, tokenised both ways
_MAX_TRIES = 4  # places in the latter half of one piece

_BYTE_BLANK, _BYTE_LINE = "\u0120", "\u010a"  # how byte-level vocabularies spell a space and a line break
_BYTE_BLANKS = "\u0120\u010a\u0109\u010d"


class Piece(NamedTuple):
    """A part of a text that is tokenised by itself."""

    start: int  # character of the whole text
    text: str


@dataclass(frozen=True, slots=True)
class _Kind:
    """One kind of place: the next piece begins `num_dropped` characters behind the cut."""

    places: re.Pattern[str]  # empty matches, at the cut
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
    """The places to cut that hold for one tokenizer."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._kinds = tuple(kind for kind in _kinds(backend) if self._holds(kind))

    def pieces(self, text: str) -> Iterator[Piece]:
        """The text in pieces, the next one found when it is asked for. A piece is long where no place was found.

        Raises:
            InvalidRequest: this tokenizer's texts can be cut, but one stretch of this text cannot, and it is too long.
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
        """Where the piece from `start` ends and the next one begins; None: the rest is one piece."""
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
    """Whether a text is cut, where it can be."""
    return len(text) > PIECE_CHARS


def encode_all(backend: tokenizers.Tokenizer, texts: list[str], add_special_tokens: bool) -> list[tokenizers.Encoding]:
    """Ids only, without offsets. Lets other threads run meanwhile, which `encode` would not.

    What it keeps of each token is a third of what an encoding with offsets is, and quicker to give back.
    """
    found: list[tokenizers.Encoding] = backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
    return found


def _kinds(backend: tokenizers.Tokenizer) -> Iterator[_Kind]:
    """Those that no token reaches across. A space is dropped where a tokenizer puts one before every text."""
    spelt = is_byte_level(backend)
    blank, line, blanks = (_BYTE_BLANK, _BYTE_LINE, _BYTE_BLANKS) if spelt else ("\u2581", "\n", "\u2581\t\r")
    vocab = "\0".join(backend.get_vocab(with_added_tokens=True))
    if not re.search(rf"[A-Za-z0-9][ {blank}]", vocab):
        yield _Kind(_WORD, 0)
        yield _Kind(_WORD, 1)
    if not re.search(rf"[\n{line}](?![\s{blanks}])[A-Za-z\x80-\U0010ffff]", vocab):
        yield _Kind(_LINE, 0)
