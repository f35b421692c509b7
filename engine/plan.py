"""Plan of one step from the scheduler to the runner, and the runner's result. Plain values, no tensor.

A plan for step n+1 can be made while step n runs: for a token that is not known yet, the plan names its place in the
earlier step (`SampledPlace`). To roll a sequence back, set its `num_computed`; no other state must change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from ..core.request import SamplingParams, SequenceKey, TokenLogprobs
from ..kv.block import BlockId


@dataclass(frozen=True, slots=True)
class SampledPlace:
    """Place of a token that an earlier, still running step samples: the step, and the row of its `StepResult`."""

    step: int
    row: int


class History(NamedTuple):
    """Token ids for penalties, bad words and grammars. Tokens of earlier dispatches count as output."""

    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]


class StateMove(NamedTuple):
    """States that a sequence's rows read and write, of a model that has recurrent layers. Places in the state store.

    The state read is never one that is written, so a step may be repeated.
    """

    source: int  # covers `SequenceStep.start` tokens; 0: covers none
    target: int  # receives the state after the last row
    marks: tuple[tuple[int, int], ...] = ()  # (rows, place): receives the state after so many rows, ascending


class SequenceStep(NamedTuple):
    """Work of one sequence in one step: compute `token_ids` at positions `start` …, then sample if `samples`.

    `draft_ids` are guesses of the tokens that follow (speculation/). Their rows are computed too, and sampled one after
    the other: row i counts if all drafts before it are what was sampled. KV of the other drafts is never sealed.

        rows     | token_ids … last | draft 0 | draft 1 |        sampled: a, b, c; draft 0 = a and draft 1 = b
        sampled                a         b         c             give the three tokens a, b, c; draft 0 ≠ a gives a
    """

    key: SequenceKey
    start: int  # position of the first computed token; all tokens before it are in the cache
    token_ids: tuple[int, ...]  # ids to compute, in order
    block_table: tuple[BlockId, ...]  # covers start + num_tokens tokens
    generations: tuple[int, ...]  # of the blocks; a digest is stored with them
    samples: bool  # True: sample from the last row's logits
    params: SamplingParams
    num_generated: int  # tokens generated before this step: min_tokens, and the position key of the noise
    seals_tail: bool = False  # the prompt ends in this step: seal the partial last hash block too
    from_place: SampledPlace | None = None  # place of the first token's id, if the id is not known yet
    adapter_slot: int = 0  # 0: none
    draft_ids: tuple[int, ...] = ()  # only if `samples`
    history: History | None = None  # if `params` need it; without the token that `from_place` names
    targets: tuple[int, ...] = ()  # prompt ids whose logprobs are wanted; the i-th follows the step's i-th row

    @property
    def num_tokens(self) -> int:
        """Number of rows of this sequence in the batch, drafts included."""
        return len(self.token_ids) + len(self.draft_ids)

    @property
    def end(self) -> int:
        """Number of tokens in the cache after the step, without drafts."""
        return self.start + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One mixed step: prefill chunks and decodes together, in row order."""

    step: int
    sequences: tuple[SequenceStep, ...]
    states: tuple[StateMove, ...] = ()  # of each sequence, if the model has recurrent layers

    @property
    def num_tokens(self) -> int:
        """Number of rows of the batch."""
        return sum(sequence.num_tokens for sequence in self.sequences)

    def alone(self, index: int) -> StepPlan:
        """The same step of one sequence."""
        return StepPlan(self.step, (self.sequences[index],), self.states[index : index + 1])


@dataclass(frozen=True, slots=True)
class StepResult:
    """Result of a step: 0 … k+1 tokens per sequence, in the plan's order; none for non-finite or failed sequences."""

    step: int
    tokens: tuple[tuple[int, ...], ...]  # per plan.sequences
    non_finite: frozenset[SequenceKey] = field(
        default_factory=frozenset
    )  # sequences with a key, value or logit that is not finite
    logprobs: Mapping[SequenceKey, tuple[TokenLogprobs, ...]] = field(default_factory=dict)  # of `tokens`, if asked for
    prompt_logprobs: Mapping[SequenceKey, tuple[TokenLogprobs, ...]] = field(default_factory=dict)  # of `targets`
    failed: Mapping[SequenceKey, str] = field(default_factory=dict)  # sequences that end by our own fault, and why
    refused: Mapping[SequenceKey, str] = field(default_factory=dict)  # that end by their client's grammar, and why
    deferred: frozenset[SequenceKey] = frozenset()  # computed, not sampled: the grammar's mask is not ready yet
