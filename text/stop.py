"""Ends a text at a stop string, wherever token edges fall. Knows characters; `TextStream` joins it to tokens."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from ..core.errors import InvalidRequest
from .incremental import IncrementalText
from .tokenizer import Tokenizer


class StopPiece(NamedTuple):
    """What some characters add to the text that a client may see."""

    text: str
    is_stopped: bool


class StopText:
    """Lets text through up to the first stop string, and withholds whatever may be the beginning of one.

    The first stop string is the one that is complete first; of several complete at the same character, the longest.
    So the result does not depend on how the text was cut into pieces.
    """

    def __init__(self, stop: Sequence[str], *, is_included: bool = False) -> None:
        """Watch for any of `stop`; none: lets everything through. `is_included`: the text ends with the stop string.

        Raises:
            InvalidRequest: a stop string is empty.
        """
        if not all(stop):
            raise InvalidRequest("stop holds an empty string; leave it out, or give the text to stop at", param="stop")
        self._stop = tuple(stop)
        self._is_included = is_included
        self._held = ""  # a proper beginning of some stop string, or nothing
        self.is_stopped = False

    def push(self, text: str, *, may_stop: bool = True) -> StopPiece:
        """What `text` adds. Once stopped, nothing. A stop string that is complete while it may not stop is text."""
        if self.is_stopped or not text:
            return StopPiece("", self.is_stopped)
        seen = self._held + text
        ends = self._ends(seen, len(self._held)) if may_stop else []
        if ends:
            self.is_stopped = True
            self._held = ""
            end, start = min(ends)
            return StopPiece(seen[: end if self._is_included else start], True)
        keep = max((_overlap(seen, stop) for stop in self._stop), default=0)
        self._held = seen[len(seen) - keep :]
        return StopPiece(seen[: len(seen) - keep], False)

    def flush(self, text: str = "", *, may_stop: bool = True) -> str:
        """The text is over, `text` being its last piece: gives that and what was withheld, up to a stop string."""
        piece = self.push(text, may_stop=may_stop)
        held, self._held = self._held, ""
        return piece.text + held

    def _ends(self, seen: str, num_old: int) -> list[tuple[int, int]]:
        """End and start of the first of each stop string that is complete behind the first `num_old` characters."""
        found = ((stop, seen.find(stop, max(0, num_old - len(stop) + 1))) for stop in self._stop)
        return [(place + len(stop), place) for stop, place in found if place >= 0]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper beginning of `stop` that `text` ends with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


class TextPiece(NamedTuple):
    """What some tokens add to the text that a client may see."""

    text: str
    num_tokens: int  # of those pushed, how many belong to the text; fewer only when it is stopped
    is_stopped: bool


class TextStream:
    """The text of one choice, token by token: incremental, ended by stop strings.

    A function of the pushed ids alone: after a worker is lost, pushing them again to a new one restores it.

        text    | out already | withheld: perhaps a stop string | not settled: a character's first bytes |
        tokens  |  num_shown  |<------------------ to be shown, or to be cut ---------------------------->|
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        skip_special_tokens: bool = True,
        *,
        min_tokens: int = 0,
        include_stop: bool = False,
    ) -> None:
        """Start an empty text. Stop strings complete within the first `min_tokens` tokens do not stop it.

        Raises what `IncrementalText` and `StopText` raise.
        """
        self._text = IncrementalText(tokenizer, skip_special_tokens)
        self._stop = StopText(stop, is_included=include_stop)
        self._min_tokens = min_tokens
        self._num_pushed = 0
        self.num_shown = 0  # leading tokens whose text is out; of a stopped text also the one that was cut within
        self._num_settled_chars = 0
        self._num_out_chars = 0
        self._num_unsettled = 0  # tokens whose text is not known yet
        self._spans: deque[tuple[int, int]] = deque()  # start and end of the text of settled tokens that are not shown

    @property
    def is_stopped(self) -> bool:
        """A stop string was seen; further tokens do not count."""
        return self._stop.is_stopped

    def push(self, ids: Sequence[int]) -> TextPiece:
        """What `ids` add. The token that completes a stop string still counts, those behind it do not."""
        parts: list[str] = []
        for place, id_ in enumerate(ids):
            if self._stop.is_stopped:
                return TextPiece("".join(parts), place, True)
            self._num_pushed += 1
            self._num_unsettled += 1
            text = self._text.push((id_,))
            out = self._stop.push(text, may_stop=self._num_pushed > self._min_tokens).text
            if text:
                self._settle(len(text))
            self._show(len(out))
            parts.append(out)
        return TextPiece("".join(parts), len(ids), self._stop.is_stopped)

    def flush(self) -> str:
        """The choice ended for another reason: the text that was withheld."""
        if self._stop.is_stopped:
            return ""
        text = self._text.flush()
        out = self._stop.flush(text, may_stop=self._num_pushed > self._min_tokens)
        self._settle(len(text))
        self._show(len(out))
        return out

    def _settle(self, num_chars: int) -> None:
        """The tokens that waited make up the next characters, together: which byte is whose is not asked."""
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
