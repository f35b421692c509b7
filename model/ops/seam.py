"""Interface between the decoder and a device: the operations that a device must compute. Knows no model.

Three implementations: `torch_ops.py` (torch, any machine; its results are the definition), `native_ops.py` (our own CPU
kernels) and `triton_ops.py` (a GPU). On a CPU an op's result for a row depends on that row only, and for attention on
its own prefix, but never on other rows, their number, or the number of threads. On a GPU all ops except products keep
this. `x` is [rows, ...] contiguous in the compute dtype; arithmetic inside an op is float32, rounded to the compute
dtype once at its end, except where an op says otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from ...kernels.reference import Planes
from ...kv.block import BlockId

if TYPE_CHECKING:
    from ..sampling.noise import F32
    from .delta import DeltaJob
    from .extremes import Extremes
    from .int4 import Int4Matrix
    from .step import LayerStep

Activation = Literal["silu", "gelu_tanh", "clamped_swiglu"]
Quantization = Literal["none", "int8"]


@dataclass(frozen=True, slots=True)
class Norm:
    """Root mean square norm. `weight` [width] float32 multiplies the normalised numbers; it includes Gemma's 1."""

    weight: Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class AttentionKind:
    """Attention parameters of one layer. A query at position p sees keys j <= p and, with a window, j > p - window."""

    scale: float
    window: int | None = None
    softcap: float | None = None  # scores become softcap * tanh(scores / softcap)


class Span(NamedTuple):
    """Rows of one sequence in a step: `num_rows` queries from batch row `row`, the first at position `start`."""

    row: int
    start: int
    num_rows: int
    blocks: tuple[BlockId, ...]  # covers start + num_rows tokens, in order of position

    @property
    def end(self) -> int:
        """Number of the sequence's tokens in the cache after the step has stored its own."""
        return self.start + self.num_rows


class Logits(NamedTuple):
    """Logits of the selected rows."""

    rows: Tensor  # [n, vocab] float32
    extremes: Extremes | None  # if the head computed them already


class Linear(Protocol):
    """Packed matrix. Only the ops that packed it can use it."""

    @property
    def num_bytes(self) -> int:
        """Memory of the packed matrix, in bytes."""
        ...


class LowRank(NamedTuple):
    """Part of a low-rank change of a matrix: scale * B A, added to the rows [first_row, first_row + len(b)) of it."""

    a: Tensor  # [rank, in] any dtype
    b: Tensor  # [rows, rank] of the same dtype
    scale: float
    first_row: int


class Change(Protocol):
    """Packed low-rank change of one matrix. Only the ops that packed it can use it."""

    @property
    def num_bytes(self) -> int:
        """Memory of its matrices, in bytes."""
        ...


class RowsOfChange(NamedTuple):
    """Rows of a step that a change applies to."""

    change: Change
    rows: Tensor  # [n] int64, ascending, on the device of the ops; n > 0


class Ops(Protocol):
    """Operations of one device in one compute dtype. To be used by one thread at a time."""

    dtype: torch.dtype
    device: torch.device
    """Device of rows, weights and results of `lay_out`."""
    row_multiple: int
    """Batches are padded to a multiple of this many rows (16 for torch's tiles; 1: no padding)."""
    holds_int4: bool
    """Whether `pack_int4` keeps a matrix in its 4 bits; else it is decoded, and the source does that in less memory."""
    description: str
    """Part of the numerics class: everything that can change a bit of a result, except the machine."""

    def pack(
        self,
        matrix: Tensor,
        bias: Tensor | None = None,
        *,
        exact: bool = False,
        gated: bool = False,
        wide: bool = False,
    ) -> Linear:
        """Pack a matrix [out, in] and a bias [out] for `linear`. They have any dtype and may be views of a file.

        `gated`: for `gated_linear`; the first half of its rows is the gate. `exact` (e.g. the router of experts): never
        quantised, and `linear` returns float32, not rounded. `wide` (the head): may return float32 where that is cheap.
        """
        ...

    def pack_int4(
        self, matrix: Int4Matrix, bias: Tensor | None = None, *, gated: bool = False, wide: bool = False
    ) -> Linear:
        """Pack a matrix of 4-bit groups; the rest as in `pack`. Where it stays packed, its numbers are not rounded."""
        ...

    def prepare(self) -> None:
        """Choose forms of products and threads. Called once, after packing, in the thread that runs the steps."""
        ...

    def linear(self, x: Tensor, packed: Linear) -> Tensor:
        """Multiply x [rows, in] by the matrix and add its bias: [rows, out]; rows is a multiple of `row_multiple`."""
        ...

    def head(self, x: Tensor, norm: Norm, packed: Linear) -> Logits:
        """Normalise x [rows, hidden] and multiply it by the head's matrix, which was packed `wide`."""
        ...

    def extremes(self, logits: F32) -> Extremes:
        """Extremes of each row of logits [n, vocab] on the CPU, contiguous."""
        ...

    def gated_linear(self, x: Tensor, packed: Linear, activation: Activation) -> Tensor:
        """Gated activation (kernels/reference.py: `act_mul`): [rows, width].

        Gate and up are the rounded halves of the result of `linear`.
        """
        ...

    def pack_change(self, parts: Sequence[LowRank], *, gate_width: int | None = None) -> Change:
        """Pack a low-rank change of one matrix. Any thread may call it.

        `gate_width`: rows of the gate, if the matrix was packed as gated; then each part begins and ends with a half.
        """
        ...

    def add_changes(self, y: Tensor, x: Tensor, changes: Sequence[RowsOfChange]) -> None:
        """Add to each row of y, which is the result of `linear` or `halves` for x, its change of the matrix; in place.

        No row has two changes. float32 inside; the sum is rounded once more.
        """
        ...

    def halves(self, x: Tensor, packed: Linear) -> Tensor:
        """Gate and up of x [rows, in] times a gated matrix, rounded, in an order of columns that `gate` knows."""
        ...

    def gate(self, halves: Tensor, activation: Activation, width: int) -> Tensor:
        """Gated activation of a result of `halves`: [rows, width]; the bits of `gated_linear`."""
        ...

    def rms_norm(self, x: Tensor, norm: Norm) -> Tensor:
        """Normalise the last axis of x [rows, ..., width]."""
        ...

    def add_rms_norm(self, x: Tensor, delta: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        """Return the rounded sum x + delta, and the normalised sum. May reuse the memory of x for the sum."""
        ...

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
        """Rotate the first 2 * w numbers of each head of x [rows, heads, width]; cos, sin [rows, w] float32.

        Pairs are (i, i + w), or (2i, 2i + 1) when interleaved. May reuse the memory of x. x may be a view whose rows
        are wider than heads * width.
        """
        ...

    def write(self, parts: Sequence[Tensor], planes: Sequence[Planes], slots: Tensor) -> Tensor:
        """Encode and store rows: part i [rows, heads_i, width_i] (perhaps a view) into planes i, at slots [rows] int64.

        Negative slots (padding, last) are skipped. Returns int32 [rows]: number of vectors that were not finite.
        """
        ...

    def store_heads(
        self, qkv: Tensor, num_heads: int, norms: tuple[Norm, Norm] | None, step: LayerStep
    ) -> tuple[Tensor, Tensor]:
        """Split qkv [rows, num_heads + 2 * kv_heads, width] of plain attention; store its keys and values.

        Queries and keys are normalised (by `norms`, in this order) and rotated; keys and values are written. Returns
        the queries [rows, num_heads, width] and the result of `write`. Fused into one pass where the device can.
        """
        ...

    def lay_out(self, spans: Sequence[Span], block_tokens: int) -> Any:
        """Prepare a step's spans for `attend`; called once per step."""
        ...

    def attend(
        self,
        queries: Sequence[Tensor],
        keys: Sequence[Planes],
        values: Planes,
        layout: Any,
        kind: AttentionKind,
        *,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attention of a step's rows to the cache, including their own tokens, which were written before.

        A score is the sum over parts of query part i [rows, heads, width_i] with key part i (planes of kv_heads_i = the
        values' heads): one part for plain attention, two (latent and rotary) for MLA, where the values are the planes
        of the first part. Parts may be views. Keys and values have codecs of their own. Returns [rows, heads, value
        width]; rows that belong to no span are zero.

        `sinks` [heads] float32, for plain attention: a score of each head that takes part in the softmax of its rows,
        without a value, and without scale or softcap.
        """
        ...

    def delta(self, x: Tensor, job: DeltaJob) -> Tensor:
        """Convolution and recurrence of a gated delta net, as delta.py defines them.

        x [rows, channels], perhaps a view. Returns [rows, value heads, value width]; rows of no span are zero. The
        states that the job's spans name are written.
        """
        ...
