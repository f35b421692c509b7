"""Guessing for one sequence: its proposer, the length of its guesses, and what became of them. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .length import DraftLength
from .proposer import Proposer


@dataclass(slots=True)
class Drafting:
    """Guessing state of one sequence; lost with it, and made anew elsewhere, because it changes no token."""

    proposer: Proposer
    length: DraftLength
    name: str = ""  # of the proposer, for counters and reports
    num_drafted: int = 0  # guessed tokens that a step has judged
    num_accepted: int = 0
    num_under_way: int = 0  # guessed tokens of the running step

    def propose(self, tokens: Sequence[int], num_generated: int, most: int) -> tuple[int, ...]:
        """Guess at most `most` tokens after `tokens`."""
        most = min(most, self.length.at(num_generated))
        guessed = self.proposer.propose(tokens, most) if most > 0 else ()
        self.num_under_way = len(guessed)
        return guessed

    def judge(self, num_drafted: int, num_accepted: int, num_generated: int) -> None:
        """Take the outcome of a guess."""
        self.num_under_way = 0
        self.num_drafted += num_drafted
        self.num_accepted += num_accepted
        self.length.judge(num_drafted, num_accepted, num_generated)
