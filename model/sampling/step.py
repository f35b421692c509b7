"""What one step's rows say: sampled tokens, and how likely prompt tokens were. Knows plans and rows, no weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...core.request import SequenceKey, TokenLogprobs
from ..batch import StepBatch
from ..ops import Logits
from ..plan import SequenceStep, StepPlan
from ..products import TILE_ROWS
from ..sampler import Draw, Sampler
from .extremes import Extremes
from .logprobs import token_logprobs
from .noise import F32

ToLogits = Callable[[Tensor], Logits]
"""Of hidden rows [n, hidden], n whole tiles, in host memory. A row's bits do not depend on its company."""


class Spoken(NamedTuple):
    """In a `StepResult`'s words."""

    tokens: list[tuple[int, ...]]
    logprobs: dict[SequenceKey, tuple[TokenLogprobs, ...]]
    prompt_logprobs: dict[SequenceKey, tuple[TokenLogprobs, ...]]


class StepSampler:
    """The sampler over steps. `bad` sequences get no token; rows that are no distribution make theirs bad."""

    def __init__(self, eos_ids: Sequence[int], to_logits: ToLogits, extremes: Callable[[F32], Extremes]) -> None:
        self._sampler = Sampler(eos_ids, extremes)
        self._to_logits = to_logits

    def run(self, plan: StepPlan, batch: StepBatch, rows: Tensor, bad: set[SequenceKey], last: Sequence[int]) -> Spoken:
        """`rows`: hidden rows of the batch. `last`: per sequence the id of its last row, looked up where it must be."""
        spoken = Spoken([() for _ in plan.sequences], {}, {})
        for i, step in enumerate(plan.sequences):
            if step.targets and step.key not in bad:
                self._score(step, rows[batch.first_rows[i] :], bad, spoken)
        if not batch.sampled:
            return spoken
        logits = self._to_logits(batch.spoken(rows))
        draws = [_draw(plan.sequences[i], last[i]) for i in batch.sampled]
        tokens = self._sampler.sample(logits.rows.numpy()[: len(draws)], draws, logits.extremes)
        for i, sampled in zip(batch.sampled, tokens, strict=True):
            key = plan.sequences[i].key
            if sampled is None:
                bad.add(key)
            elif key not in bad:
                spoken.tokens[i] = (sampled.token_id,)
                if sampled.logprobs is not None:
                    spoken.logprobs[key] = (sampled.logprobs,)
        return spoken

    def _score(self, step: SequenceStep, rows: Tensor, bad: set[SequenceKey], spoken: Spoken) -> None:
        """Logprobs of the prompt ids that the step's first rows predict."""
        num_top = step.params.prompt_logprobs
        assert num_top is not None, "targets without prompt_logprobs"
        scores: list[TokenLogprobs] = []
        for target, row in zip(step.targets, self._logits_of(rows, len(step.targets)), strict=True):
            if not abs(row).max() < float("inf"):
                bad.add(step.key)
                return
            scores.append(token_logprobs(row, target, num_top))
        spoken.prompt_logprobs[step.key] = tuple(scores)

    def _logits_of(self, rows: Tensor, count: int) -> Iterator[F32]:
        """Logits of the first `count` rows, a tile at a time, so that a long prompt needs no more memory than that."""
        for start in range(0, count, TILE_ROWS):
            places = torch.arange(start, start + TILE_ROWS).clamp_(max=count - 1)
            yield from self._to_logits(rows[places]).rows[: count - start].numpy()


def _draw(step: SequenceStep, last_id: int) -> Draw:
    history = step.history
    if history is not None and step.from_place is not None:
        history = history._replace(output_ids=(*history.output_ids, last_id))
    return Draw(step.params, step.key.choice, step.num_generated, step.logits_mask, history)
