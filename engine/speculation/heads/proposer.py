"""What one sequence has of heads: their latest guesses, and blocks of heads with keys and values. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ....core.request import SamplingParams
from ..draft_model.proposer import ModelProposer


@dataclass(slots=True)
class HeadsProposer:
    """Implements `Proposer`: passes on what the heads have guessed for the present tokens."""

    params: SamplingParams  # of their draws
    guessed: tuple[int, ...] = ()
    guessed_after: int = 0  # number of tokens that the guesses follow
    is_off: bool = False  # the heads failed for this sequence: guess no more

    def propose(self, tokens: Sequence[int], most: int) -> tuple[int, ...]:
        """Implements `Proposer.propose`: nothing if the guesses are for other tokens."""
        return self.guessed[:most] if self.guessed_after == len(tokens) else ()


@dataclass(slots=True)
class LayerProposer(ModelProposer):
    """What one sequence has of a head with keys and values. `num_computed` counts the head's rows, not tokens."""

    first: int = 0  # position of the model's row that the head's row 0 was made of
