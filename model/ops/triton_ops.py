"""The decoder's ops on a GPU: our Triton kernels, and cuBLAS for products. Runs in Triton's interpreter on CPU tensors.

In norms, gates, attention and the cache a row depends on itself only. cuBLAS chooses the kernel of a product by the
number of rows: so, unlike on the CPU, the last bits of a row may depend on the other rows of the step. int8 weights are
rounded to 8 bits when packed and stay in the compute dtype: the results of 8-bit weights, without the smaller size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from torch.nn.functional import linear

from ...core.errors import ConfigError
from ...kernels.gpu import activation as activation_kernel
from ...kernels.gpu import launch, norm
from ...kernels.gpu.paged_decode import paged_decode_attention
from ...kernels.gpu.ragged_prefill import ragged_prefill_attention
from ...kernels.gpu.rotary_store import rotary_store_kv
from ...kernels.gpu.store_kv import store_kv
from ...kernels.reference import Planes
from ...kernels.reference_attention import Chunk
from ..sampling.noise import F32
from .composed import head
from .delta import DeltaJob, delta
from .extremes import Extremes, extremes
from .int4 import Int4Matrix, decoded
from .int8 import rounded_to_int8
from .low_rank import ComposedChange, add_changes, pack_change
from .seam import Activation, AttentionKind, Linear, Logits, LowRank, Norm, Quantization, RowsOfChange, Span
from .step import LayerStep
from .upload import upload


@dataclass(frozen=True, slots=True, eq=False)
class DeviceLinear:
    """Packed matrix on the device."""

    matrix: Tensor  # [out, in] compute dtype; float32 where exact
    bias: Tensor | None  # [out], of the same dtype
    exact: bool

    @property
    def num_bytes(self) -> int:
        """Memory of matrix and bias, in bytes."""
        return self.matrix.nbytes + (0 if self.bias is None else self.bias.nbytes)


@dataclass(slots=True, eq=False)
class Layout:
    """Spans of a step on the device, as the kernels read them: single rows first, then chunks, without gaps.

    `fresh`: the chunks' own keys and values of the layer stored last, as the cache rounds them.
    """

    num_singles: int
    single_tables: Tensor  # [singles, blocks] int32
    single_contexts: Tensor  # [singles] int32
    chunk_tables: Tensor  # [chunks, blocks] int32
    chunk_contexts: Tensor  # [chunks] int32
    chunk_starts: Tensor  # [chunks + 1] int32: first row of each chunk, relative to the first chunk
    fresh: Chunk | None = None

    @classmethod
    def of_singles(cls, tables: Tensor, contexts: Tensor) -> Layout:
        """Layout of a step with one row per sequence, from existing tensors; a context of 0 is padding."""
        none = contexts[:0]
        return cls(len(contexts), tables, contexts, tables[:0], none, none)


class TritonOps:
    """Implements `seam.Ops` on one GPU."""

    row_multiple = 1
    holds_int4 = False

    def __init__(self, dtype: torch.dtype, device: torch.device | str, quantization: Quantization = "none") -> None:
        self.dtype = dtype
        device = torch.device(device)
        is_unnumbered = device.type == "cuda" and device.index is None
        self.device = torch.device("cuda", torch.cuda.current_device()) if is_unnumbered else device
        self.quantization = quantization
        self.description = (
            f"triton {triton.__version__} {launch.architecture(self.device)}, torch {torch.__version__} "
            f"{'MKL' if self.device.type == 'cpu' else torch.version.hip or torch.version.cuda}"
        ) + ("" if quantization == "none" else ", int8 weights")

    def pack(
        self,
        matrix: Tensor,
        bias: Tensor | None = None,
        *,
        exact: bool = False,
        gated: bool = False,
        wide: bool = False,
    ) -> DeviceLinear:
        """Copy a matrix [out, in] to the device, in the compute dtype."""
        dtype = torch.float32 if exact else self.dtype
        held = matrix.to(self.device)
        if self.quantization == "int8" and not exact:
            held = rounded_to_int8(held)
        held = held.to(dtype).contiguous()
        return DeviceLinear(held, None if bias is None else bias.to(self.device, dtype), exact)

    def pack_int4(
        self, matrix: Int4Matrix, bias: Tensor | None = None, *, gated: bool = False, wide: bool = False
    ) -> DeviceLinear:
        """Decode the matrix and pack it."""
        return self.pack(decoded(matrix), bias, gated=gated, wide=wide)

    def prepare(self) -> None:
        """Forbid TF32 and reduced-precision sums in products: they accumulate in float32."""
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def linear(self, x: Tensor, packed: Linear) -> Tensor:
        """Multiply x [rows, in] by the matrix and add its bias."""
        assert isinstance(packed, DeviceLinear)
        return linear(x.to(packed.matrix.dtype), packed.matrix, packed.bias)

    def head(self, x: Tensor, norm: Norm, packed: Linear) -> Logits:
        """Norm, then product."""
        return head(self, x, norm, packed)

    def extremes(self, logits: F32) -> Extremes:
        """Extremes by numpy."""
        return extremes(logits)

    def rms_norm(self, x: Tensor, norm_: Norm) -> Tensor:
        """Norm by `kernels/gpu/norm.py`."""
        return norm.rms_norm(x, norm_.weight, norm_.eps)

    def add_rms_norm(self, x: Tensor, delta: Tensor, norm_: Norm) -> tuple[Tensor, Tensor]:
        """Rounded sum x + delta, and the normalised sum."""
        return norm.add_rms_norm(x, delta, norm_.weight, norm_.eps)

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
        """Not supported: plain attention rotates in `store_heads`, other kinds are refused at start-up."""
        raise ConfigError("rotary positions outside plain attention are not served on 'cuda'; use model.device: cpu")

    def gated_linear(self, x: Tensor, packed: Linear, activation: Activation) -> Tensor:
        """activation(gate) * up."""
        return activation_kernel.act_mul(self.linear(x, packed), activation)

    def pack_change(self, parts: Sequence[LowRank], *, gate_width: int | None = None) -> ComposedChange:
        """Copy its matrices to the device, as float32."""
        return pack_change(self, parts)

    def add_changes(self, y: Tensor, x: Tensor, changes: Sequence[RowsOfChange]) -> None:
        """Add by a product per change and side."""
        add_changes(self, y, x, changes)

    def halves(self, x: Tensor, packed: Linear) -> Tensor:
        """Gate, then up."""
        return self.linear(x, packed)

    def gate(self, halves: Tensor, activation: Activation, width: int) -> Tensor:
        """activation(gate) * up."""
        return activation_kernel.act_mul(halves, activation)

    def write(self, parts: Sequence[Tensor], planes: Sequence[Planes], slots: Tensor) -> Tensor:
        """Store keys and values without rotation. Makes no digests; seals are computed later from the stored bytes."""
        (k, v), (k_planes, v_planes) = parts, planes
        return store_kv(k, v, slots, k_planes, v_planes).non_finite

    def store_heads(
        self, qkv: Tensor, num_heads: int, norms: tuple[Norm, Norm] | None, step: LayerStep
    ) -> tuple[Tensor, Tensor]:
        """Norms of heads, then one kernel that rotates, quantises, stores and digests."""
        num_kv_heads = (qkv.shape[1] - num_heads) // 2
        q, k, v = torch.split(qkv, [num_heads, num_kv_heads, num_kv_heads], dim=1)
        if norms is not None:
            q, k = self.rms_norm(q, norms[0]), self.rms_norm(k, norms[1])
        k_planes, v_planes = step.planes
        assert step.births is not None, "the store must be on the device"
        stored = rotary_store_kv(
            q, k, v, step.slots, step.rotation,
            k_planes=k_planes, v_planes=v_planes, seal=step.births.seal(step.layer),
        )  # fmt: skip
        step.births.add(step.layer, stored.digests)
        layout: Layout = step.layout
        if len(layout.chunk_contexts):
            layout.fresh = Chunk(stored.k[layout.num_singles :], stored.v[layout.num_singles :])
        return stored.q, stored.non_finite

    def delta(self, x: Tensor, job: DeltaJob) -> Tensor:
        """The definition."""
        return delta(x, job)

    def lay_out(self, spans: Sequence[Span], block_tokens: int) -> Layout:
        """Give leading spans of one row to the decode kernel and the rest to the prefill kernel. Rows stay in order."""
        num_singles = next((i for i, span in enumerate(spans) if span.num_rows > 1), len(spans))
        singles, chunks = spans[:num_singles], spans[num_singles:]
        starts = [0]
        for span in chunks:
            assert span.row == num_singles + starts[-1], "rows of spans lie back to back"
            starts.append(starts[-1] + span.num_rows)
        parts = (_tables(singles), _contexts(singles), _tables(chunks), _contexts(chunks))
        one, two, three, four, five = upload((*parts, torch.tensor(starts, dtype=torch.int32)), self.device)
        return Layout(num_singles, one, two, three, four, five)

    def attend(
        self,
        queries: Sequence[Tensor],
        keys: Sequence[Planes],
        values: Planes,
        layout: Layout,
        kind: AttentionKind,
        *,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attention by `kernels/gpu/paged_decode.py` (single rows) and `kernels/gpu/ragged_prefill.py` (chunks)."""
        (q,), (k,), cut = queries, keys, layout.num_singles
        answers = []
        if cut:
            answers.append(
                paged_decode_attention(
                    q[:cut],
                    k,
                    values,
                    layout.single_tables,
                    layout.single_contexts,
                    scale=kind.scale,
                    window=kind.window,
                    softcap=kind.softcap,
                    sinks=sinks,
                )
            )
        if len(layout.chunk_contexts):
            answers.append(
                ragged_prefill_attention(
                    q[cut:],
                    k,
                    values,
                    layout.chunk_tables,
                    layout.chunk_contexts,
                    query_starts=layout.chunk_starts,
                    scale=kind.scale,
                    window=kind.window,
                    softcap=kind.softcap,
                    sinks=sinks,
                    chunk=layout.fresh,
                )
            )
        return answers[0] if len(answers) == 1 else torch.cat(answers)


def _tables(spans: Sequence[Span]) -> Tensor:
    """Block tables int32 [spans, most blocks], padded with zeros."""
    tables = torch.zeros((len(spans), max((len(span.blocks) for span in spans), default=0)), dtype=torch.int32)
    for row, span in zip(tables, spans, strict=True):
        row[: len(span.blocks)] = torch.tensor(span.blocks, dtype=torch.int32)
    return tables


def _contexts(spans: Sequence[Span]) -> Tensor:
    return torch.tensor([span.end for span in spans], dtype=torch.int32)
