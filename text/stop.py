"""Ends a text at its first stop string, independent of token boundaries. Knows characters; stream.py adds tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..core.errors import InvalidRequest


class StopPiece(NamedTuple):
    """Text that pushed characters add to the text visible to the client."""

    text: str
    is_stopped: bool


class StopText:
    """Filter that passes text up to the first stop string, and withholds text that may be the beginning of one.

    The first stop string is the one that is complete first; of several complete at the same character the longest.
    So the result does not depend on how the text was cut into pieces.
    """

    def __init__(self, stop: Sequence[str], *, is_included: bool = False) -> None:
        """Search for any of `stop`; if it is empty, all text passes. `is_included`: the stop string stays in the text.

        Raises:
            InvalidRequest: a stop string is empty.
        """
        if not all(stop):
            raise InvalidRequest("stop holds an empty string; leave it out, or give the text to stop at", param="stop")
        self._stop = tuple(stop)
        self._is_included = is_included
        self._held = ""  # withheld text: a proper prefix of a stop string, or empty
        self.is_stopped = False
        self.num_included = 0  # length of the stop string that was left in the text

    def push(self, text: str, *, may_stop: bool = True) -> StopPiece:
        """Add `text`, and return the visible part. After a stop nothing is visible. Without `may_stop`, all is text."""
        if self.is_stopped or not text:
            return StopPiece("", self.is_stopped)
        seen = self._held + text
        ends = self._ends(seen, len(self._held)) if may_stop else []
        if ends:
            self.is_stopped = True
            self._held = ""
            end, start = min(ends)
            self.num_included = end - start if self._is_included else 0
            return StopPiece(seen[: start + self.num_included], True)
        keep = max((_overlap(seen, stop) for stop in self._stop), default=0)
        self._held = seen[len(seen) - keep :]
        return StopPiece(seen[: len(seen) - keep], False)

    def flush(self, text: str = "", *, may_stop: bool = True) -> str:
        """End the text with its last piece `text`. Returns this and withheld text, up to a stop string."""
        piece = self.push(text, may_stop=may_stop)
        held, self._held = self._held, ""
        return piece.text + held

    def _ends(self, seen: str, num_old: int) -> list[tuple[int, int]]:
        """(end, start) of each stop string's first match that ends after the first `num_old` characters."""
        found = ((stop, seen.find(stop, max(0, num_old - len(stop) + 1))) for stop in self._stop)
        return [(place + len(stop), place) for stop, place in found if place >= 0]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of `stop` that is a suffix of `text`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
