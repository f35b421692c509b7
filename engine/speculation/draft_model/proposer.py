"""What one sequence has of the draft model: its blocks, how many tokens they cover, and the latest guesses. Pure.

    tokens  | computed by the draft model | not yet | last |          before a guess of k tokens
    tokens  | computed …                           … | g0 … gk-2 | gk-1          after it
    KV      |<------------- num_computed ------------>|<- k-1 -->|               counts as far as the guesses are right

A rollback is a number: `settle` compares the guesses with the tokens that came, whatever became of the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ....core.request import SamplingParams
from ....kv.block import BlockId


@dataclass(slots=True)
class ModelProposer:
    """Implements `Proposer`: passes on what the draft model has guessed for the present tokens."""

    params: SamplingParams  # of its draws
    blocks: list[BlockId] = field(default_factory=list)  # of the draft model's pool, owned, in order
    num_computed: int = 0  # leading tokens of the sequence whose KV is in `blocks`
    num_published: int = 0  # leading blocks that later sequences can find
    guessed: tuple[int, ...] = ()
    guessed_after: int = 0  # number of tokens that the guesses follow
    is_off: bool = False  # its KV was not finite, or its tokens are not the draft model's: guess no more

    def propose(self, tokens: Sequence[int], most: int) -> tuple[int, ...]:
        """Implements `Proposer.propose`: nothing if the guesses are for other tokens."""
        return self.guessed[:most] if self.guessed_after == len(tokens) else ()

    def settle(self, tokens: Sequence[int]) -> None:
        """Count the KV of the guesses that came true, once `tokens` have grown."""
        if not self.guessed or len(tokens) <= self.guessed_after:
            return
        came = tokens[self.guessed_after :]
        num_right = 0
        while num_right < min(len(self.guessed), len(came)) and self.guessed[num_right] == came[num_right]:
            num_right += 1
        # The KV of the last guess is not computed. One token must be left to guess from.
        num_right = min(num_right, len(self.guessed) - 1, len(came) - 1)
        self.num_computed = self.guessed_after + num_right
        self.guessed = ()
