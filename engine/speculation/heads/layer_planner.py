"""Work of a head with keys and values (EAGLE-3, MTP) before each step: rows that it computes, and guesses. Pure.

The head's row for position p takes the model's hidden state of p and the token p + 1. The runner has hidden states of
the last step only, so after each step the head computes what that step computed: chunks of prompts too.

positions   | … not here … | first …            | p = n-2 |          n tokens are known; guesses follow the last row
head's rows                | 0 …  num_computed  |  new …  | 1 row per guess but the last
tokens                     | first+1 …          |   n-1   | guess 0 …

Rows before `first` were computed elsewhere, before a preemption, or are cached: the head attends from `first` on, and
its rows count from there, because rotary positions are relative. A gap begins anew. Rows of guesses are computed again
from the model's hidden states, so a rollback needs nothing. A sequence without room in the pool gets no guess.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

from ....core.request import SamplingParams, SequenceKey
from ...link.messages import Source
from ...plan import SequenceStep, StepPlan
from ...sequence import Sequence, SequenceState
from ..draft_model.holdings import DraftHoldings
from ..draft_model.plan import DraftPlan, DraftResult
from .planner import history_of
from .proposer import LayerProposer

_RUNNING = (SequenceState.PREFILLING, SequenceState.DECODING)


class _Rows(NamedTuple):
    """Positions [start, end) of a sequence that the last step computed."""

    sequence: Sequence
    start: int
    end: int


def proposer_of(sequence: Sequence) -> LayerProposer | None:
    """The head's state of a sequence; None: no step was noted for it so far."""
    drafting = sequence.drafting
    return drafting.proposer if drafting is not None and isinstance(drafting.proposer, LayerProposer) else None


class LayerPlanner:
    """Implements `GuessPlanner` for a head with keys and values."""

    def __init__(self, max_rows: int, holdings: DraftHoldings) -> None:
        """`max_rows`: of one sequence. `holdings`: without prefixes, whose rows would need a token more."""
        assert not holdings.prefix.enabled, "the head's blocks are not findable"
        self.holdings = holdings
        self._max_rows = max_rows
        self._computed: dict[SequenceKey, _Rows] = {}
        self._next_step = 0

    def start(self, params: SamplingParams) -> LayerProposer:
        """Implements `GuessPlanner.start`. It draws as the target does; a grammar rejects what it forbids."""
        return LayerProposer(replace(params, logprobs=None, prompt_logprobs=None, grammar=None))

    def settle(self, sequence: Sequence) -> None:
        """Implements `GuessPlanner.settle`: rows of guesses are computed again."""

    def caught_up(self, num_tokens: int, took_ms: float) -> None:
        """Implements `GuessPlanner.caught_up`: the rows are those of the model's step, which bounds them."""

    def computed(self, sequence: Sequence, step: SequenceStep) -> None:
        """Implements `GuessPlanner.computed`: the head's rows follow before the next step."""
        end = min(sequence.num_computed, len(sequence.tokens) - 1)
        if sequence.source is not Source.FOR_PEER and end > step.start:
            self._computed[sequence.key] = _Rows(sequence, step.start, end)

    def plan(self, wishes: Iterable[tuple[Sequence, int]]) -> DraftPlan | None:
        """Implements `GuessPlanner.plan`."""
        most_by_key = {sequence.key: most for sequence, most in wishes}
        rows, self._computed = self._computed, {}
        chunks: list[SequenceStep] = []
        guesses: list[SequenceStep] = []
        lengths: list[int] = []
        ahead: dict[SequenceKey, int] = {}
        for key, each in rows.items():
            proposer = proposer_of(each.sequence)
            assert proposer is not None, f"{key} has no state of the head"
            if proposer.is_off or each.sequence.state not in _RUNNING:
                continue
            self._begin(each, proposer)
            count = each.end - proposer.first
            most = 0
            if each.end == len(each.sequence.tokens) - 1:
                most = min(most_by_key.get(key, 0), self._max_rows - count + 1)  # the last guess takes no row
            if count > self._max_rows or not self.holdings.covers(proposer, count + max(most - 1, 0)):
                self.holdings.release(each.sequence)
                continue
            ahead[key] = proposer.first
            if most > 0:
                guesses.append(self._step(each, proposer, count + most - 1))
                lengths.append(most)
            else:
                chunks.append(self._step(each, proposer, count))
        if not chunks and not guesses:
            return None
        self._next_step += 2
        step = self._next_step
        return DraftPlan(
            StepPlan(step - 1, tuple(chunks)),
            StepPlan(step, tuple(guesses)),
            tuple(lengths),
            tuple([ahead[one.key] for one in (*chunks, *guesses)]),
        )

    def take(self, sequences: Mapping[SequenceKey, Sequence], plan: DraftPlan, result: DraftResult) -> None:
        """Implements `GuessPlanner.take`."""
        for step in plan.catch_up.sequences:
            self._take(sequences[step.key], step, result)
        for step, guessed in zip(plan.guesses.sequences, result.guesses, strict=True):
            proposer = self._take(sequences[step.key], step, result)
            proposer.guessed = () if proposer.is_off else guessed
            proposer.guessed_after = proposer.first + step.end + 1

    def _take(self, sequence: Sequence, step: SequenceStep, result: DraftResult) -> LayerProposer:
        proposer = proposer_of(sequence)
        assert proposer is not None, f"{step.key} has no state of the head"
        if step.key in result.unusable:
            self.holdings.release(sequence)
            proposer.is_off = True
        else:
            proposer.num_computed = step.end
        return proposer

    def _begin(self, rows: _Rows, proposer: LayerProposer) -> None:
        """Let the rows follow those that the head has; after a gap, begin with them."""
        if proposer.num_computed == 0 or proposer.first + proposer.num_computed != rows.start:
            self.holdings.release(rows.sequence)
            proposer.first = rows.start

    def _step(self, rows: _Rows, proposer: LayerProposer, covered: int) -> SequenceStep:
        """The head's new rows of a sequence, with blocks up to `covered` rows."""
        sequence, pool = rows.sequence, self.holdings.pool
        blocks = tuple(proposer.blocks[: -(-covered // pool.block_tokens)])
        samples = rows.end == len(sequence.tokens) - 1
        return SequenceStep(
            key=sequence.key,
            start=rows.start - proposer.first,
            token_ids=tuple(sequence.tokens[rows.start + 1 : rows.end + 1]),
            block_table=blocks,
            generations=tuple([pool.generation(block) for block in blocks]),
            samples=samples,
            params=proposer.params,
            num_generated=sequence.num_generated,
            history=history_of(sequence, proposer.params) if samples else None,
        )
