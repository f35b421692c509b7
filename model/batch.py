"""A step plan as tensors: rows, positions, slots, and the blocks that each sequence attends to. Knows no weights."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..core.errors import InternalError
from ..engine.plan import StepPlan
from ..kv.block import BlockId
from .adapters.loaded import AdapterRows, LoadedAdapter
from .ops.delta_spans import DeltaSpans, StateSpan
from .ops.seam import Ops, Span
from .ops.upload import upload


@dataclass(frozen=True, slots=True)
class StepBatch:
    """Inputs of one step. Rows are padded to `ops.row_multiple`; padding has token 0, position 0 and slot -1.

    `build_batch` leaves all tensors except `attention` on the CPU; `on_device` moves them to the device.
    """

    token_ids: Tensor  # [rows] int64
    positions: Tensor  # [rows] int64
    slots: Tensor  # [rows] int64: block * block_tokens + offset
    attention: Any  # result of `ops.lay_out` for the step's spans
    num_rows: int  # including padding
    first_rows: Sequence[int]  # first row of each sequence of the plan
    sampled: Sequence[int]  # indices into plan.sequences; one again for each of its drafts
    sample_rows: Sequence[int]  # row from which each of these samples; padded to `ops.row_multiple`
    read_rows: Sequence[int]  # ascending: rows read after the last layer; the others may hold anything
    adapters: Sequence[AdapterRows] = ()  # rows with an adapter; no row has two
    deltas: DeltaSpans | None = None  # for recurrent layers; None: the model has none, or the step writes nothing

    def spoken(self, rows: Tensor) -> Tensor:
        """Select the sampled rows from `rows` [num_rows, ...], in order of `sampled`, then padding."""
        return rows if len(self.sampled) == self.num_rows else rows[torch.tensor(self.sample_rows, dtype=torch.int64)]


def read_whole(batch: StepBatch) -> StepBatch:
    """Copy of the batch whose `read_rows` are all rows of the residual stream."""
    return replace(batch, read_rows=range(batch.num_rows))


def with_adapters(
    batch: StepBatch, plan: StepPlan, adapters: Mapping[int, LoadedAdapter], device: torch.device
) -> StepBatch:
    """Copy of the batch with the adapters of the plan's sequences, by slot.

    Raises:
        InternalError: a slot holds no adapter.
    """
    rows_by_slot: dict[int, list[int]] = {}
    for first, step in zip(batch.first_rows, plan.sequences, strict=True):
        if step.adapter_slot:
            rows_by_slot.setdefault(step.adapter_slot, []).extend(range(first, first + step.num_tokens))
    if not rows_by_slot.keys() <= adapters.keys():
        raise InternalError(f"adapter slot {min(rows_by_slot.keys() - adapters.keys())} is empty")
    rows = [AdapterRows(adapters[slot], _int64(rows).to(device)) for slot, rows in rows_by_slot.items()]
    return replace(batch, adapters=rows)


def on_device(batch: StepBatch, device: torch.device) -> StepBatch:
    """Move the batch's rows to the device of the ops."""
    if device.type == "cpu":
        return batch
    token_ids, positions, slots = upload((batch.token_ids, batch.positions, batch.slots), device)
    return replace(batch, token_ids=token_ids, positions=positions, slots=slots)


def build_batch(plan: StepPlan, token_ids: Sequence[Sequence[int]], block_tokens: int, ops: Ops) -> StepBatch:
    """Make the batch of a plan. `token_ids`: of all rows per sequence, with the ids that earlier steps sampled."""
    first_rows: list[int] = []
    spans: list[Span] = []
    positions: list[int] = []
    slots: list[int] = []
    for step, ids in zip(plan.sequences, token_ids, strict=True):
        start, count, row = step.start, len(ids), len(positions)
        table = step.block_table[: -(-(start + count) // block_tokens)]
        first_rows.append(row)
        spans.append(Span(row, start, count, table))
        if count == 1:  # a decode; most steps consist of these
            positions.append(start)
            slots.append(start + _ahead(table, len(table) - 1, block_tokens))
        else:
            positions += range(start, start + count)
            slots += _slots(table, range(start, start + count), block_tokens)
    rows = len(positions)
    spare = -rows % ops.row_multiple
    sampled: list[int] = []
    last_rows: list[int] = []
    for i, step in enumerate(plan.sequences):
        if step.samples:
            sampled.append(i)
            last_rows.append(first_rows[i] + len(step.token_ids) - 1)
            if step.draft_ids:
                sampled += [i] * len(step.draft_ids)
                last_rows += range(last_rows[-1] + 1, last_rows[-1] + 1 + len(step.draft_ids))
    read_rows = sorted({*last_rows, *_scored_rows(plan, first_rows)})
    last_rows += [0] * (-len(last_rows) % ops.row_multiple)
    return StepBatch(
        token_ids=_int64([i for ids in token_ids for i in ids] + [0] * spare),
        positions=_int64(positions + [0] * spare),
        slots=_int64(slots + [-1] * spare),
        attention=ops.lay_out(spans, block_tokens),
        num_rows=rows + spare,
        first_rows=first_rows,
        sampled=sampled,
        sample_rows=last_rows,
        read_rows=read_rows,
        deltas=_deltas(plan, first_rows, rows + spare, ops),
    )


def _deltas(plan: StepPlan, first_rows: Sequence[int], num_rows: int, ops: Ops) -> DeltaSpans | None:
    if not plan.states:
        return None
    works = zip(first_rows, plan.sequences, plan.states, strict=True)
    return DeltaSpans.of([StateSpan(row, step.num_tokens, *state) for row, step, state in works], num_rows, ops.device)


def _ahead(table: Sequence[BlockId], index: int, block_tokens: int) -> int:
    """Difference between slot and position in a sequence's `index`-th block."""
    return (table[index] - index) * block_tokens


def _slots(table: Sequence[BlockId], positions: range, block_tokens: int) -> Iterator[int]:
    for index in range(positions.start // block_tokens, len(table)):
        ahead, first = _ahead(table, index, block_tokens), index * block_tokens
        yield from range(ahead + max(first, positions.start), ahead + min(first + block_tokens, positions.stop))


def _scored_rows(plan: StepPlan, first_rows: Sequence[int]) -> Iterator[int]:
    """Rows of prompt tokens whose next token gets a logprob (prompt_logprobs)."""
    for first, step in zip(first_rows, plan.sequences, strict=True):
        if step.targets:
            yield from range(first, first + len(step.targets))


def _int64(numbers: list[int]) -> Tensor:
    return torch.frombuffer(array("q", numbers), dtype=torch.int64)  # `torch.tensor` takes several times as long


def warm_up_batch(block_tokens: int, ops: Ops, num_tokens: int = 1) -> StepBatch:
    """Batch of a step that writes nothing: at most a block's tokens, which read the store's block 0."""
    rows = num_tokens + -num_tokens % ops.row_multiple
    return StepBatch(
        token_ids=torch.zeros(rows, dtype=torch.int64),
        positions=torch.zeros(rows, dtype=torch.int64),
        slots=torch.full((rows,), -1),
        attention=ops.lay_out((Span(0, 0, num_tokens, (BlockId(0),)),), block_tokens),
        num_rows=rows,
        first_rows=(0,),
        sampled=(0,),
        sample_rows=(0,) * ops.row_multiple,
        read_rows=(0,),
    )
