"""Ends a text at a stop string, wherever token edges fall. Knows characters; text/stream.py joins it to tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..core.errors import InvalidRequest


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
        self.num_included = 0  # characters of the stop string that the text ends with

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
            self.num_included = end - start if self._is_included else 0
            return StopPiece(seen[: start + self.num_included], True)
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
