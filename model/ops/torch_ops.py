"""The decoder's ops in torch: slow, for any machine; they define the results of the other ops. Knows no model.

A product has the bits of a 16-row tile on one thread (`products.py`), attention those of tiles at absolute positions
(`torch_attention.py`). Biases are added after the product was rounded. int8 weights are rounded to 8 bits when packed,
bfloat16 rows before each product; both stay in the compute dtype: the results of 8 bits, without the speed or size.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...core.errors import ConfigError
from ...kernels.reference import Planes, encode_rows, fp8_encode, rms_norm
from ...kernels.reference_codecs import channel_encode
from ..sampling.noise import F32
from .composed import head, store_heads
from .delta import DeltaJob, delta
from .extremes import Extremes, extremes
from .int4 import Int4Matrix, decoded
from .int8 import described, rounded_rows, rounded_to_int8
from .low_rank import ComposedChange, add_changes, gate, pack_change
from .products import TILE_ROWS, Product
from .seam import Activation, AttentionKind, Linear, Logits, LowRank, Norm, Quantization, RowsOfChange, Span
from .step import LayerStep
from .torch_attention import Attention, AttentionLayout, HeadShape

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class TorchLinear:
    """Matrix in the compute dtype, perhaps a view of the checkpoint's file."""

    matrix: Tensor  # [out, in] compute dtype; float32 where exact
    bias: Tensor | None  # [out] float32
    exact: bool

    @property
    def num_bytes(self) -> int:
        """Memory of matrix and bias, in bytes."""
        return self.matrix.nbytes + (0 if self.bias is None else self.bias.nbytes)


@dataclass(slots=True, eq=False)
class StepSpans:
    """Spans of a step, with the layouts made so far, by shape of heads and window."""

    spans: tuple[Span, ...]
    block_tokens: int
    made: dict[tuple[HeadShape, int | None], AttentionLayout] = field(default_factory=dict)


class TorchOps:
    """Implements `seam.Ops` in torch. Uses one thread if this machine's products depend on the number of threads."""

    row_multiple = TILE_ROWS
    device = torch.device("cpu")
    holds_int4 = False

    def __init__(self, dtype: torch.dtype, num_threads: int = 1, quantization: Quantization = "none") -> None:
        self.dtype = dtype
        self.num_threads = num_threads
        self.quantization = quantization
        self.description = f"torch {torch.__version__} tiles" + described(quantization, dtype)
        self._products: dict[tuple[int, int, torch.dtype, bool], Product] = {}
        self._packed: set[tuple[int, int, torch.dtype, bool]] = set()
        self._attentions: dict[HeadShape, Attention] = {}

    def pack(
        self,
        matrix: Tensor,
        bias: Tensor | None = None,
        *,
        exact: bool = False,
        gated: bool = False,
        wide: bool = False,
    ) -> TorchLinear:
        """Convert a matrix [out, in] to the compute dtype (no copy if it has this dtype)."""
        if exact:
            held = matrix.float().contiguous()
        elif self.quantization == "int8":
            held = rounded_to_int8(matrix).to(self.dtype)
        else:
            held = matrix.to(self.dtype).contiguous()
        self._packed.add((held.shape[1], held.shape[0], held.dtype, True))
        return TorchLinear(held, None if bias is None else bias.float(), exact)

    def pack_int4(
        self, matrix: Int4Matrix, bias: Tensor | None = None, *, gated: bool = False, wide: bool = False
    ) -> TorchLinear:
        """Decode the matrix and pack it."""
        return self.pack(decoded(matrix), bias, gated=gated, wide=wide)

    def prepare(self) -> None:
        """Choose the forms of all products for this number of threads."""
        torch.set_num_threads(self.num_threads)
        self._products.clear()
        self._attentions.clear()
        for inner, columns, dtype, transposed in sorted(self._packed, key=str):
            self._product(inner, columns, dtype, transposed)

    def linear(self, x: Tensor, packed: Linear) -> Tensor:
        """Multiply x [rows, in], rows a multiple of 16."""
        assert isinstance(packed, TorchLinear)
        matrix = packed.matrix
        if self.quantization == "int8" and matrix.dtype == torch.bfloat16:
            x = rounded_rows(x)
        product = self._product(matrix.shape[1], matrix.shape[0], matrix.dtype, True)
        result = product.rows(x.to(matrix.dtype), matrix.t())
        return result if packed.bias is None else (result.float() + packed.bias).to(result.dtype)

    def head(self, x: Tensor, norm: Norm, packed: Linear) -> Logits:
        """Norm, then product."""
        return head(self, x, norm, packed)

    def extremes(self, logits: F32) -> Extremes:
        """Extremes by numpy."""
        return extremes(logits)

    def rms_norm(self, x: Tensor, norm: Norm) -> Tensor:
        """Norm as defined in `kernels.reference`."""
        return rms_norm(x, norm.weight, norm.eps)

    def add_rms_norm(self, x: Tensor, delta: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        """Rounded sum x + delta, and the normalised sum."""
        total = x + delta
        return total, rms_norm(total, norm.weight, norm.eps)

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
        """Rotate into new memory; x stays as it is."""
        width = cos.shape[-1]
        turned = x[..., : 2 * width].float()
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        low, high = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, dim=-1)
        parts = (low * cos - high * sin, high * cos + low * sin)
        pairs = torch.stack(parts, dim=-1).flatten(-2) if interleaved else torch.cat(parts, dim=-1)
        pairs = pairs.to(x.dtype)
        return pairs if 2 * width == x.shape[-1] else torch.cat((pairs, x[..., 2 * width :]), dim=-1)

    def gated_linear(self, x: Tensor, packed: Linear, activation: Activation) -> Tensor:
        """activation(gate) * up."""
        return gate(self.linear(x, packed), activation)

    def pack_change(self, parts: Sequence[LowRank], *, gate_width: int | None = None) -> ComposedChange:
        """Pack its matrices as float32."""
        return pack_change(self, parts)

    def add_changes(self, y: Tensor, x: Tensor, changes: Sequence[RowsOfChange]) -> None:
        """Add by tiles of 16 rows."""
        add_changes(self, y, x, changes)

    def halves(self, x: Tensor, packed: Linear) -> Tensor:
        """Gate, then up."""
        return self.linear(x, packed)

    def gate(self, halves: Tensor, activation: Activation, width: int) -> Tensor:
        """activation(gate) * up."""
        return gate(halves, activation)

    def write(self, parts: Sequence[Tensor], planes: Sequence[Planes], slots: Tensor) -> Tensor:
        """Store as `kernels.reference.store_kv` does, for parts of any widths."""
        used, block_tokens = int((slots >= 0).sum()), planes[0].block_tokens
        blocks, offsets = slots[:used] // block_tokens, slots[:used] % block_tokens
        non_finite = torch.zeros(len(slots), dtype=torch.int32)
        encoded = _encode_all([part[:used] for part in parts], planes, (blocks, offsets))
        for plane, (payload, scales, refused) in zip(planes, encoded, strict=True):
            plane.payload[blocks, :, offsets] = payload
            if plane.scales is not None and scales is not None:
                plane.scales[blocks, :, offsets] = scales
            non_finite[:used] += refused.sum(-1, dtype=torch.int32)
        return non_finite

    def store_heads(
        self, qkv: Tensor, num_heads: int, norms: tuple[Norm, Norm] | None, step: LayerStep
    ) -> tuple[Tensor, Tensor]:
        """Norms, rotations and write, one after the other."""
        return store_heads(self, qkv, num_heads, norms, step)

    def delta(self, x: Tensor, job: DeltaJob) -> Tensor:
        """The definition."""
        return delta(x, job)

    def lay_out(self, spans: Sequence[Span], block_tokens: int) -> StepSpans:
        """Keep the spans; layouts are made when a layer first needs them."""
        return StepSpans(tuple(spans), block_tokens)

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
        """Attention by `torch_attention.py`."""
        kv_heads = values.payload.shape[1]
        widths = tuple(part.shape[-1] for part in queries)
        value_width = values.width_like(keys[0], widths[0])
        shape = HeadShape(kv_heads, queries[0].shape[1] // kv_heads, widths, value_width)
        if shape not in self._attentions:
            self._attentions[shape] = Attention(shape, lambda i, c, t: self._product(i, c, torch.float32, t))
        attention = self._attentions[shape]
        if (shape, kind.window) not in layout.made:
            layout.made[shape, kind.window] = attention.lay_out(layout.spans, layout.block_tokens, kind.window)
        return attention(queries, keys, values, layout.made[shape, kind.window], kind, sinks=sinks)

    def _product(self, inner: int, columns: int, dtype: torch.dtype, transposed: bool) -> Product:
        key = (inner, columns, dtype, transposed)
        if key not in self._products:
            try:
                self._products[key] = Product(inner, columns, dtype, transposed=transposed)
            except ConfigError as error:
                if torch.get_num_threads() == 1:
                    raise
                _log.warning("%s; going on with one thread", error)
                self.num_threads = 1
                torch.set_num_threads(1)
                self._products[key] = Product(inner, columns, dtype, transposed=transposed)
        return self._products[key]


def _encode_all(
    parts: Sequence[Tensor], planes: Sequence[Planes], places: tuple[Tensor, Tensor]
) -> list[tuple[Tensor, Tensor | None, Tensor]]:
    """Encode each part as `encode_rows` does; in one pass if all are fp8 rows of one width.

    `places`: blocks and offsets of the rows.
    """
    if len({part.shape[-1] for part in parts}) > 1 or any(
        plane.scales is None or plane.byte_code != "e4m3" for plane in planes
    ):
        return [
            channel_encode(part, *places, plane.payload)[0]
            if plane.byte_code == "int8_channel"
            else encode_rows(part, plane)
            for part, plane in zip(parts, planes, strict=True)
        ]
    heads = [part.shape[1] for part in parts]
    columns = [torch.split(whole, heads, dim=1) for whole in fp8_encode(torch.cat(list(parts), dim=1))]
    return list(zip(*columns, strict=True))
