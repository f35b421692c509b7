"""A gated delta net between its projections, as a job of `kernels/cpu/recurrent/delta.cpp`. Knows no model."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from ...kernels.cpu import library as native
from .delta import DeltaJob

_KINDS = {torch.float32: native.FLOAT32, torch.bfloat16: native.BFLOAT16}


def native_job(x: Tensor, job: DeltaJob, out: Tensor) -> tuple[native.Delta, Any]:
    """The kernel's job, and what must live until it has run. x [rows, channels], out [rows, heads, value width]."""
    rates, parts, shape, spans, states = job
    assert spans is not None
    convs, memories = states
    memory_bytes, conv_bytes = 4 * memories.stride(0), 4 * convs.stride(0)
    memory, conv = memories.data_ptr(), convs.data_ptr()
    written = [each for span in spans.spans for each in span.written]
    all_marks = (native.DeltaMark * len(written))()
    for mark, (rows, place) in zip(all_marks, written, strict=True):
        mark.memory, mark.conv, mark.rows = memory + memory_bytes * place, conv + conv_bytes * place, rows
    all_spans = (native.DeltaSpan * len(spans.spans))()
    taken = 0
    for to, span in zip(all_spans, spans.spans, strict=True):
        to.memory, to.conv = memory + memory_bytes * span.source, conv + conv_bytes * span.source
        to.row, to.count, to.first_mark, to.num_marks = span.row, span.num_rows, taken, len(span.written)
        taken += len(span.written)
    rates = rates.float().contiguous()
    mixed = torch.empty(len(x), shape.conv_width, dtype=torch.float32)
    numbers = torch.empty(len(x), shape.num_value_heads, 3, dtype=torch.float32)
    assert x.stride(-1) == 1, "rows must be dense"
    made = native.Delta(
        x=native.Rows(x.data_ptr(), x.stride(0), len(x), _KINDS[x.dtype]),
        rates=rates.data_ptr(),
        taps=parts.taps.data_ptr(),
        decay=parts.decay.data_ptr(),
        step_bias=parts.step_bias.data_ptr(),
        mixed=mixed.data_ptr(),
        numbers=numbers.data_ptr(),
        out=native.Rows(out.data_ptr(), out.stride(0), len(out), _KINDS[out.dtype]),
        spans=ctypes.addressof(all_spans),
        marks=ctypes.addressof(all_marks),
        num_spans=len(spans.spans),
        num_taps=shape.num_taps,
        key_heads=shape.num_key_heads,
        heads=shape.num_value_heads,
        key_width=shape.key_width,
        value_width=shape.value_width,
    )
    return made, (all_spans, all_marks, rates, mixed, numbers)
