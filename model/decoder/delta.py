"""A gated delta net in a layer: projections, the recurrence of ../ops/delta.py, a gated norm. Knows no cache."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ...checkpoint.spec import DeltaNet
from ...kv.store.states import LayerStates
from ..ops.delta import DeltaJob, DeltaParts
from ..ops.delta_spans import DeltaSpans
from ..ops.elementwise import activated
from ..ops.seam import Ops
from ..weights.weights import DeltaWeights


class StepStates(NamedTuple):
    """States of one layer, and the rows of a step that read and write them."""

    spans: DeltaSpans | None  # None: all rows are padding
    states: LayerStates


def mix_delta(ops: Ops, h: Tensor, weights: DeltaWeights, shape: DeltaNet, at: StepStates) -> Tensor:
    """Output [rows, hidden] for h [rows, hidden]; the states that the spans name are written."""
    both = ops.linear(h, weights.input)  # [rows, channels, then gates]
    parts = DeltaParts(weights.taps, weights.decay, weights.step_bias)
    job = DeltaJob(ops.linear(h, weights.rates), parts, shape, at.spans, at.states)
    read = ops.delta(both[:, : shape.conv_width], job)
    normed = ops.rms_norm(read, weights.norm).flatten(1)
    gates = activated(both[:, shape.conv_width :].float(), "silu")
    return ops.linear((normed.float() * gates).to(h.dtype), weights.output)
