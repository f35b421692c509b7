"""Guesses by n-grams: what followed the last tokens when they occurred before, in prompt or output. Pure.

    tokens   … a b c d e …  x b c | ?        the longest earlier match of the end, here "b c": guess d e …

An index holds the places of every run of `least` tokens, those of equal runs linked from the latest back. A lookup
compares a few of them with the end of the sequence and takes the longest match; of equal ones the latest. So a lookup
costs the same however long the sequence is. The index grows by a bounded number of tokens per lookup, at about 130
bytes each. Source: prompt lookup decoding (Saxena 2023); the names of the settings are vLLM's.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

INDEXED_PER_LOOKUP = 256  # tokens: about 50 microseconds
MAX_MATCHES = 16  # that one lookup compares


@dataclass(frozen=True, slots=True)
class NgramLimits:
    """Lengths of the matches: `prompt_lookup_min` and `prompt_lookup_max`."""

    least: int = 2
    most: int = 4

    def __post_init__(self) -> None:
        assert 1 <= self.least <= self.most, self


class NgramProposer:
    """Implements `Proposer` for one sequence."""

    def __init__(self, limits: NgramLimits) -> None:
        self._limits = limits
        self._latest: dict[int, int] = {}  # hash of a run: the place after its latest occurrence
        self._earlier = array("q", [-1] * limits.least)  # per place: the place after the same run before; -1: none

    def propose(self, tokens: Sequence[int], most: int) -> tuple[int, ...]:
        """Implements `Proposer.propose`. Empty if the end of `tokens` did not occur before."""
        self._index(tokens)
        place = self._longest_match(tokens)
        if place is None or most <= 0:
            return ()
        guessed = list(tokens[place : place + most])
        period = len(tokens) - place
        while len(guessed) < most:  # the match reaches the end: the text repeats itself with this period
            guessed.append(guessed[-period])
        return tuple(guessed)

    def _index(self, tokens: Sequence[int]) -> None:
        """Add the runs that end before the last token: a match must have a token after it."""
        least, latest, earlier = self._limits.least, self._latest, self._earlier
        for place in range(len(earlier), min(len(tokens), len(earlier) + INDEXED_PER_LOOKUP)):
            run = hash(tuple(tokens[place - least : place]))
            earlier.append(latest.get(run, -1))
            latest[run] = place

    def _longest_match(self, tokens: Sequence[int]) -> int | None:
        """Place after the longest earlier occurrence of the last tokens."""
        least, most = self._limits.least, self._limits.most
        if len(tokens) < least:
            return None
        place = self._latest.get(hash(tuple(tokens[-least:])), -1)
        found, longest = None, least - 1
        for _ in range(MAX_MATCHES):
            if place < 0:
                break
            length = 0  # two runs may have one hash
            while length < min(most, place) and tokens[place - 1 - length] == tokens[-1 - length]:
                length += 1
            if length > longest:
                found, longest = place, length
                if length == most:
                    break
            place = self._earlier[place]
        return found
