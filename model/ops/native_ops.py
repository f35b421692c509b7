"""The decoder's ops by the C++ kernels of `kernels/cpu`. Knows no model.

Weights are packed once, into panels that decode and prefill share. The bits of a row depend on that row alone (see
`linear/linear.cpp`, `attention.cpp`, `rows.cpp` of `kernels/cpu/`), so batches need no padding and the number of
threads does not matter.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...kernels.cpu import library as native
from ...kernels.cpu.memory import take_memory
from ...kernels.reference import Planes
from ...kv.block import BlockId
from ..sampling.noise import F32
from .composed import head, store_heads
from .delta import DeltaJob
from .extremes import Extremes
from .int4 import Int4Matrix, decoded, with_rows
from .int8 import described, to_int8
from .native_changes import PackedChange
from .native_changes import described as changes_at_once
from .native_delta import native_job
from .native_int4 import int4_panels
from .seam import Activation, AttentionKind, Linear, Logits, LowRank, Norm, Quantization, RowsOfChange, Span
from .step import LayerStep

ACTIVATIONS = {"silu": native.SILU, "gelu_tanh": native.GELU_TANH, "clamped_swiglu": native.CLAMPED_SWIGLU}
_REMEMBERED_TABLES = 512
KINDS = {torch.float32: native.FLOAT32, torch.bfloat16: native.BFLOAT16}
BYTE_CODES = {"e4m3": native.FP8, "e5m2": native.E5M2, "int8": native.INT8, "int8_channel": native.CHANNEL}


@dataclass(frozen=True, slots=True, eq=False)
class PackedLinear:
    """A matrix [out, in] in panels, and the memory that `matrix` points to."""

    matrix: native.Matrix
    panels: Tensor  # uint8
    scales: Tensor | None  # [columns padded to 16] float32: int8 only
    bias: Tensor | None  # [columns padded to 16] float32
    dtype: torch.dtype  # of the rows that it multiplies
    width: int  # numbers per row of the product
    order: Tensor | None = None  # int32 [inner]: 4-bit groups only

    @property
    def num_bytes(self) -> int:
        """Bytes of memory that it owns."""
        return sum(part.nbytes for part in (self.panels, self.scales, self.bias, self.order) if part is not None)


class _Table(NamedTuple):
    """Block table of a sequence as the kernel reads it."""

    blocks: array[int]  # int32
    address: int


@functools.lru_cache(maxsize=_REMEMBERED_TABLES)
def _table(blocks: tuple[BlockId, ...]) -> _Table:
    """Block table of `blocks`, cached: a decoding sequence keeps its blocks for many steps."""
    table = array("i", blocks)
    return _Table(table, table.buffer_info()[0])


_SPAN = np.dtype([("blocks", np.uint64), *((name, np.int32) for name in ("row", "start", "count", "reserved"))])
assert _SPAN.itemsize == ctypes.sizeof(native.AttendSpan)


@dataclass(frozen=True, slots=True, eq=False)
class StepSpans:
    """A step's spans as the kernel reads them. `array` is built in half of the time of a numpy array."""

    words: array[int]  # three int64 per span, the bytes of a native.AttendSpan
    num_rows: int
    tables: list[_Table]  # the spans point to these

    @property
    def count(self) -> int:
        """Number of spans."""
        return len(self.tables)

    @property
    def address(self) -> int:
        """Address of the first span."""
        return self.words.buffer_info()[0]


class NativeOps:
    """`seam.Ops` on the CPU, by `num_threads` threads of its own. For one caller at a time.

    Raises:
        NativeUnavailable: the kernels cannot be built here.
    """

    row_multiple = 1
    device = torch.device("cpu")

    def __init__(self, dtype: torch.dtype, num_threads: int = 1, quantization: Quantization = "none") -> None:
        self.dtype = dtype
        self.num_threads = num_threads
        self.quantization = quantization
        self.holds_int4 = quantization == "none"
        self._library = native.load()
        level = self._library.level().decode()
        self.description = f"native {level}" + described(quantization, dtype)
        self._threads = ctypes.c_void_p(self._library.start_threads(num_threads))
        self._scratch = take_memory(1 << 20)

    def __del__(self) -> None:
        if hasattr(self, "_threads"):
            self._library.stop_threads(self._threads)

    def pack(
        self,
        matrix: Tensor,
        bias: Tensor | None = None,
        *,
        exact: bool = False,
        gated: bool = False,
        wide: bool = False,
    ) -> PackedLinear:
        """Copy a matrix [out, in] into panels: in the compute dtype, or int8 with one scale per output.

        bfloat16 is stored in twelve bits without loss where its exponents allow that (`kernels/cpu/linear/coded.h`).
        Panels of a gated matrix alternate between gate and up, so that one pass has both numbers in registers.
        """
        width = len(matrix) // 2 if gated else len(matrix)
        if gated:
            matrix, bias = _alternating(matrix), _alternating_bias(bias)
        columns, inner = matrix.shape
        scales: Tensor | None = None
        rounds = self.quantization == "int8" and not exact
        takes = torch.float32 if exact or (inner % 2 and not rounds) else self.dtype
        if not rounds:
            held, kind = matrix.to(takes), KINDS[takes]
        else:
            held, scales = to_int8(matrix)
            kind = native.INT8
        held, pairs = held.contiguous(), int(takes == torch.bfloat16)
        panel_bytes = self._library.panel_bytes(kind, inner, pairs)
        if kind == native.BFLOAT16:
            coded_bytes = self._library.coded_panel_bytes(self._threads, held.data_ptr(), columns, inner)
            if coded_bytes:
                kind, panel_bytes = native.CODED, coded_bytes
        panels = take_memory(-(-columns // native.LANES) * panel_bytes)
        self._library.pack(self._threads, held.data_ptr(), kind, columns, inner, pairs, panel_bytes, panels.data_ptr())
        scales, bias = _whole_panels(scales), _whole_panels(bias)
        packed = native.Matrix(
            panels.data_ptr(), address(scales), address(bias), panel_bytes, kind, columns, inner, int(exact or wide)
        )
        return PackedLinear(packed, panels, scales, bias, takes, width)

    def pack_int4(
        self, matrix: Int4Matrix, bias: Tensor | None = None, *, gated: bool = False, wide: bool = False
    ) -> PackedLinear:
        """Copy the numbers of 4 bits, scales and zero points into panels; rows meet them as they are."""
        if not self.holds_int4:
            return self.pack(decoded(matrix), bias, gated=gated, wide=wide)
        width = len(matrix.numbers) // 2 if gated else len(matrix.numbers)
        if gated:
            matrix, bias = with_rows(matrix, _alternating), _alternating_bias(bias)
        packed, panels = int4_panels(self._library, self._threads, matrix)
        bias = _whole_panels(bias)
        packed.bias, packed.float32_out = address(bias), int(wide)
        return PackedLinear(packed, panels, None, bias, self.dtype, width, matrix.order)

    def prepare(self) -> None:
        """Reduce torch to one thread: its threads would spin after every op and slow down the kernels' own."""
        torch.set_num_threads(1)

    def linear(self, x: Tensor, packed: Linear) -> Tensor:
        """x [rows, in] times the matrix, plus its bias; [rows, out]."""
        return self._multiply(x, packed, native.NO_ACTIVATION)

    def gated_linear(self, x: Tensor, packed: Linear, activation: Activation) -> Tensor:
        """activation(gate) * up of x [rows, in] times a gated matrix; [rows, out / 2]."""
        return self._multiply(x, packed, ACTIVATIONS[activation])

    def pack_change(self, parts: Sequence[LowRank], *, gate_width: int | None = None) -> PackedChange:
        """Copy its matrices, bfloat16 as such, others as float32."""
        return PackedChange.of(parts, gate_width)

    def add_changes(self, y: Tensor, x: Tensor, changes: Sequence[RowsOfChange]) -> None:
        """Add all changes in one call."""
        adapters, _held = changes_at_once(changes)
        self._library.add_changes(self._threads, adapters, len(adapters), 0, _rows(x), _rows(y))

    def halves(self, x: Tensor, packed: Linear) -> Tensor:
        """Sixteen numbers of the gate, sixteen of up, and so on."""
        assert isinstance(packed, PackedLinear)
        x = x.to(packed.dtype)
        columns = packed.matrix.columns
        out = torch.empty(len(x), columns, dtype=self.dtype)
        scratch = self.scratch_for(len(x), packed.matrix.inner)
        self._library.linear(self._threads, packed.matrix, _rows(x), _rows(out), native.NO_ACTIVATION, columns, scratch)
        return out

    def gate(self, halves: Tensor, activation: Activation, width: int) -> Tensor:
        """activation(gate) * up."""
        out = torch.empty(len(halves), width, dtype=halves.dtype)
        self._library.gate(self._threads, _rows(halves), _rows(out), ACTIVATIONS[activation], width)
        return out

    def _multiply(self, x: Tensor, packed: Linear, activation: int) -> Tensor:
        assert isinstance(packed, PackedLinear)
        matrix = packed.matrix
        x = x.to(packed.dtype)
        rows = x.shape[0]
        scratch = self.scratch_for(rows, matrix.inner)
        out = torch.empty(rows, packed.width, dtype=torch.float32 if matrix.float32_out else self.dtype)
        self._library.linear(self._threads, matrix, _rows(x), _rows(out), activation, packed.width, scratch)
        return out

    def scratch_for(self, rows: int, inner: int) -> int:
        """Address of scratch for a `linear` of rows [rows, inner]; valid until the next call."""
        needed = (rows + 32) * (4 * inner + 16)
        if needed > len(self._scratch):
            self._scratch = take_memory(needed)
        return self._scratch.data_ptr()

    def run_layers(self, layers: ctypes.Array[native.Layer], step: native.Step) -> int:
        """Run all layers over a step; returns the number of vectors of keys and values that were not finite.

        Below zero, if the step's group failed: `native.GROUP_FAILED` plus the failure.
        """
        return int(self._library.layers(self._threads, layers, len(layers), step))

    def head(self, x: Tensor, norm: Norm, packed: Linear) -> Logits:
        """Norm, product and extremes in one call: float32 logits [rows, vocabulary] of hidden rows x [rows, hidden]."""
        assert isinstance(packed, PackedLinear)
        if packed.dtype != x.dtype:
            return head(self, x, norm, packed)
        h, out = torch.empty_like(x), torch.empty(len(x), packed.width, dtype=torch.float32)
        found, places = _room_for_extremes(len(x))
        self._library.head(
            self._threads, packed.matrix, norm.weight.data_ptr(), norm.eps, _rows(x), _rows(h), _rows(out),
            self.scratch_for(len(x), x.shape[1]), *places,
        )  # fmt: skip
        return Logits(out, found)

    def extremes(self, logits: F32) -> Extremes:
        """Least and greatest number and argmax of each row of float32 logits [rows, vocabulary]."""
        assert logits.flags.c_contiguous
        found, places = _room_for_extremes(len(logits))
        rows = native.Rows(logits.ctypes.data, logits.shape[1], len(logits), native.FLOAT32)
        self._library.extremes(self._threads, rows, logits.shape[1], *places)
        return found

    def rms_norm(self, x: Tensor, norm: Norm) -> Tensor:
        """Normalise the last axis of x [rows, ..., width]; x may be a view of wider rows."""
        out = torch.empty(x.shape, dtype=x.dtype)
        width = x.shape[-1]
        vectors = x[0].numel() // width
        self._library.rms_norm(
            self._threads, _rows(x), None, norm.weight.data_ptr(), norm.eps, vectors, width, _rows(out)
        )
        return out

    def add_rms_norm(self, x: Tensor, delta: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        """Add delta to x in place; returns x and the normalised sum, both [rows, hidden]."""
        out = torch.empty_like(x)
        self._library.rms_norm(
            self._threads, _rows(x), _rows(delta), norm.weight.data_ptr(), norm.eps, 1, x.shape[-1], _rows(out)
        )
        return x, out

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
        """Rotate x [rows, heads, width] in place; cos and sin [rows, w] float32."""
        _, heads, width = x.shape
        self._library.rotary(
            self._threads, _rows(x), heads, width, cos.data_ptr(), sin.data_ptr(), cos.shape[1], int(interleaved)
        )
        return x

    def write(self, parts: Sequence[Tensor], planes: Sequence[Planes], slots: Tensor) -> Tensor:
        """Encode rows and store them at `slots`; int32 [rows] counts vectors that were not finite."""
        non_finite = torch.empty(len(slots), dtype=torch.int32)
        jobs = (native.StorePart * len(parts))()
        for job, x, plane in zip(jobs, parts, planes, strict=True):
            heads, width = x.shape[1:]
            job.x, job.payload, job.scales = _rows(x), plane.payload.data_ptr(), address(plane.scales)
            job.heads, job.width, job.codec = heads, width, _codec(plane, width)
            job.block_tokens = plane.block_tokens
        self._library.write(self._threads, jobs, len(jobs), slots.data_ptr(), len(slots), non_finite.data_ptr())
        return non_finite

    def store_heads(
        self, qkv: Tensor, num_heads: int, norms: tuple[Norm, Norm] | None, step: LayerStep
    ) -> tuple[Tensor, Tensor]:
        """Normalise, rotate and store the heads of qkv op by op; returns queries, and counts as in `write`."""
        return store_heads(self, qkv, num_heads, norms, step)

    def delta(self, x: Tensor, job: DeltaJob) -> Tensor:
        """All in one call."""
        shape = job.shape
        out = torch.zeros(len(x), shape.num_value_heads, shape.value_width, dtype=x.dtype)
        if job.spans is not None:
            made, _held = native_job(x, job, out)
            self._library.delta(self._threads, made)
        return out

    def lay_out(self, spans: Sequence[Span], block_tokens: int) -> StepSpans:
        """A step's spans and block tables as the kernel reads them."""
        tables = [_table(span.blocks) for span in spans]
        words = [
            word
            for table, span in zip(tables, spans, strict=True)
            for word in (table.address, span.start << 32 | span.row, span.num_rows)
        ]
        return StepSpans(array("q", words), sum([span.num_rows for span in spans]), tables)

    def attend(
        self,
        queries: Sequence[Tensor],
        keys: Sequence[Planes],
        values: Planes,
        layout: StepSpans,
        kind: AttentionKind,
        *,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attention of the spans' rows to the cache; [rows, heads, value width]. Rows of no span are zeros.

        queries: per part [rows, heads, width]; the scores of all parts are added.
        """
        rows, heads, width = queries[0].shape
        value_width = values.width_like(keys[0], width)
        make = torch.empty if rows == layout.num_rows else torch.zeros
        out = make(rows, heads, value_width, dtype=self.dtype)
        job = native.Attend(num_parts=len(queries), num_spans=layout.count, heads=heads, spans=layout.address)
        job.window, job.scale, job.softcap = kind.window or 0, kind.scale, kind.softcap or 0.0
        job.sinks = address(sinks)
        for i, (q, plane) in enumerate(zip(queries, keys, strict=True)):
            job.queries[i], job.keys[i] = _rows(q), native_plane(plane, q.shape[-1])
        job.values, job.out = native_plane(values, value_width), _rows(out)
        self._library.attend(self._threads, job)
        return out


def single_rows(spans: StepSpans, rows: NDArray[np.int64]) -> StepSpans:
    """Spans of a batch that consists of the given rows of a step, in order; each row is a span of its own."""
    each = np.frombuffer(spans.words, _SPAN)
    of = np.searchsorted(each["row"], rows, side="right") - 1  # the span of each row
    single = each[of]
    single["row"], single["start"], single["count"] = np.arange(len(rows)), single["start"] + rows - single["row"], 1
    return StepSpans(array("q", single.tobytes()), len(rows), [spans.tables[i] for i in of])


def _room_for_extremes(count: int) -> tuple[Extremes, tuple[int, int, int]]:
    """Extremes of `count` rows to be filled in, and the addresses of the three arrays."""
    room = np.empty((3, count), np.float32)
    at = room.ctypes.data
    return Extremes(room[0], room[1], room[2].view(np.int32)), (at, at + 4 * count, at + 8 * count)


def _rows(x: Tensor) -> native.Rows:
    """Describe a tensor [rows, ...] whose rows are dense; the stride between rows is free."""
    assert x.stride(-1) == 1, "rows must be dense"
    return native.Rows(x.data_ptr(), x.stride(0), x.shape[0], KINDS[x.dtype])


def _codec(plane: Planes, width: int) -> int:
    if plane.scales is not None:
        return BYTE_CODES[plane.byte_code]
    return native.BFLOAT16 if plane.payload.shape[-1] == 2 * width else native.FLOAT32


def native_plane(plane: Planes, width: int) -> native.Plane:
    """Describe one layer's plane for the kernels; width: numbers per row."""
    heads, block_tokens = plane.payload.shape[1:3]
    return native.Plane(
        plane.payload.data_ptr(), address(plane.scales), _codec(plane, width), heads, block_tokens, width
    )


def address(x: Tensor | None) -> int | None:
    """Address of x; None for None."""
    return None if x is None else x.data_ptr()


def _whole_panels(x: Tensor | None) -> Tensor | None:
    """x [columns] as float32, padded to whole panels."""
    if x is None:
        return None
    return torch.nn.functional.pad(x.float(), (0, -len(x) % native.LANES)).contiguous()


def _alternating(matrix: Tensor) -> Tensor:
    """Reorder [2 * width, in], gate first: sixteen rows of the gate, sixteen of up, and so on; padded with zeros."""
    halves = matrix.view(2, len(matrix) // 2, -1)
    padded = torch.nn.functional.pad(halves, (0, 0, 0, -halves.shape[1] % native.LANES))
    return padded.view(2, -1, native.LANES, matrix.shape[1]).transpose(0, 1).reshape(-1, matrix.shape[1])


def _alternating_bias(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else _alternating(bias.unsqueeze(1)).squeeze(1)
