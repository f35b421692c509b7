"""Hidden rows of the last step, from which heads guess. Knows no head; only the steps' thread may use it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from ...core.request import SequenceKey
from ...engine.plan import StepPlan
from ..batch import StepBatch
from ..decoder.decoder import Hidden


class HiddenKeeper(Protocol):
    """Keeps hidden rows of a runner's last step."""

    @property
    def layers(self) -> Sequence[int]:
        """Layers before which the residual stream is wanted, ascending. The number of layers: after the last."""
        ...

    def keep(self, plan: StepPlan, batch: StepBatch, hidden: Hidden) -> None:
        """Take the rows of a step, and forget those of earlier steps.

        A failed step is repeated one sequence at a time, each under the step's number.
        """
        ...


class _Place(NamedTuple):
    rows: Tensor  # of all sequences of its step
    row: int  # the sequence's first one
    position: int  # of that row
    num_rows: int


class SampledRows:
    """The residual stream of the rows from which the last step sampled.

    A row of a draft that was rejected has no use: nobody asks for its position before it is computed again.
    """

    layers: Sequence[int] = ()

    def __init__(self) -> None:
        self._step = -1
        self._places: dict[SequenceKey, _Place] = {}

    def keep(self, plan: StepPlan, batch: StepBatch, hidden: Hidden) -> None:
        """Implements `HiddenKeeper.keep`."""
        rows = hidden.rows
        if plan.step != self._step:
            self._step, self._places = plan.step, {}
        if not batch.sampled:
            return
        spoken = batch.spoken(rows)
        if rows.device.type != "cpu" and spoken.data_ptr() == rows.data_ptr():
            spoken = rows.clone()  # a graph's own memory, which its next replay overwrites
        row = 0
        for step in plan.sequences:
            if step.samples:
                count = 1 + len(step.draft_ids)
                self._places[step.key] = _Place(spoken, row, step.end - 1, count)
                row += count

    def find(self, key: SequenceKey, position: int) -> Tensor | None:
        """The row [hidden] of a sequence at a position; None: the last step did not sample from it."""
        place = self._places.get(key)
        if place is None or not 0 <= position - place.position < place.num_rows:
            return None
        return place.rows[place.row + position - place.position]


class TappedRows:
    """The residual stream of all rows of the last step, before some of the model's layers, side by side."""

    def __init__(self, layers: Sequence[int]) -> None:
        """`layers`: as `HiddenKeeper.layers`; at least one."""
        self.layers: Sequence[int] = tuple(layers)
        self._step = -1
        self._places: dict[SequenceKey, _Place] = {}

    def keep(self, plan: StepPlan, batch: StepBatch, hidden: Hidden) -> None:
        """Implements `HiddenKeeper.keep`."""
        if plan.step != self._step:
            self._step, self._places = plan.step, {}
        assert hidden.taps is not None, "the step was computed without taps"
        for first, step in zip(batch.first_rows, plan.sequences, strict=True):
            self._places[step.key] = _Place(hidden.taps, first, step.start, step.num_tokens)

    def find(self, key: SequenceKey, start: int, count: int) -> Tensor:
        """Rows [count, len(layers) * hidden] of a sequence from position `start` on.

        Raises:
            KeyError, AssertionError: the last step did not compute them.
        """
        place = self._places[key]
        first = start - place.position
        assert 0 <= first <= first + count <= place.num_rows, (
            f"{key} has {place.num_rows} rows from {place.position} on"
        )
        return place.rows[place.row + first : place.row + first + count]
