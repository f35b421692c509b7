"""Work of Medusa heads before each step: for whom they guess, and how much. Pure.

The heads guess from the hidden state of the row that sampled the last token. The runner has it if that row was in the
last step; else (after a hand-over, a preemption, a step without the sequence) there is no guess for this step. So
nothing is held for a sequence, and nothing is given back.

tokens      | …  | row n-2 | last |  guess 0 | guess 1        row n-2 sampled the last token; head i guesses
hidden           |<-- here        |  head 0  | head 1         the i-th token after it
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from ....core.request import SamplingParams, SequenceKey
from ...plan import History, SequenceStep, StepPlan
from ...sequence import Sequence
from ..draft_model.plan import DraftPlan, DraftResult
from .proposer import HeadsProposer


def proposer_of(sequence: Sequence) -> HeadsProposer | None:
    """The heads' state of a sequence; None: nothing was guessed for it so far."""
    drafting = sequence.drafting
    return drafting.proposer if drafting is not None and isinstance(drafting.proposer, HeadsProposer) else None


class HeadsPlanner:
    """Implements `GuessPlanner` for heads without keys and values."""

    holdings = None

    def __init__(self, num_heads: int) -> None:
        """`num_heads`: most tokens that they guess at once."""
        assert num_heads >= 1, num_heads
        self._num_heads = num_heads
        self._next_step = 0

    def start(self, params: SamplingParams) -> HeadsProposer:
        """Implements `GuessPlanner.start`. They draw as the target does; a grammar rejects what it forbids."""
        return HeadsProposer(replace(params, logprobs=None, prompt_logprobs=None, grammar=None))

    def settle(self, sequence: Sequence) -> None:
        """Implements `GuessPlanner.settle`: a guess leaves nothing behind."""

    def computed(self, sequence: Sequence, step: SequenceStep) -> None:
        """Implements `GuessPlanner.computed`: the runner knows which rows it has."""

    def caught_up(self, num_tokens: int, took_ms: float) -> None:
        """Implements `GuessPlanner.caught_up`: there are no such rows."""

    def plan(self, wishes: Iterable[tuple[Sequence, int]]) -> DraftPlan | None:
        """Implements `GuessPlanner.plan`."""
        steps: list[SequenceStep] = []
        lengths: list[int] = []
        for sequence, wish in wishes:
            proposer = proposer_of(sequence)
            assert proposer is not None, f"{sequence.key} has no state of the heads"
            if not proposer.is_off:
                steps.append(last_row(sequence, proposer.params))
                lengths.append(min(wish, self._num_heads))
        if not steps:
            return None
        self._next_step += 1
        return DraftPlan(StepPlan(self._next_step, ()), StepPlan(self._next_step, tuple(steps)), tuple(lengths))

    def take(self, sequences: Mapping[SequenceKey, Sequence], plan: DraftPlan, result: DraftResult) -> None:
        """Implements `GuessPlanner.take`."""
        for step, guessed in zip(plan.guesses.sequences, result.guesses, strict=True):
            proposer = proposer_of(sequences[step.key])
            assert proposer is not None, f"{step.key} has no state of the heads"
            proposer.is_off = proposer.is_off or step.key in result.unusable
            proposer.guessed = () if proposer.is_off else guessed
            proposer.guessed_after = step.end


def history_of(sequence: Sequence, params: SamplingParams) -> History | None:
    """The ids before a guess, if the draws need them."""
    if not params.needs_history:
        return None
    return History(sequence.prompt_ids, tuple(sequence.tokens[len(sequence.prompt_ids) :]))


def last_row(sequence: Sequence, params: SamplingParams) -> SequenceStep:
    """The last token of a sequence, without blocks: what heads guess after."""
    known = len(sequence.tokens)
    return SequenceStep(
        key=sequence.key,
        start=known - 1,
        token_ids=(sequence.tokens[-1],),
        block_table=(),
        generations=(),
        samples=True,
        params=params,
        num_generated=sequence.num_generated,
        history=history_of(sequence, params),
    )
