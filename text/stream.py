"""Text of a token stream, ended by stop strings, with the number of tokens shown. Knows no request and no clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from ..core.errors import InvalidRequest
from .incremental import IncrementalText
from .stop import StopText
from .tokenizer import Tokenizer

_FIRST_MARK, _MAX_MARKS = 0xD800, 0x800  # lone surrogates, which no valid text contains


class TextPiece(NamedTuple):
    """Text that pushed tokens add to the text visible to the client."""

    text: str
    num_tokens: int  # pushed tokens that belong to the text; fewer than pushed only after a stop
    is_stopped: bool


class TextStream:
    """Text of one choice, token by token, ended by stop strings.

    The state is a function of the pushed ids only: after a worker is lost, pushing them again on another restores it.

        text    | out already | withheld: perhaps a stop string | not settled: a character's first bytes |
        tokens  |  num_shown  |<------------------ to be shown, or to be cut ---------------------------->|

    A special token gives no text, but a stop string may contain it. Internally it is then one placeholder character (a
    mark), and it ends an incomplete character. Clients see it only in an included stop string.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        skip_special_tokens: bool = True,
        *,
        min_tokens: int = 0,
        include_stop: bool = False,
        prompt_ids: Sequence[int] = (),
    ) -> None:
        """Start an empty text after a prompt. Stop strings that are complete within `min_tokens` tokens are ignored.

        Raises the errors of `IncrementalText` and `StopText`.
        """
        self._text = IncrementalText(tokenizer, skip_special_tokens, prompt_ids)
        self._marks = _Marks(tokenizer, stop if skip_special_tokens else ())
        self._stop = StopText([*stop, *self._marks.stop], is_included=include_stop)
        self._min_tokens = min_tokens
        self._num_pushed = 0
        self.num_shown = 0  # leading tokens whose text is shown; after a stop also a partly shown one
        self._num_settled_chars = 0
        self._num_out_chars = 0
        self._num_unsettled = 0  # tokens whose text is incomplete
        self._spans: deque[tuple[int, int]] = deque()  # text [start, end) of complete tokens that are not shown

    @property
    def is_stopped(self) -> bool:
        """True after a stop string; further tokens do not count."""
        return self._stop.is_stopped

    def may_stop_at(self, token_id: int) -> bool:
        """Return whether a stop string contains this special token."""
        return token_id in self._marks.by_id

    def push(self, ids: Sequence[int]) -> TextPiece:
        """Add `ids`. The token that completes a stop string still counts, later ones do not."""
        parts: list[str] = []
        for place, id_ in enumerate(ids):
            if self._stop.is_stopped:
                return TextPiece("".join(parts), place, True)
            self._num_pushed += 1
            self._num_unsettled += 1
            mark = self._marks.by_id.get(id_)
            text = self._text.push((id_,)) if mark is None else self._text.flush() + mark
            out = self._stop.push(text, may_stop=self._num_pushed > self._min_tokens).text
            if text:
                self._settle(len(text))
            self._show(len(out))
            parts.append(self._marks.seen(out, self._stop.num_included))
        return TextPiece("".join(parts), len(ids), self._stop.is_stopped)

    def flush(self) -> str:
        """Return the withheld text, when the choice ended without a stop string."""
        if self._stop.is_stopped:
            return ""
        text = self._text.flush()
        out = self._stop.flush(text, may_stop=self._num_pushed > self._min_tokens)
        self._settle(len(text))
        self._show(len(out))
        return self._marks.seen(out, self._stop.num_included)

    def _settle(self, num_chars: int) -> None:
        """Give all waiting tokens the next `num_chars` characters as their common text."""
        start = self._num_settled_chars
        self._num_settled_chars += num_chars
        self._spans.extend([(start, self._num_settled_chars)] * self._num_unsettled)
        self._num_unsettled = 0

    def _show(self, num_chars: int) -> None:
        self._num_out_chars += num_chars
        out = self._num_out_chars
        while self._spans and (self._spans[0][1] <= out or (self._stop.is_stopped and self._spans[0][0] < out)):
            self._spans.popleft()
            self.num_shown += 1


class _Marks:
    """Placeholder characters of the special tokens that stop strings contain."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        words = dict.fromkeys(word for text in stop for word in tokenizer.special_words.findall(text))
        if len(words) > _MAX_MARKS:
            raise InvalidRequest(f"stop names {len(words)} special tokens; at most {_MAX_MARKS}", param="stop")
        mark_by_word = {word: chr(_FIRST_MARK + place) for place, word in enumerate(words)}
        self._word_by_mark = {ord(mark): word for word, mark in mark_by_word.items()}
        self._no_word = dict.fromkeys(self._word_by_mark)
        ids = {word: tokenizer.backend.token_to_id(word) for word in words}
        self.by_id = {ids[word]: mark for word, mark in mark_by_word.items()}
        marked = (tokenizer.special_words.sub(lambda found: mark_by_word[found.group()], text) for text in stop)
        self.stop = [text for text, plain in zip(marked, stop, strict=True) if text != plain] if words else []

    def seen(self, text: str, num_included: int) -> str:
        """Text for the client: marks are removed, and written out in the included stop string at its end."""
        if not self.by_id:
            return text
        start = len(text) - num_included
        return text[:start].translate(self._no_word) + text[start:].translate(self._word_by_mark)
