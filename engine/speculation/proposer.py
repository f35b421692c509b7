"""The seam of what guesses tokens: one proposer per sequence. Pure; knows no model and no step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from ...core.request import SamplingParams, SequenceKey


class Proposer(Protocol):
    """Guesses the next tokens of one sequence. A wrong guess costs time and changes no token."""

    def propose(self, tokens: Sequence[int], most: int) -> tuple[int, ...]:
        """Guess at most `most` tokens after `tokens`, which only grow from call to call. Its cost must be bounded."""
        ...


StartProposer = Callable[[SequenceKey, SamplingParams], Proposer]
"""Makes the proposer of a sequence, at its first decode."""
