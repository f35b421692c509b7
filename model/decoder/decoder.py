"""The decoder of all model families: token ids to logits. Knows layers; no device, no scheduler.

A layer is described by data (checkpoint/spec.py) and computed by ops (ops/seam.py). The bits of a row are a function of
its own prefix only. A plain layer, with normalisation before each part and, in some families, after it:

    h = norm(x);  x += [norm](attention(h));  h = norm(x);  x += [norm](ffn(h))

Under tensor parallelism, attention and ffn give partial results, which are summed over the ranks before all else; x and
h are the same on all ranks, and the logits' columns of all ranks are joined.

Source: Llama (Touvron et al. 2023); Gemma 2 (2024) for the second norms; DeepSeek-V2 (2024) for latent attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...checkpoint.spec import DenseFfn, ExpertsFfn, LatentAttention, ModelSpec, PlainAttention
from ...kernels.reference_kv import Rotation
from ...kv.store.store import KvStore
from ..adapters.loaded import LayerChanges
from ..batch import StepBatch
from ..ops.elementwise import sigmoid, softcapped
from ..ops.seam import AttentionKind, Logits, Ops
from ..ops.step import LayerStep
from ..parallel.collectives import ONE_RANK, Collectives
from ..weights.weights import (
    DeltaWeights,
    DenseWeights,
    ExpertsWeights,
    LatentWeights,
    LayerWeights,
    PlainWeights,
    Weights,
)
from .delta import StepStates, mix_delta
from .experts import mix_experts
from .latent import attend_latent
from .native_stack import NativeStack, Taps
from .rope import rotary_table


class Hidden(NamedTuple):
    """Result of all layers: the residual stream, and counts of keys and values that were not finite."""

    rows: Tensor  # [padded rows, hidden] compute dtype
    non_finite: Tensor  # [padded rows] int32: vectors of keys and values that were not finite, of all layers and ranks
    num_refused: int | None = None  # sum of `non_finite`, if it is known without reading it
    taps: Tensor | None = None  # [padded rows, len(taps) * hidden]: the residual stream before some layers


class Decoder:
    """One model on one device. It keeps no state between steps; the KV cache is an argument."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: Weights,
        ops: Ops,
        max_model_len: int,
        collectives: Collectives = ONE_RANK,
    ) -> None:
        """`spec` and `weights`: of a rank (checkpoint/shards.py) if `collectives` has several."""
        self.spec = spec
        self.weights = weights
        self.ops = ops
        self.max_model_len = max_model_len
        tables = (rotary_table(rope, max_model_len) for rope in spec.ropes)
        self._tables = [(cos.to(ops.device), sin.to(ops.device)) for cos, sin in tables]
        self._ranks = collectives
        self._stack = NativeStack.make(spec, weights, ops, collectives)
        self._kinds = [_attention_kind(spec, layer.window) for layer in spec.layers]
        self._cache_layers, self._state_layers = spec.cache_layers, spec.state_layers

    @property
    def is_fused(self) -> bool:
        """True if one native call computes all layers."""
        return self._stack is not None

    def hidden(self, batch: StepBatch, store: KvStore, taps: Sequence[int] = ()) -> Hidden:
        """Run all layers over a step's rows and store their keys and values.

        `taps`: layers before which the residual stream of all rows is kept, ascending; the number of layers: after the
        last one, for which `batch.read_rows` must be all rows.
        """
        return self.through(embedded(self.weights.embedding, batch.token_ids, self.spec), batch, store, taps=taps)

    def through(
        self, x: Tensor, batch: StepBatch, store: KvStore, h: Tensor | None = None, *, taps: Sequence[int] = ()
    ) -> Hidden:
        """As `hidden`, of a residual stream x [rows, hidden], which may be overwritten.

        `h` [rows, width of the first layer's attention]: what that attention takes instead of the normalised x.
        """
        ops, layers = self.ops, self.weights.layers
        angles = [tuple(t.index_select(0, batch.positions) for t in table) for table in self._tables]
        kept: list[Tensor] = []
        if self._stack is not None and h is None and not (taps and batch.adapters):
            non_finite, refused = self._stack.run(x, angles, batch, store, Taps(taps, kept))
            if self._ranks.size == 1:
                return Hidden(x, non_finite, refused, joined(kept))
            return Hidden(x, self._ranks.all_reduce(non_finite))
        rotations = [Rotation(batch.positions, *table) for table in self._tables]
        births = store.births(batch.slots)
        non_finite = torch.zeros(len(x), dtype=torch.int32, device=x.device)
        if h is None:
            h = ops.rms_norm(x, layers[0].attention_norm)
        for index, (layer, shape) in enumerate(zip(layers, self.spec.layers, strict=True)):
            changes, cached = LayerChanges(ops, batch.adapters, index), self._cache_layers[index]
            if index in taps:
                kept.append(x.clone())  # the ops may reuse its memory
            if cached is None:
                delta = self._recur(h, layer, index, batch, store)
            else:
                cos, sin = angles[shape.rope]
                step = LayerStep(
                    ops, cos, sin, store.planes(cached), batch.slots, batch.attention, self._kinds[index],
                    cached, rotations[shape.rope], births, changes,
                )  # fmt: skip
                delta, counts = self._attend(h, layer.attention, step)
                non_finite += counts
            delta = self._ranks.all_reduce(delta)
            if layer.after_attention is not None:
                delta = ops.rms_norm(delta, layer.after_attention)
            x, h = ops.add_rms_norm(x, delta, layer.ffn_norm)
            delta = self._ranks.all_reduce(self._feed_forward(h, layer.ffn, shape.ffn, changes))
            if layer.after_ffn is not None:
                delta = ops.rms_norm(delta, layer.after_ffn)
            if index + 1 < len(layers):
                x, h = ops.add_rms_norm(x, delta, layers[index + 1].attention_norm)
            else:
                x = x + delta
        if len(layers) in taps:
            kept.append(x)
        return Hidden(x, self._ranks.all_reduce(non_finite), taps=joined(kept))

    def logits(self, rows: Tensor) -> Logits:
        """Logits of rows [n, hidden] of the residual stream; n is a multiple of `ops.row_multiple`."""
        logits = self.ops.head(rows, self.weights.norm, self.weights.head)
        if self._ranks.size > 1:
            logits = Logits(self._ranks.all_gather(logits.rows, self.spec.vocab_size), None)
        if self.spec.final_softcap is None:
            return logits
        return Logits(softcapped(logits.rows, self.spec.final_softcap), None)

    def _recur(self, h: Tensor, layer: LayerWeights, index: int, batch: StepBatch, store: KvStore) -> Tensor:
        place, shape = self._state_layers[index], self.spec.delta
        assert isinstance(layer.attention, DeltaWeights)
        assert store.states is not None, "the store of a model with recurrent layers has no states"
        assert shape is not None
        assert place is not None
        at = StepStates(batch.deltas, store.states.layer(place))
        return mix_delta(self.ops, h, layer.attention, shape, at)

    def _attend(
        self, h: Tensor, weights: PlainWeights | LatentWeights | DeltaWeights, step: LayerStep
    ) -> tuple[Tensor, Tensor]:
        """Attention of h [rows, hidden]: its output [rows, hidden], and counts [rows] of non-finite keys and values."""
        shape = self.spec.attention
        if isinstance(weights, LatentWeights):
            assert isinstance(shape, LatentAttention)
            return attend_latent(h, weights, shape, step)
        assert isinstance(shape, PlainAttention)
        assert isinstance(weights, PlainWeights)
        return _attend_plain(h, weights, shape, step)

    def _feed_forward(
        self, h: Tensor, weights: DenseWeights | ExpertsWeights, shape: object, changes: LayerChanges
    ) -> Tensor:
        if isinstance(weights, ExpertsWeights):
            assert isinstance(shape, ExpertsFfn)
            return mix_experts(self.ops, h, weights, shape, self.spec.activation)
        activation, of_gates = self.spec.activation, changes.of("gate_up")
        if of_gates:
            assert isinstance(shape, DenseFfn)
            halves = self.ops.halves(h, weights.gate_up)
            self.ops.add_changes(halves, h, of_gates)
            gated = self.ops.gate(halves, activation, shape.width)
        else:
            gated = self.ops.gated_linear(h, weights.gate_up, activation)
        return changes.add("down", self.ops.linear(gated, weights.down), gated)


def joined(kept: Sequence[Tensor]) -> Tensor | None:
    """Rows of several residual streams side by side; None: there are none."""
    return kept[0] if len(kept) == 1 else torch.cat(tuple(kept), dim=1) if kept else None


def embedded(table: Tensor, token_ids: Tensor, spec: ModelSpec) -> Tensor:
    """Rows [n, hidden] of the first residual stream, for token ids [n] and a table [vocab, hidden]."""
    x = table.index_select(0, token_ids)
    if spec.embedding_scale is None:
        return x
    return x * torch.tensor(spec.embedding_scale, dtype=x.dtype)  # scale rounded first, as in Gemma's training


def _attend_plain(h: Tensor, weights: PlainWeights, shape: PlainAttention, step: LayerStep) -> tuple[Tensor, Tensor]:
    ops, heads = step.ops, shape.num_heads
    qkv = step.changes.add("qkv", ops.linear(h, weights.qkv), h)
    width = (heads + 2 * shape.num_kv_heads) * shape.head_dim
    gates, qkv = qkv[:, width:], qkv[:, :width].view(len(h), heads + 2 * shape.num_kv_heads, shape.head_dim)
    norms = None
    if weights.q_norm is not None and weights.k_norm is not None:
        norms = weights.q_norm, weights.k_norm
    # Store before attending: attention reads keys and values as the cache rounds them.
    q, refused = ops.store_heads(qkv, heads, norms, step)
    keys, values = step.planes
    mixed = ops.attend((q,), (keys,), values, step.layout, step.kind, sinks=weights.sinks)
    mixed = mixed.flatten(1)
    if shape.output_gate:
        mixed = (mixed.float() * sigmoid(gates.float())).to(mixed.dtype)
    return step.changes.add("output", ops.linear(mixed, weights.output), mixed), refused


def _attention_kind(spec: ModelSpec, window: int | None) -> AttentionKind:
    shape = spec.attention
    return AttentionKind(shape.scale, window, shape.softcap if isinstance(shape, PlainAttention) else None)
