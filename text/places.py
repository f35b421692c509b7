"""Where in a text its tokens begin, counted in characters. Knows no request; incremental.py makes the text.

A token is where the character is that holds its first byte. So the tokens of one character are all at that character,
whichever begins or completes it. A token without text is where the next text begins.
"""

from __future__ import annotations

from collections.abc import Sequence

from .incremental import IncrementalText
from .tokenizer import Tokenizer


class TokenPlaces:
    """The places of one text's tokens, in their order."""

    def __init__(
        self, tokenizer: Tokenizer, skip_special_tokens: bool = True, prompt_ids: Sequence[int] = (), start: int = 0
    ) -> None:
        """The text begins at `start`, and goes on from `prompt_ids`."""
        self._byte_by_id = tokenizer.byte_by_id
        self._text = IncrementalText(tokenizer, skip_special_tokens, prompt_ids)
        self._at = start  # where the next text begins

    def of(self, ids: Sequence[int]) -> list[int]:
        """The places of the next tokens. The last may be within a character only if no more follow."""
        places: list[int] = []
        run: list[int] = []  # of byte tokens without an end yet: where they are in `places`
        for id_ in ids:
            if id_ in self._byte_by_id:
                run.append(len(places))
            elif run and self._text.gives_text(id_):
                self._end_run(places, run)
            places.append(self._at + self._text.breaks(id_))
            self._at += len(self._text.push([id_]))
        if run:
            self._end_run(places, run)
        return places

    def _end_run(self, places: list[int], run: list[int]) -> None:
        """Place the byte tokens of a run, and what has no text among them. Empties `run`."""
        text = self._text.flush()
        within = _byte_places(text, len(run))
        next_place = self._at + len(text)
        for place in range(len(places) - 1, run[0] - 1, -1):
            if place == run[-1]:
                run.pop()
                next_place = self._at + within[len(run)]
            places[place] = next_place
        self._at += len(text)


def _byte_places(text: str, num_bytes: int) -> list[int]:
    """At which characters of `text` its last bytes are; a prompt may have brought the first ones."""
    if text == "\ufffd" * num_bytes:  # a broken run: each byte shows
        return list(range(num_bytes))
    places = [place for place, character in enumerate(text) for _ in character.encode()]
    return [0] * (num_bytes - len(places)) + places[max(0, len(places) - num_bytes) :]
