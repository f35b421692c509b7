"""Sampling of one step: tokens of its sequences, and logprobs of prompt tokens. Knows plans and rows, no weights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...core.errors import InvalidRequest, RankLost, RanksDiffer
from ...core.request import SequenceKey, TokenLogprobs
from ...engine.plan import SequenceStep, StepPlan
from ..batch import StepBatch
from ..ops.extremes import Extremes
from ..ops.products import TILE_ROWS
from ..ops.seam import Logits
from .logprobs import Scorer
from .masks import NO_MASKS, Masks
from .noise import F32
from .sampler import Draw, Sampled, Sampler

_log = logging.getLogger(__name__)

SCORED_NUMBERS = 1 << 22  # most logits of prompt rows in memory at once: 16 MiB

ToLogits = Callable[[Tensor], Logits]
"""Computes the logits of hidden rows [n, hidden], n a multiple of TILE_ROWS, in host memory."""


class StepOutputs(NamedTuple):
    """Tokens, logprobs and failures of a step, as in `StepResult`."""

    tokens: list[tuple[int, ...]]
    logprobs: dict[SequenceKey, tuple[TokenLogprobs, ...]]
    prompt_logprobs: dict[SequenceKey, tuple[TokenLogprobs, ...]]
    failed: dict[SequenceKey, str]
    refused: dict[SequenceKey, str]  # by their grammars, which pass a limit or allow no token
    deferred: frozenset[SequenceKey] = frozenset()

    def cut(self, place: int, key: SequenceKey, count: int) -> None:
        """Keep `count` tokens of the plan's `place`-th sequence."""
        self.tokens[place] = self.tokens[place][:count]
        if key in self.logprobs:
            self.logprobs[key] = self.logprobs[key][:count]


def is_right(draft_ids: Sequence[int], sampled: Sequence[int], row: int) -> bool:
    """Return whether the `row`-th sampling row of a sequence (from 0) counts, after the tokens `sampled` before it.

    It does if all rows before it did, and its own id, which is the draft before it, is the last of their tokens.
    """
    return row == len(sampled) and (row == 0 or sampled[-1] == draft_ids[row - 1])


class StepSampler:
    """Sampler of whole steps. Sequences in `bad` get no token; a row that is no distribution adds its sequence to it.

    An exception in the sampling of a sequence's rows fails only this sequence.
    """

    def __init__(
        self,
        vocab_size: int,
        eos_ids: Sequence[int],
        to_logits: ToLogits,
        extremes: Callable[[F32], Extremes],
        *,
        draws: bool = True,
    ) -> None:
        """`draws` False: compute the logits as for sampling, and draw no token, for ranks that only take part."""
        self._draws = draws
        self._sampler = Sampler(eos_ids, extremes)
        self._scorer = Scorer()
        self._to_logits = to_logits
        self._extremes = extremes
        self._rows_at_once = max(1, SCORED_NUMBERS // (vocab_size * TILE_ROWS)) * TILE_ROWS

    def run(
        self,
        plan: StepPlan,
        batch: StepBatch,
        rows: Tensor,
        bad: set[SequenceKey],
        last: Sequence[int],
        *,
        take_masks: Callable[[StepPlan, Sequence[int]], Masks] | None = None,
    ) -> StepOutputs:
        """Sample a step. `rows`: hidden rows of the batch. `last`: token id of each sequence's last row.

        `take_masks`: asked after the logits are computed, if the plan has grammars.
        """
        spoken = StepOutputs([() for _ in plan.sequences], {}, {}, {}, {})
        for i, step in enumerate(plan.sequences):
            if step.targets and step.key not in bad:
                try:
                    self._score(step, rows[batch.first_rows[i] :], bad, spoken)
                except (RankLost, RanksDiffer):
                    raise  # the fault of no sequence
                except Exception as error:
                    _fail(step.key, error, spoken)
        if not batch.sampled:
            return spoken
        logits = self._to_logits(batch.spoken(rows))
        if not self._draws:
            return spoken
        masks = NO_MASKS if take_masks is None else take_masks(plan, last)
        for key, why in masks.failed.items():
            _log.warning("%s: its grammar failed: %r", key, why)
            ended = spoken.refused if isinstance(why, InvalidRequest) else spoken.failed
            ended.setdefault(key, f"structured_outputs: {str(why)[:300].removeprefix('structured_outputs: ')}")
        sample = self._sampler.by_row(logits.rows.numpy()[: len(batch.sampled)], logits.extremes)
        before, row = -1, 0  # the sequence, and the row among its sampling rows
        for place, i in enumerate(batch.sampled):
            step, is_draft = plan.sequences[i], i == before
            before, row = i, row + 1 if is_draft else 0
            if is_draft and not is_right(step.draft_ids, spoken.tokens[i], row):
                continue
            draw, key = _draw(step, last[i], masks, row), step.key
            if draw is None and is_draft:
                continue  # no mask was made for it: the next step samples this row again, as its first
            if draw is None and key not in masks.deferred and key not in spoken.refused:
                spoken.failed.setdefault(key, "structured_outputs: this worker makes no masks")
            sampled = sample(place, draw)
            if key in masks.deferred:
                continue
            if isinstance(sampled, Sampled):
                if key not in bad and key not in spoken.failed and key not in spoken.refused:
                    spoken.tokens[i] += (sampled.token_id,)
                    if sampled.logprobs is not None:
                        spoken.logprobs[key] = (*spoken.logprobs.get(key, ()), sampled.logprobs)
            elif is_draft:
                pass  # the next step computes this row again, as its first, and fails
            elif sampled is None:
                bad.add(key)
            else:
                _fail(key, sampled.error, spoken)
        return spoken._replace(deferred=masks.deferred - bad) if masks.deferred else spoken

    def _score(self, step: SequenceStep, rows: Tensor, bad: set[SequenceKey], spoken: StepOutputs) -> None:
        """Logprobs of the prompt ids that the step's first rows predict."""
        num_top = step.params.prompt_logprobs
        assert num_top is not None, "targets without prompt_logprobs"
        scores: list[TokenLogprobs] = []
        for start in range(0, len(step.targets), self._rows_at_once):
            targets = step.targets[start : start + self._rows_at_once]
            # Whole tiles: the last tile is filled with its last row.
            places = torch.arange(start, start + -(-len(targets) // TILE_ROWS) * TILE_ROWS)
            logits = self._to_logits(rows[places.clamp_(max=start + len(targets) - 1)]).rows[: len(targets)].numpy()
            least, greatest, _ = self._extremes(logits)
            if not (-least.max() < float("inf") and greatest.max() < float("inf")):
                bad.add(step.key)
                return
            if self._draws:
                scores += self._scorer.score(logits, targets, num_top, greatest)
        spoken.prompt_logprobs[step.key] = tuple(scores)


def _fail(key: SequenceKey, error: Exception, spoken: StepOutputs) -> None:
    if key not in spoken.failed:
        _log.error("%s: a token could not be sampled; the sequence ends", key, exc_info=error)
        spoken.failed[key] = f"a token could not be sampled: {type(error).__name__}; the worker's log has more"


def _draw(step: SequenceStep, last_id: int, masks: Masks, row: int = 0) -> Draw | None:
    """The draw of a sequence's `row`-th sampling row; None: no token in this step, because its mask is not there."""
    history, mask = step.history, None
    if step.params.grammar is not None:
        rows = masks.ready.get(step.key, ())
        if row >= len(rows):
            return None
        mask = rows[row]
    if history is not None and step.from_place is not None:
        history = history._replace(output_ids=(*history.output_ids, last_id))
    if row and history is not None:
        history = history._replace(output_ids=history.output_ids + step.draft_ids[:row])
    return Draw(step.params, step.key.choice, step.num_generated + row, mask, history)
