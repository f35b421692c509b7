"""Greedy sampling of steps that need only each row's likeliest token. Same tokens as `sampler.py`.

On a GPU the logits stay on the device; on a CPU they are not read a second time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.request import SequenceKey
from ...engine.plan import StepPlan
from ..batch import StepBatch
from ..ops.extremes import Extremes
from ..ops.seam import Logits
from .sampler import is_plain
from .step import StepOutputs, is_right

_NOTHING = -1
_INFINITY = float("inf")


def all_greedy(plan: StepPlan) -> bool:
    """Return whether every sequence needs only its likeliest token, and no logprobs or changed logits."""
    for step in plan.sequences:
        if step.targets or (step.samples and not is_plain(step.params, step.num_generated, None)):
            return False
    return True


def likeliest(logits: Tensor) -> Tensor:
    """Ids int64 [rows] of the largest logits [rows, vocab]; of equal ones the lowest id. -1: not a distribution.

    `argmax` is not used: on a GPU it may return any of several equal ones.
    """
    top = logits.amax(1, keepdim=True)
    is_number = (-logits.amin(1) < _INFINITY) & (top.squeeze(1) < _INFINITY)  # false for NaN
    ids = torch.arange(logits.shape[1], dtype=torch.int32, device=logits.device)
    first = torch.where(logits == top, ids, logits.shape[1]).amin(1)
    return torch.where(is_number, first, _NOTHING)


def speak_greedily(plan: StepPlan, batch: StepBatch, logits: Logits, bad: set[SequenceKey]) -> StepOutputs:
    """Result of the sampler for logits [>= len(batch.sampled), vocab] of a plan that is `all_greedy`."""
    row = 0  # of the present sequence
    spoken = StepOutputs([()] * len(plan.sequences), {}, {}, {}, {})
    known = logits.extremes
    found = likeliest(logits.rows).tolist() if known is None else _known(known)
    before = -1
    for i, token_id in zip(batch.sampled, found, strict=False):
        if i == before:  # the row of a draft: it counts if all before it were right
            told = spoken.tokens[i]
            row += 1
            if token_id != _NOTHING and is_right(plan.sequences[i].draft_ids, told, row):
                spoken.tokens[i] = (*told, token_id)
            continue
        before, row = i, 0
        if token_id == _NOTHING:
            bad.add(plan.sequences[i].key)
        elif not bad or plan.sequences[i].key not in bad:
            spoken.tokens[i] = (token_id,)
    return spoken


def _known(extremes: Extremes) -> list[int]:
    least, greatest, best = (part.tolist() for part in extremes)
    return [
        place if -low < _INFINITY and high < _INFINITY else _NOTHING
        for low, high, place in zip(least, greatest, best, strict=True)
    ]
