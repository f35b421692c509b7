"""Tokens that are forbidden now because they would complete a bad word. Knows ids, no logits."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

_TYPE = "i"  # 4 bytes per id, so that runs of ids are compared as bytes


class WordIndex:
    """Index of bad words by their second-to-last token: a step checks only words with the output's last token there."""

    def __init__(self, words: Sequence[tuple[int, ...]]) -> None:
        """`words`: token ids of each word, at least one."""
        self._always = [word[0] for word in words if len(word) == 1]
        self._longest = max((len(word) - 1 for word in words), default=0)
        self._begun_by: dict[int, list[tuple[bytes, int]]] = {}  # (all but the last token, the last token)
        for word in words:
            if len(word) > 1:
                beginning = array(_TYPE, word[:-1]).tobytes()
                self._begun_by.setdefault(word[-2], []).append((beginning, word[-1]))

    def forbidden(self, output_ids: tuple[int, ...]) -> list[int]:
        """Last tokens of all words whose other tokens are the end of the output."""
        begun = self._begun_by.get(output_ids[-1]) if output_ids else None
        if begun is None:
            return self._always
        said = array(_TYPE, output_ids[-self._longest :]).tobytes()
        return self._always + [last for beginning, last in begun if said.endswith(beginning)]
