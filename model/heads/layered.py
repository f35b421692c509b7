"""Heads of one decoder layer with keys and values: they follow the model's steps, and guess row by row.

Knows no form of head (`LayerInput` has that) and no owner of blocks: `engine/speculation/heads/layer_planner.py` plans.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ...checkpoint.spec import ModelSpec
from ...core.request import SequenceKey
from ...engine.plan import SequenceStep, StepPlan
from ...engine.speculation.draft_model.plan import DraftPlan, DraftResult
from ...kv.store.store import KvStore
from ..batch import StepBatch, build_batch, on_device
from ..decoder.decoder import Decoder, Hidden
from ..runner import Runner
from ..sampling.sampler import Sampler
from ..weights.weights import Weights
from .drawing import Guess, GuessDrawer
from .features import TappedRows


class LayerInput(Protocol):
    """What a form of head makes of hidden states and embeddings."""

    def features(self, taps: Tensor) -> Tensor:
        """Features [rows, hidden] of the model's tapped rows; later rows take the head's own residual stream."""
        ...

    def rows(self, embeddings: Tensor, features: Tensor) -> tuple[Tensor, Tensor | None]:
        """The layer's residual stream [rows, hidden], and what its attention takes (None: that, normalised)."""
        ...


@dataclass(frozen=True, slots=True)
class LayerHead:
    """One head, packed for one device."""

    spec: ModelSpec  # of one layer
    weights: Weights  # of one layer; the embedding is not read
    inputs: LayerInput
    embed: Callable[[Tensor], Tensor]  # embeddings [n, hidden] of token ids [n]
    token_ids: Tensor | None  # [outputs] int64 on the CPU: the token of each; None: its number


class LayerDrafter:
    """Implements `Drafter` of engine/loop.py over the model's runner. Only the steps' thread may use it."""

    def __init__(self, runner: Runner, head: LayerHead, store: KvStore, taps: Sequence[int]) -> None:
        """From now on `runner` keeps the hidden rows that the head reads. `store`: of the head, read by nobody else."""
        self.head, self.store = head, store
        self._runner = runner
        self._features = TappedRows(taps)
        ends = runner.spec.eos_ids
        sampler = Sampler(ends, runner.ops.extremes)
        self._drawer = GuessDrawer(sampler, ends, head.token_ids, runner.spec.vocab_size)
        self._decoder: Decoder | None = None
        runner.features = self._features

    def warm_up(self) -> None:
        """Prepare the head's decoder. Call it in the thread of the steps, after the runner's `warm_up`."""
        self._decoder = Decoder(self.head.spec, self.head.weights, self._runner.ops, self._runner.max_model_len)

    def release(self) -> None:
        """Give back the memory of everything but weights, after the last call."""
        self._decoder, self._features = None, TappedRows(self._features.layers)
        self.store.release()

    def catch_up(self, plan: DraftPlan) -> frozenset[SequenceKey]:
        """Compute the rows of `plan.catch_up`; returns the sequences whose keys or values are not finite."""
        works = plan.catch_up.sequences
        if not works:
            return frozenset()
        with torch.inference_mode():
            batch, hidden = self._compute(works, self._tapped(works, plan.ahead))
        return frozenset(_bad(works, batch, hidden))

    def guess(self, plan: DraftPlan) -> DraftResult:
        """Compute the rows of `plan.guesses`, and guess for all of them together, one token per call of the layer."""
        works = list(plan.guesses.sequences)
        guesses = [Guess(step, most) for step, most in zip(works, plan.lengths, strict=True)]
        unusable: set[SequenceKey] = set()
        if works:
            with torch.inference_mode():
                features = self._tapped(works, plan.ahead[len(plan.catch_up.sequences) :])
                self._guess(works, guesses, features, unusable)
        return DraftResult(tuple(guess.ids for guess in guesses), frozenset(unusable))

    def _guess(
        self, works: list[SequenceStep], guesses: list[Guess], features: Tensor, unusable: set[SequenceKey]
    ) -> None:
        while True:
            batch, hidden = self._compute(works, features)
            unusable |= _bad(works, batch, hidden)
            spoken = batch.spoken(hidden.rows)
            self._drawer.add(guesses, self._decoder_now.logits(spoken).rows)
            places = [place for place, guess in enumerate(guesses) if guess.wants_more]
            if not places:
                return
            features = spoken[torch.tensor(places, device=spoken.device)]
            works = [_next(works[place], guesses[place].ids[-1]) for place in places]
            guesses = [guesses[place] for place in places]

    def _compute(self, works: Sequence[SequenceStep], features: Tensor) -> tuple[StepBatch, Hidden]:
        """Run the layer over rows of sequences; `features` [rows, hidden]: of each row."""
        ops, head = self._runner.ops, self.head
        plan = StepPlan(0, tuple(works))
        batch = build_batch(plan, [step.token_ids for step in works], self.store.block_tokens, ops)
        batch = on_device(batch, ops.device)
        x, h = head.inputs.rows(head.embed(batch.token_ids), _filled(features, batch.num_rows))
        return batch, self._decoder_now.through(x, batch, self.store, h)

    def _tapped(self, works: Sequence[SequenceStep], ahead: Sequence[int]) -> Tensor:
        """Features of the model's rows that `works` follow; `ahead`: of each, as in `DraftPlan`."""
        found = [
            self._features.find(step.key, first + step.start, len(step.token_ids))
            for step, first in zip(works, ahead, strict=False)
        ]
        taps = torch.cat(found)
        multiple = self._runner.ops.row_multiple
        return self.head.inputs.features(_filled(taps, len(taps) + -len(taps) % multiple))[: len(taps)]

    @property
    def _decoder_now(self) -> Decoder:
        assert self._decoder is not None, "warm_up comes first"
        return self._decoder


def _filled(rows: Tensor, count: int) -> Tensor:
    """Rows [count, width]: the given ones, then zeros."""
    spare = count - len(rows)
    return torch.cat((rows, rows.new_zeros(spare, rows.shape[1]))) if spare else rows


def _bad(works: Sequence[SequenceStep], batch: StepBatch, hidden: Hidden) -> set[SequenceKey]:
    """Sequences with keys or values that are not finite."""
    counts = hidden.non_finite.tolist()
    if not any(counts):
        return set()
    firsts = zip(batch.first_rows, works, strict=True)
    return {step.key for row, step in firsts if any(counts[row : row + len(step.token_ids)])}


def _next(step: SequenceStep, token_id: int) -> SequenceStep:
    """The row of a guessed token, after the rows of `step`."""
    return step._replace(start=step.end, token_ids=(token_id,))
