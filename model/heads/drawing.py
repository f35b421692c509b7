"""Draws guesses from logits as the target draws tokens: same filters, penalties and noise. Knows no head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ...engine.plan import SequenceStep
from ..sampling.sampler import Draw, Sampled, Sampler


@dataclass(slots=True)
class Guess:
    """Guesses of one sequence as they grow."""

    step: SequenceStep  # its last rows before the guesses
    most: int
    ids: tuple[int, ...] = ()
    is_over: bool = False  # nothing more can be drawn, or the next token would end the text

    @property
    def wants_more(self) -> bool:
        """True if one more token is to be guessed."""
        return not self.is_over and len(self.ids) < self.most

    def draw(self) -> Draw:
        """Parameters of the next token, after the guesses so far."""
        history = self.step.history
        if history is not None and self.ids:
            history = history._replace(output_ids=history.output_ids + self.ids)
        return Draw(self.step.params, self.step.key.choice, self.step.num_generated + len(self.ids), None, history)


class GuessDrawer:
    """Draws one token for each of several sequences."""

    def __init__(self, sampler: Sampler, end_ids: Sequence[int], token_ids: Tensor | None, vocab_size: int) -> None:
        """`token_ids` [rows] int64 on the CPU: the token of each column of the logits; None: the column's number."""
        self._sampler = sampler
        self._ends = frozenset(end_ids)
        self._token_ids, self._vocab_size = token_ids, vocab_size

    def add(self, guesses: Sequence[Guess], logits: Tensor) -> None:
        """Add a token to each guess, from logits [>= len(guesses), columns] float32. Ends those that have no more.

        A token that would end the text is not guessed, because no row behind it is needed.
        """
        rows = logits[: len(guesses)].cpu()
        if self._token_ids is not None:
            whole = rows.new_full((len(rows), self._vocab_size), _NEVER)
            whole[:, self._token_ids] = rows
            rows = whole
        outcomes = self._sampler.sample(rows.contiguous().numpy(), [guess.draw() for guess in guesses])
        for guess, outcome in zip(guesses, outcomes, strict=True):
            if isinstance(outcome, Sampled) and not self._ends_text(guess.step, outcome.token_id):
                guess.ids += (outcome.token_id,)
            else:
                guess.is_over = True

    def _ends_text(self, step: SequenceStep, token_id: int) -> bool:
        params = step.params
        return token_id in params.stop_token_ids or (token_id in self._ends and not params.ignore_eos)


_NEVER = -1e30  # logit of a token that the heads do not have: finite, because the sampler refuses infinity
