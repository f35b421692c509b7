"""A step plan as tensors: rows, positions, slots and who attends to which blocks. Knows no weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .attention import KV_TILE, Attention, AttentionLayout, Span
from .plan import SequenceStep, StepPlan
from .products import padded


@dataclass(frozen=True, slots=True)
class StepBatch:
    """Inputs of one step. Rows are padded to whole tiles; padding has token 0, position 0 and slot -1."""

    token_ids: Tensor  # [rows] int64
    positions: Tensor  # [rows] int64
    slots: Tensor  # [rows] int64: block * block_tokens + offset
    attention: AttentionLayout
    first_rows: tuple[int, ...]  # of each sequence of the plan; its rows follow
    sampled: tuple[int, ...]  # indices into plan.sequences
    sample_rows: Tensor  # [padded(len(sampled))] int64: the row whose logits each of them samples from


def build_batch(
    plan: StepPlan, token_ids: Sequence[Sequence[int]], block_tokens: int, attention: Attention
) -> StepBatch:
    """Lay a plan out. `token_ids`: per sequence, with ids from earlier steps filled in."""
    first_rows, positions, slots, spans = [], [], [], []
    row = 0
    for step in plan.sequences:
        table = torch.tensor(step.block_table, dtype=torch.int64)
        place = torch.arange(step.start, step.end)
        first_rows.append(row)
        positions.append(place)
        slots.append(table[place // block_tokens] * block_tokens + place % block_tokens)
        spans.append(Span(row, step.start, step.num_tokens, _whole_tiles(step, table, block_tokens)))
        row += step.num_tokens
    spare = padded(row) - row
    sampled = tuple(i for i, step in enumerate(plan.sequences) if step.samples)
    last_rows = [first_rows[i] + plan.sequences[i].num_tokens - 1 for i in sampled]
    last_rows += [0] * (padded(len(last_rows)) - len(last_rows))
    return StepBatch(
        token_ids=torch.tensor([i for ids in token_ids for i in ids] + [0] * spare),
        positions=torch.cat([*positions, torch.zeros(spare, dtype=torch.int64)]),
        slots=torch.cat([*slots, torch.full((spare,), -1)]),
        attention=attention.lay_out(spans, block_tokens),
        first_rows=tuple(first_rows),
        sampled=sampled,
        sample_rows=torch.tensor(last_rows, dtype=torch.int64),
    )


def _whole_tiles(step: SequenceStep, table: Tensor, block_tokens: int) -> Tensor:
    """The blocks that whole KV tiles read; past the sequence's last token any block does, its own first one here."""
    used = -(-step.end // block_tokens)
    wanted = -(-step.end // KV_TILE) * (KV_TILE // block_tokens)
    return torch.cat((table[:used], table[:1].expand(wanted - used)))
