"""Greedy tokens found on the device, so that whole rows of logits stay there. Gives what `sampler.py` would."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.request import SequenceKey
from .batch import StepBatch
from .plan import SequenceStep, StepPlan
from .sampler import Draw
from .sampling.step import Spoken

_NOTHING = -1


def all_greedy(plan: StepPlan) -> bool:
    """Whether every sequence wants its likeliest token and nothing else of its logits."""
    return all(not step.targets and (not step.samples or _is_plain(step)) for step in plan.sequences)


def likeliest(logits: Tensor) -> Tensor:
    """int64 [rows]: the largest of logits [rows, vocab], of equals the lowest id; -1 where a row is no distribution.

    `argmax` promises no order among equals on a device.
    """
    top = logits.amax(1, keepdim=True)
    is_number = (-logits.amin(1) < float("inf")) & (top.squeeze(1) < float("inf"))  # false for NaN
    ids = torch.arange(logits.shape[1], dtype=torch.int32, device=logits.device)
    first = torch.where(logits == top, ids, logits.shape[1]).amin(1)
    return torch.where(is_number, first, _NOTHING)


def speak_greedily(plan: StepPlan, batch: StepBatch, logits: Tensor, bad: set[SequenceKey]) -> Spoken:
    """What the sampler says of logits [len(batch.sampled), vocab], for a plan that is `all_greedy`."""
    spoken = Spoken([() for _ in plan.sequences], {}, {})
    for i, token_id in zip(batch.sampled, likeliest(logits).tolist(), strict=True):
        key = plan.sequences[i].key
        if token_id == _NOTHING:
            bad.add(key)
        elif key not in bad:
            spoken.tokens[i] = (token_id,)
    return spoken


def _is_plain(step: SequenceStep) -> bool:
    return Draw(step.params, step.key.choice, step.num_generated, step.logits_mask).is_plain
