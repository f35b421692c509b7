"""A step plan as tensors: rows, positions, slots and who attends to which blocks. Knows no weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..kv.block import BlockId
from .ops import Ops, Span
from .plan import StepPlan
from .upload import upload


@dataclass(frozen=True, slots=True)
class StepBatch:
    """Inputs of one step. Rows are padded to `ops.row_multiple`; padding has token 0, position 0 and slot -1.

    `build_batch` leaves all but `attention` on the CPU; `on_device` brings the rest after it.
    """

    token_ids: Tensor  # [rows] int64
    positions: Tensor  # [rows] int64
    slots: Tensor  # [rows] int64: block * block_tokens + offset
    attention: Any  # what `ops.lay_out` made of the step's spans
    first_rows: tuple[int, ...]  # of each sequence of the plan; its rows follow
    sampled: tuple[int, ...]  # indices into plan.sequences
    sample_rows: Tensor  # [padded len(sampled)] int64: the row whose logits each of them samples from
    read_rows: Tensor  # int64, rising: rows whose residual stream is read after the last layer; others' may be anything


def read_whole(batch: StepBatch) -> StepBatch:
    """The batch for a caller who reads every row of the residual stream."""
    return replace(batch, read_rows=torch.arange(len(batch.token_ids)))


def on_device(batch: StepBatch, device: torch.device) -> StepBatch:
    """The batch with its rows where the ops are; `sample_rows` stay, they only index."""
    if device.type == "cpu":
        return batch
    token_ids, positions, slots = upload((batch.token_ids, batch.positions, batch.slots), device)
    return replace(batch, token_ids=token_ids, positions=positions, slots=slots)


def build_batch(plan: StepPlan, token_ids: Sequence[Sequence[int]], block_tokens: int, ops: Ops) -> StepBatch:
    """Lay a plan out. `token_ids`: per sequence, with ids from earlier steps filled in."""
    first_rows, spans = [], []
    positions: list[Sequence[int] | NDArray[np.int64]] = []
    slots: list[Sequence[int] | NDArray[np.int64]] = []
    row = 0
    for step in plan.sequences:
        if step.num_tokens == 1:  # a decode: most steps have nothing else
            block, offset = divmod(step.start, block_tokens)
            first_rows.append(row)
            positions.append((step.start,))
            slots.append((step.block_table[block] * block_tokens + offset,))
            spans.append(Span(row, step.start, 1, step.block_table[: block + 1]))
            row += 1
            continue
        place = np.arange(step.start, step.end)
        first = step.start // block_tokens
        table = np.array(step.block_table[first : -(-step.end // block_tokens)])
        first_rows.append(row)
        positions.append(place)
        slots.append(table[place // block_tokens - first] * block_tokens + place % block_tokens)
        spans.append(Span(row, step.start, step.num_tokens, step.block_table[: -(-step.end // block_tokens)]))
        row += step.num_tokens
    spare = -row % ops.row_multiple
    sampled = tuple(i for i, step in enumerate(plan.sequences) if step.samples)
    last_rows = [first_rows[i] + plan.sequences[i].num_tokens - 1 for i in sampled]
    scored = [
        first + i for first, step in zip(first_rows, plan.sequences, strict=True) for i in range(len(step.targets))
    ]
    read_rows = sorted({*last_rows, *scored}) if scored else last_rows
    last_rows = last_rows + [0] * (-len(last_rows) % ops.row_multiple)
    return StepBatch(
        token_ids=_int64([i for ids in token_ids for i in ids] + [0] * spare),
        positions=_joined(positions, spare, 0),
        slots=_joined(slots, spare, -1),
        attention=ops.lay_out(spans, block_tokens),
        first_rows=tuple(first_rows),
        sampled=sampled,
        sample_rows=_int64(last_rows),
        read_rows=_int64(read_rows),
    )


def _int64(numbers: Sequence[int]) -> Tensor:
    return torch.from_numpy(np.array(numbers, np.int64))  # `torch.tensor` takes several times as long for a short list


def _joined(parts: Sequence[Sequence[int] | NDArray[np.int64]], spare: int, padding: int) -> Tensor:
    """int64 [rows]: all parts, then padding."""
    if all(len(part) == 1 for part in parts):
        return _int64([int(part[0]) for part in parts] + [padding] * spare)
    return torch.from_numpy(np.concatenate([*parts, np.full(spare, padding)]).astype(np.int64, copy=False))


def warm_up_batch(block_tokens: int, ops: Ops, num_tokens: int = 1) -> StepBatch:
    """A step that writes nothing: tokens (a block's at most) that read the store's block 0, whatever is there."""
    rows = num_tokens + -num_tokens % ops.row_multiple
    return StepBatch(
        token_ids=torch.zeros(rows, dtype=torch.int64),
        positions=torch.zeros(rows, dtype=torch.int64),
        slots=torch.full((rows,), -1),
        attention=ops.lay_out((Span(0, 0, num_tokens, (BlockId(0),)),), block_tokens),
        first_rows=(0,),
        sampled=(0,),
        sample_rows=torch.zeros(ops.row_multiple, dtype=torch.int64),
        read_rows=torch.zeros(1, dtype=torch.int64),
    )
