"""Rows of a step's sequences as recurrent layers take them: by time, and with the inputs before them. Knows no weights.

rows of a step    | a0 a1 a2 | b0 | c0 c1 |          spans by length: a, c, b
time 0            a0 c0 b0                           all spans
time 1            a1 c1                              those that are long enough
time 2            a2
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class StateSpan(NamedTuple):
    """Rows of one sequence, and the places of the states that they read and write (engine/plan.py: `StateMove`)."""

    row: int
    num_rows: int
    source: int
    target: int
    marks: tuple[tuple[int, int], ...]

    @property
    def written(self) -> tuple[tuple[int, int], ...]:
        """(rows, place) of each state that is written: after so many rows."""
        return (*self.marks, (self.num_rows, self.target))


@dataclass(frozen=True, slots=True, eq=False)
class DeltaSpans:
    """Spans of a step, the longest first, and index tensors that all its recurrent layers share."""

    spans: tuple[StateSpan, ...]
    num_rows: int  # of the step, padding included
    sources: Tensor  # [spans] int64
    first_rows: Tensor  # [spans] int64
    places: Tensor  # [states] int64: of the states that are written
    after: tuple[tuple[int, int, int], ...]  # (rows, span, place) of each written state, ascending by rows
    made: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # results of `inputs`, by number of taps

    @staticmethod
    def of(spans: Sequence[StateSpan], num_rows: int, device: torch.device) -> DeltaSpans:
        """Order spans; none may be empty."""
        ordered = tuple(sorted(spans, key=lambda span: -span.num_rows))
        after = sorted((rows, i, place) for i, span in enumerate(ordered) for rows, place in span.written)
        return DeltaSpans(
            ordered,
            num_rows,
            _int64([span.source for span in ordered], device),
            _int64([span.row for span in ordered], device),
            _int64([place for _, _, place in after], device),
            tuple(after),
        )

    def num_active(self, time: int) -> int:
        """Number of spans that have a row at this time."""
        return sum(span.num_rows > time for span in self.spans)

    def inputs(self, num_taps: int) -> tuple[Tensor, Tensor]:
        """Results of `_taps` and `_tails`, made once per step."""
        if num_taps not in self.made:
            device = self.first_rows.device
            self.made[num_taps] = self._taps(num_taps).to(device), self._tails(num_taps).to(device)
        return self.made[num_taps]

    def _taps(self, num_taps: int) -> Tensor:
        """Indices [num_taps, rows] of each row's inputs, its own last.

        They count the `num_taps` - 1 inputs that each span's source keeps, span by span, then the rows of the step.
        Rows of no span have their own input only.
        """
        kept = num_taps - 1
        before = kept * len(self.spans)
        own = torch.arange(self.num_rows, dtype=torch.int64) + before
        taps = own.expand(num_taps, -1).clone()
        for i, span in enumerate(self.spans):
            rows = range(span.row, span.row + span.num_rows)
            taps[:, rows.start : rows.stop] = self._inputs(i, span.num_rows, kept).unfold(0, num_taps, 1).t()
        return taps

    def _tails(self, num_taps: int) -> Tensor:
        """Indices [states, num_taps - 1] of the inputs that each written state keeps; they count as in `_taps`."""
        kept = num_taps - 1
        tails = [self._inputs(i, rows, kept)[rows:] for rows, i, _ in self.after]
        return torch.stack(tails)

    def _inputs(self, index: int, num_rows: int, kept: int) -> Tensor:
        """Indices [kept + num_rows] of a span's inputs: those that its source keeps, then its own."""
        own = kept * len(self.spans) + self.spans[index].row
        return torch.cat((torch.arange(kept) + kept * index, torch.arange(num_rows) + own))


def _int64(numbers: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device=device)
