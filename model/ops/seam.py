"""What the decoder asks of a device: the seam between the model's definition and what computes it. Knows no model.

Three implementations: `torch_ops.py` (torch, any machine; its answers are the definition), `native_ops.py` (our own CPU
kernels) and `triton_ops.py` (a GPU). On a CPU every op's answer for a row depends on that row alone, and for attention
on its own prefix: never on the other rows, their number, or the number of threads; on a GPU all but products keep that.
`x` is [rows, ...] contiguous in the compute dtype; arithmetic inside an op is float32, rounded to the compute dtype
once at its end, except where an op says otherwise.
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
    from .extremes import Extremes
    from .step import LayerStep

Activation = Literal["silu", "gelu_tanh"]
Quantization = Literal["none", "int8"]


@dataclass(frozen=True, slots=True)
class Norm:
    """A root mean square norm. `weight` [width] float32 multiplies what was normalised (Gemma's 1 is in it)."""

    weight: Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class AttentionKind:
    """How one layer attends. A query at position p sees keys j with j <= p, and p - window < j where there is one."""

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
        """Tokens in the cache once the step has stored its own."""
        return self.start + self.num_rows


class Logits(NamedTuple):
    """Of some rows."""

    rows: Tensor  # [n, vocab] float32
    extremes: Extremes | None  # where they were found on the way


class Linear(Protocol):
    """A packed matrix; only the ops that packed it can use it."""

    @property
    def num_bytes(self) -> int:
        """Memory it holds."""
        ...


class Ops(Protocol):
    """One device in one compute dtype. One thread at a time."""

    dtype: torch.dtype
    device: torch.device
    """Where rows and weights are; results of `lay_out` too."""
    row_multiple: int
    """Batches are padded to this many rows (16 for torch's tiles, 1 where nothing is gained by it)."""
    description: str
    """Part of the numerics class: what a bit of an answer can depend on, besides the machine."""

    def pack(
        self,
        matrix: Tensor,
        bias: Tensor | None = None,
        *,
        exact: bool = False,
        gated: bool = False,
        wide: bool = False,
    ) -> Linear:
        """Take a matrix [out, in] and a bias [out] for `linear`, of any dtype, perhaps views of a file.

        `gated`: for `gated_linear`, its upper half the gate. `exact` (a router of experts, for one): never quantised,
        and `linear` answers in float32, not rounded. `wide` (the head): it may answer in float32, where that is cheap.
        """
        ...

    def prepare(self) -> None:
        """Choose forms and threads. Called once, after packing, in the thread that will run the steps."""
        ...

    def linear(self, x: Tensor, packed: Linear) -> Tensor:
        """x [rows, in] times the matrix, plus its bias: [rows, out]; rows a multiple of `row_multiple`."""
        ...

    def head(self, x: Tensor, norm: Norm, packed: Linear) -> Logits:
        """The matrix of logits, packed `wide`, times rows x [rows, hidden] once they are normalised."""
        ...

    def extremes(self, logits: F32) -> Extremes:
        """Of logits on the CPU, whole rows one after the other."""
        ...

    def gated_linear(self, x: Tensor, packed: Linear, activation: Activation) -> Tensor:
        """activation(gate) * up: [rows, width]. Gate and up are the halves of what `linear` would give, rounded."""
        ...

    def rms_norm(self, x: Tensor, norm: Norm) -> Tensor:
        """Normalise the last axis of x [rows, ..., width]."""
        ...

    def add_rms_norm(self, x: Tensor, delta: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        """(x + delta rounded, that normalised). May reuse the memory of x for the sum."""
        ...

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
        """Rotate the first 2 * w numbers of each head of x [rows, heads, width]; cos, sin [rows, w] float32.

        Pairs are (i, i + w), or (2i, 2i + 1) when interleaved. May reuse the memory of x. x may be a view whose rows
        are wider than heads * width.
        """
        ...

    def write(self, parts: Sequence[Tensor], planes: Sequence[Planes], slots: Tensor) -> Tensor:
        """Encode and store rows: part i [rows, heads_i, width_i] (perhaps a view) into planes i, at slots [rows] int64.

        Negative slots (padding, last) are skipped. Returns int32 [rows]: numbers of vectors that were not finite.
        """
        ...

    def store_heads(
        self, qkv: Tensor, num_heads: int, norms: tuple[Norm, Norm] | None, step: LayerStep
    ) -> tuple[Tensor, Tensor]:
        """Of qkv [rows, num_heads + 2 * kv_heads, width]: queries, keys and values of one layer of plain attention.

        Queries and keys are normalised (where there are norms, in this order) and rotated; keys and values written.
        Returns the queries [rows, num_heads, width], and what `write` returns. In one pass where the device can.
        """
        ...

    def lay_out(self, spans: Sequence[Span], block_tokens: int) -> Any:
        """What `attend` needs of a step's spans, made once per step."""
        ...

    def attend(
        self, queries: Sequence[Tensor], keys: Sequence[Planes], values: Planes, layout: Any, kind: AttentionKind
    ) -> Tensor:
        """Attention of a step's rows to what the cache holds, own tokens included (they were written before).

        A score is the sum over parts of query part i [rows, heads, width_i] with key part i (planes of kv_heads_i = the
        values' heads): one part for plain attention, two (latent and rotary) for MLA, where the values are the planes
        of the first part. Parts may be views. All planes are of one codec. Returns [rows, heads, value width]; rows of
        no span are zero.
        """
        ...
