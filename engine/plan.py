"""One step, decided: the message from the scheduler to the runner, and its answer. Plain values, no tensor.

A plan for step n+1 can be made while step n runs: where a token is not known yet, the plan names its place in the
earlier step (`SampledPlace`). Rolling a sequence back is setting its `num_computed`; nothing else remembers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from ..core.request import SamplingParams, SequenceKey, TokenLogprobs
from ..kv.block import BlockId


@dataclass(frozen=True, slots=True)
class SampledPlace:
    """A token that an earlier, still running step samples: which step, and which row of its `StepResult`."""

    step: int
    row: int


class History(NamedTuple):
    """The ids that penalties and bad words look at. Tokens of earlier dispatches are output, like those made here."""

    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]


class SequenceStep(NamedTuple):
    """What one sequence does in one step: computes `token_ids` at positions `start` …, then maybe samples."""

    key: SequenceKey
    start: int  # position of the first computed token; everything before it is in the cache
    token_ids: tuple[int, ...]  # ids to compute, in order
    block_table: tuple[BlockId, ...]  # covers start + len(token_ids) tokens
    generations: tuple[int, ...]  # of the blocks, so that a digest is bound to this use of the block
    samples: bool  # whether the last row's logits are sampled
    params: SamplingParams
    num_generated: int  # tokens generated before this step: min_tokens, and the position key of the noise
    seals_tail: bool = False  # the prompt ends in this step: seal the partial last hash block too
    from_place: SampledPlace | None = None  # the first token's id, when it is not known yet
    adapter_slot: int = 0  # 0: none
    logits_mask: bytes | None = None  # packed bits over the vocabulary
    draft_ids: tuple[int, ...] = ()
    history: History | None = None  # where `params` need it; lacks a token that `from_place` names
    targets: tuple[int, ...] = ()  # prompt ids that follow the step's first rows, and whose logprobs are wanted

    @property
    def num_tokens(self) -> int:
        """Rows this sequence takes in the batch."""
        return len(self.token_ids)

    @property
    def end(self) -> int:
        """Tokens in the cache after the step."""
        return self.start + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One mixed step: prefill chunks and decodes together, in row order."""

    step: int
    sequences: tuple[SequenceStep, ...]

    @property
    def num_tokens(self) -> int:
        """Rows of the batch."""
        return sum(sequence.num_tokens for sequence in self.sequences)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step brought: 0 … k+1 tokens per sequence, in the plan's order; none for who is not finite or failed."""

    step: int
    tokens: tuple[tuple[int, ...], ...]  # per plan.sequences
    non_finite: frozenset[SequenceKey] = field(
        default_factory=frozenset
    )  # their keys, values or logits were not numbers
    logprobs: Mapping[SequenceKey, tuple[TokenLogprobs, ...]] = field(default_factory=dict)  # of `tokens`, if asked for
    prompt_logprobs: Mapping[SequenceKey, tuple[TokenLogprobs, ...]] = field(default_factory=dict)  # of `targets`
    failed: Mapping[SequenceKey, str] = field(default_factory=dict)  # sequences that end by our own fault, and why
