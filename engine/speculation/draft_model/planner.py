"""Work of the draft model before each step: whose KV it computes, and for whom it guesses. Pure.

Sequences come in the order of their rank. One that lags by more than `DIRECT_TOKENS` catches up in chunks first, and
gets no guess meanwhile; what is less is computed in the call that guesses. Of sequences that lack the same block (the
choices of one prompt) the first computes it, and the others find it afterwards. A sequence without room in the draft
model's pool or context gets no guess.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import takewhile

from ....core.request import SamplingParams, SequenceKey
from ....kv.block import BlockIdentity
from ....kv.spec import HASH_BLOCK_TOKENS
from ...plan import History, SequenceStep, StepPlan
from ...sequence import Sequence
from .catch_up import CatchUp
from .holdings import DraftHoldings, proposer_of
from .plan import DraftPlan, DraftResult
from .proposer import ModelProposer

DIRECT_TOKENS = 8


@dataclass(frozen=True, slots=True)
class DraftBounds:
    """Bounds that come with the draft model."""

    max_model_len: int  # tokens of its context
    vocab_size: int  # ids below are known to both models


class DraftPlanner:
    """Implements `GuessPlanner`: plans the draft model's work for all sequences of one engine."""

    def __init__(self, bounds: DraftBounds, holdings: DraftHoldings, catch_up: CatchUp) -> None:
        self.holdings = holdings
        self.catch_up = catch_up
        self._bounds = bounds
        self._next_step = 0

    def start(self, params: SamplingParams) -> ModelProposer:
        """The state of a new sequence. It draws as the target does, with the same noise, but needs no logprobs.

        A grammar is not asked: what it forbids is rejected.
        """
        return ModelProposer(replace(params, logprobs=None, prompt_logprobs=None, grammar=None))

    def settle(self, sequence: Sequence) -> None:
        """Take note of the tokens that came since the last guess."""
        proposer = proposer_of(sequence)
        if proposer is not None:
            proposer.settle(sequence.tokens)
            self.holdings.publish(sequence, proposer)

    def computed(self, sequence: Sequence, step: SequenceStep) -> None:
        """Implements `GuessPlanner.computed`: a draft model needs no rows of the target."""

    def caught_up(self, num_tokens: int, took_ms: float) -> None:
        """Implements `GuessPlanner.caught_up`: it bounds the next chunks."""
        self.catch_up.observe(num_tokens, took_ms)

    def plan(self, wishes: Iterable[tuple[Sequence, int]]) -> DraftPlan | None:
        """Plan for sequences and the most tokens to guess for each. None: there is nothing to compute."""
        chunks: list[SequenceStep] = []
        guesses: list[SequenceStep] = []
        lengths: list[int] = []
        left, begun = self.catch_up.tokens, set[BlockIdentity]()
        for sequence, wish in wishes:
            proposer = proposer_of(sequence)
            assert proposer is not None, f"{sequence.key} has no state of the draft model"
            known = len(sequence.tokens)
            most = min(wish, self._bounds.max_model_len - known + 1)  # the last guess takes no place
            if most <= 0 or proposer.is_off or not self._is_ready(sequence, proposer, known + most - 1):
                continue
            start = proposer.num_computed
            if known - start > DIRECT_TOKENS:
                if self._is_begun(sequence, start, begun):
                    self.holdings.release(sequence)
                    continue
                end = min(start + left, known - 1)
                if end > start:
                    chunks.append(self._step(sequence, proposer, start, end, end))
                    left -= end - start
                start = end
            if known - start <= DIRECT_TOKENS and not proposer.guessed:
                guesses.append(self._step(sequence, proposer, start, known, known + most - 1))
                lengths.append(most)
        if not chunks and not guesses:
            return None
        self._next_step += 2
        step = self._next_step
        return DraftPlan(StepPlan(step - 1, tuple(chunks)), StepPlan(step, tuple(guesses)), tuple(lengths))

    def take(self, sequences: Mapping[SequenceKey, Sequence], plan: DraftPlan, result: DraftResult) -> None:
        """Take the result of a plan. `sequences`: all live ones, by key."""
        for step in plan.catch_up.sequences:
            self._computed(sequences[step.key], step, result)
        for step, guessed in zip(plan.guesses.sequences, result.guesses, strict=True):
            proposer = self._computed(sequences[step.key], step, result)
            if not proposer.is_off:
                known = takewhile(lambda id_: id_ < self._bounds.vocab_size, guessed)
                proposer.guessed, proposer.guessed_after = tuple(known), step.end

    def _is_ready(self, sequence: Sequence, proposer: ModelProposer, num_tokens: int) -> bool:
        """True if there is room for so many tokens, and the draft model knows those of the sequence."""
        if not proposer.blocks:
            self.holdings.attach(sequence, proposer)
        if max(sequence.tokens[proposer.num_computed :]) >= self._bounds.vocab_size:
            self._give_up(sequence, proposer)
            return False
        return self.holdings.covers(proposer, num_tokens)

    def _is_begun(self, sequence: Sequence, start: int, begun: set[BlockIdentity]) -> bool:
        """True if another sequence of this plan computes the block that this one lacks; else this one does."""
        index = start // HASH_BLOCK_TOKENS
        if not self.holdings.prefix.enabled or index >= len(sequence.identities):
            return False
        lacking = sequence.identities[index]
        if lacking in begun:
            return True
        begun.add(lacking)
        return False

    def _computed(self, sequence: Sequence, step: SequenceStep, result: DraftResult) -> ModelProposer:
        proposer = proposer_of(sequence)
        assert proposer is not None, f"{step.key} has no state of the draft model"
        if step.key in result.unusable:
            self._give_up(sequence, proposer)
        else:
            # The last token's KV is there, too, but one row must be left to guess from.
            proposer.num_computed = min(step.end, len(sequence.tokens) - 1)
        return proposer

    def _give_up(self, sequence: Sequence, proposer: ModelProposer) -> None:
        self.holdings.release(sequence)
        proposer.is_off = True

    def _step(self, sequence: Sequence, proposer: ModelProposer, start: int, end: int, covered: int) -> SequenceStep:
        """Rows [start, end) of a sequence, with blocks up to `covered` tokens."""
        pool = self.holdings.pool
        blocks = tuple(proposer.blocks[: -(-covered // pool.block_tokens)])
        samples, history = end == len(sequence.tokens), None
        if samples and proposer.params.needs_history:
            history = History(sequence.prompt_ids, tuple(sequence.tokens[len(sequence.prompt_ids) :]))
        return SequenceStep(
            key=sequence.key,
            start=start,
            token_ids=tuple(sequence.tokens[start:end]),
            block_table=blocks,
            generations=tuple([pool.generation(block) for block in blocks]),
            samples=samples,
            params=proposer.params,
            num_generated=sequence.num_generated,
            history=history,
        )
