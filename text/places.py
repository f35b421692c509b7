"""Places of tokens in their text, in characters. Knows no request; incremental.py makes the text.

The place of a token is that of the character with its first byte. So all tokens of one character have the place of this
character. The place of a token without text is the start of the next text.
"""

from __future__ import annotations

from collections.abc import Sequence

from .incremental import IncrementalText
from .tokenizer import Tokenizer


class TokenPlaces:
    """Places of the tokens of one text, in their order."""

    def __init__(
        self, tokenizer: Tokenizer, skip_special_tokens: bool = True, prompt_ids: Sequence[int] = (), start: int = 0
    ) -> None:
        """The text follows `prompt_ids`; its first character has the number `start`."""
        self._byte_by_id = tokenizer.byte_by_id
        self._text = IncrementalText(tokenizer, skip_special_tokens, prompt_ids)
        self._at = start  # place of the next text

    def of(self, ids: Sequence[int]) -> list[int]:
        """Places of the next tokens. Only the text's last tokens may end within a character."""
        places: list[int] = []
        run: list[int] = []  # indices in `places` of the byte tokens of an unfinished run
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
        """Set the places of a run's byte tokens, and of tokens without text among them. Empties `run`."""
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
    """Characters of `text` that hold its last `num_bytes` bytes; earlier bytes may come from the prompt."""
    if text == "\ufffd" * num_bytes:  # a broken run: each byte is one character
        return list(range(num_bytes))
    places = [place for place, character in enumerate(text) for _ in character.encode()]
    return [0] * (num_bytes - len(places)) + places[max(0, len(places) - num_bytes) :]
