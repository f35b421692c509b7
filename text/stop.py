"""Ends a text at a stop string, wherever token edges fall. Knows characters; `TextStream` joins it to tokens."""

from __future__ import annotations

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

    def __init__(self, stop: Sequence[str]) -> None:
        """Watch for any of `stop`; none: lets everything through.

        Raises:
            InvalidRequest: a stop string is empty.
        """
        if not all(stop):
            raise InvalidRequest("stop holds an empty string; leave it out, or give the text to stop at", param="stop")
        self._stop = tuple(stop)
        self._held = ""  # a proper beginning of some stop string, or nothing
        self.is_stopped = False

    def push(self, text: str) -> StopPiece:
        """What `text` adds. Once stopped, nothing."""
        if self.is_stopped or not text:
            return StopPiece("", self.is_stopped)
        seen = self._held + text
        ends = [(place + len(stop), place) for stop in self._stop if (place := seen.find(stop)) >= 0]
        if ends:
            self.is_stopped = True
            self._held = ""
            return StopPiece(seen[: min(ends)[1]], True)
        keep = max((_overlap(seen, stop) for stop in self._stop), default=0)
        self._held = seen[len(seen) - keep :]
        return StopPiece(seen[: len(seen) - keep], False)

    def flush(self, text: str = "") -> str:
        """The text is over, `text` being its last piece: gives that and what was withheld, up to a stop string."""
        piece = self.push(text)
        held, self._held = self._held, ""
        return piece.text + held


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
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), skip_special_tokens: bool = True) -> None:
        """Start an empty text. Raises what `IncrementalText` and `StopText` raise."""
        self._text = IncrementalText(tokenizer, skip_special_tokens)
        self._stop = StopText(stop)

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
            parts.append(self._stop.push(self._text.push((id_,))).text)
        return TextPiece("".join(parts), len(ids), self._stop.is_stopped)

    def flush(self) -> str:
        """The choice ended for another reason: the text that was withheld."""
        return "" if self._stop.is_stopped else self._stop.flush(self._text.flush())
