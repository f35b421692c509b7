"""A model's weights in the form that the decoder uses: taken from a source one by one, fused, packed by the ops.

Names come from checkpoint/layout.py only. At most one matrix is in memory twice at any time.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...checkpoint.layout import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    LayerLayout,
    Matrix,
    expected_shapes,
    is_ignored,
    layer_layout,
)
from ...checkpoint.spec import DeltaNet, ExpertsFfn, LatentAttention, ModelSpec, PlainAttention
from ...core.errors import CheckpointError
from ..ops.int4 import Int4Matrix, joined
from ..ops.seam import Linear, Norm, Ops
from .tensors import Int4Source, TensorSource

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PlainWeights:
    """Weights of grouped-query attention."""

    qkv: Linear  # output: queries, then keys, then values, then the gates of the queries' heads if there are any
    output: Linear
    q_norm: Norm | None  # norm of each head's queries
    k_norm: Norm | None
    sinks: Tensor | None = None  # [heads] float32, on the device of the ops


@dataclass(frozen=True, slots=True)
class LatentWeights:
    """Weights of multi-head latent attention, absorbed: the up-projections act on queries and on mixed latents."""

    q_down: Linear | None
    q_norm: Norm | None
    q: Linear  # output: heads * (key_width + rope_width)
    kv_down: Linear  # output: latent_width + rope_width
    kv_norm: Norm
    to_latent: tuple[Linear, ...]  # per head: [latent_width, key_width], applied to queries
    from_latent: tuple[Linear, ...]  # per head: [value_width, latent_width], applied to mixed latents
    output: Linear


@dataclass(frozen=True, slots=True)
class DeltaWeights:
    """Weights of a gated delta net."""

    input: Linear  # output: queries, keys, values (the channels of the convolution), then the gates of the output
    rates: Linear  # packed `exact`; output: per value head the step (before its sigmoid), then the decay (before bias)
    taps: Tensor  # [taps, channels] float32; the last is the token's own
    decay: Tensor  # [value heads] float32: rate of decay, below zero
    step_bias: Tensor  # [value heads] float32
    norm: Norm  # of each value head's output
    output: Linear


@dataclass(frozen=True, slots=True)
class DenseWeights:
    """Weights of a gated feed-forward layer."""

    gate_up: Linear  # gate first
    down: Linear


@dataclass(frozen=True, slots=True)
class ExpertsWeights:
    """Weights of a layer of experts."""

    router: Linear  # packed `exact`; the score of the shared expert, if it has one, is last
    correction: Tensor | None  # [num_experts] float32
    experts: tuple[DenseWeights, ...]
    shared: DenseWeights | None


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Weights of one decoder layer."""

    attention_norm: Norm
    attention: PlainWeights | LatentWeights | DeltaWeights
    after_attention: Norm | None
    ffn_norm: Norm
    ffn: DenseWeights | ExpertsWeights
    after_ffn: Norm | None


@dataclass(frozen=True, slots=True)
class Weights:
    """All weights of a model, packed for one device."""

    embedding: Tensor  # [vocab, hidden] compute dtype; perhaps a view of the checkpoint's file
    layers: tuple[LayerWeights, ...]
    norm: Norm
    head: Linear
    fingerprint: bytes


def load_weights(source: TensorSource, spec: ModelSpec, ops: Ops) -> Weights:
    """Take a checkpoint's tensors and pack them.

    Raises:
        CheckpointError: a file or tensor, which it names, is missing, unexpected, truncated, or has a wrong shape.
    """
    check_tensors(source, spec)
    loader = _Loader(source, spec, ops)
    embedding = source.take(EMBEDDING).to(ops.device, ops.dtype).contiguous()
    return Weights(
        embedding=embedding,
        layers=tuple(loader.layer(index) for index in range(spec.num_layers)),
        norm=loader.norm(FINAL_NORM),
        head=loader.head(embedding),
        fingerprint=source.fingerprint(),
    )


def load_layer(source: TensorSource, spec: ModelSpec, ops: Ops, index: int) -> LayerWeights:
    """Take and pack the tensors of one layer of a source that `check_tensors` has seen. Raises as `load_weights`."""
    return _Loader(source, spec, ops).layer(index)


def load_norm(source: TensorSource, spec: ModelSpec, ops: Ops) -> Norm:
    """Take the norm after the last layer. Raises as `load_weights`."""
    return _Loader(source, spec, ops).norm(FINAL_NORM)


def check_tensors(source: TensorSource, spec: ModelSpec) -> None:
    """Check that a source has exactly the spec's tensors, in their shapes.

    Raises:
        CheckpointError: it does not; names the first tensor and the difference.
    """
    shapes = source.shapes()
    expected = expected_shapes(spec, shapes)
    for name, shape in shapes.items():
        if is_ignored(spec, name):
            continue
        if name not in expected:
            raise CheckpointError(f"{source.where} holds {name}, which {spec.architecture} has no place for")
        if tuple(shape) != expected[name]:
            raise CheckpointError(f"{source.where}: {name} has shape {list(shape)}; config.json says {expected[name]}")
    missing = [name for name in expected if name not in shapes]
    if missing:
        raise CheckpointError(f"{source.where} lacks {missing[0]} ({len(missing)} of {len(expected)} tensors missing)")


class _Loader:
    """Takes tensors from the source and packs them; keeps none of them."""

    def __init__(self, source: TensorSource, spec: ModelSpec, ops: Ops) -> None:
        self.source = source
        self.spec = spec
        self.ops = ops

    def layer(self, index: int) -> LayerWeights:
        layout = layer_layout(self.spec, index, self.source.shapes())
        ffn = self.spec.layers[index].ffn
        return LayerWeights(
            attention_norm=self.norm(layout.vectors["attention_norm"][0]),
            attention=self._mixer(layout, index),
            after_attention=self._optional_norm(layout, "after_attention"),
            ffn_norm=self.norm(layout.vectors["ffn_norm"][0]),
            ffn=self._experts(layout, ffn) if isinstance(ffn, ExpertsFfn) else self._dense(layout),
            after_ffn=self._optional_norm(layout, "after_ffn"),
        )

    def _mixer(self, layout: LayerLayout, index: int) -> PlainWeights | LatentWeights | DeltaWeights:
        if self.spec.layers[index].mixer == "delta":
            return self._delta(layout)
        return self._latent(layout) if isinstance(self.spec.attention, LatentAttention) else self._plain(layout)

    def head(self, embedding: Tensor) -> Linear:
        stored = self._int4([EMBEDDING if self.spec.tied_embeddings else HEAD])
        if stored is not None:
            return self.ops.pack_int4(stored, wide=True)
        return self.ops.pack(embedding if self.spec.tied_embeddings else self.source.take(HEAD), wide=True)

    def norm(self, name: str, eps: float | None = None, *, offset: float | None = None) -> Norm:
        weight = self.source.take(name).float() + (self.spec.norm_offset if offset is None else offset)
        return Norm(weight.to(self.ops.device).contiguous(), self.spec.rms_eps if eps is None else eps)

    def _optional_norm(self, layout: LayerLayout, key: str) -> Norm | None:
        return self.norm(layout.vectors[key][0]) if key in layout.vectors else None

    def _optional_vector(self, layout: LayerLayout, key: str) -> Tensor | None:
        if key not in layout.vectors:
            return None
        return self.source.take(layout.vectors[key][0]).float().to(self.ops.device).contiguous()

    def _plain(self, layout: LayerLayout) -> PlainWeights:
        return PlainWeights(
            qkv=self._qkv(layout.matrices["qkv"]),
            output=self._linear(layout.matrices["output"]),
            q_norm=self._optional_norm(layout, "q_norm"),
            k_norm=self._optional_norm(layout, "k_norm"),
            sinks=self._optional_vector(layout, "sinks"),
        )

    def _qkv(self, matrix: Matrix) -> Linear:
        shape = self.spec.attention
        if not isinstance(shape, PlainAttention) or not shape.output_gate:
            return self._linear(matrix)
        bias = gates_last(self._joined(matrix, ".bias"), shape) if matrix.bias else None
        return self.ops.pack(gates_last(self._taken(matrix), shape), bias)

    def _delta(self, layout: LayerLayout) -> DeltaWeights:
        shape, matrices, vectors = self.spec.delta, layout.matrices, layout.vectors
        assert shape is not None
        per_key = shape.num_value_heads // shape.num_key_heads
        whole, rates = self._taken(matrices["input"]), self._taken(matrices["rates"])
        if len(matrices["input"].parts) == 1:
            values = per_key * shape.value_width
            whole = _by_kind(whole, shape, (shape.key_width, shape.key_width, values, values))
            rates = _by_kind(rates, shape, (per_key, per_key))
        device = self.ops.device
        return DeltaWeights(
            input=self.ops.pack(whole),
            rates=self.ops.pack(rates, exact=matrices["rates"].exact),
            taps=self.source.take(layout.tables["taps"][0]).float()[:, 0].t().contiguous().to(device),
            decay=-torch.exp(self.source.take(vectors["decay"][0]).float()).to(device),
            step_bias=self.source.take(vectors["step_bias"][0]).float().to(device),
            norm=self.norm(vectors["delta_norm"][0], offset=0.0),
            output=self._linear(matrices["output"]),
        )

    def _latent(self, layout: LayerLayout) -> LatentWeights:
        shape, matrices = self.spec.attention, layout.matrices
        assert isinstance(shape, LatentAttention)
        up = self._taken(matrices["kv_up"]).view(shape.num_heads, -1, shape.latent_width)
        q_norm = layout.vectors.get("q_norm")
        return LatentWeights(
            q_down=self._linear(matrices["q_down"]) if "q_down" in matrices else None,
            q_norm=self.norm(q_norm[0], shape.norm_eps) if q_norm else None,
            q=self._linear(matrices["q"]),
            kv_down=self._linear(matrices["kv_down"]),
            kv_norm=self.norm(layout.vectors["kv_norm"][0], shape.norm_eps),
            to_latent=tuple(self.ops.pack(head[: shape.key_width].t()) for head in up),
            from_latent=tuple(self.ops.pack(head[shape.key_width :]) for head in up),
            output=self._linear(matrices["output"]),
        )

    def _dense(self, layout: LayerLayout, prefix: str = "") -> DenseWeights:
        matrices = layout.matrices
        return DenseWeights(
            self._linear(matrices[prefix + "gate_up"], gated=True), self._linear(matrices[prefix + "down"])
        )

    def _experts(self, layout: LayerLayout, ffn: ExpertsFfn) -> ExpertsWeights:
        return ExpertsWeights(
            router=self._linear(layout.matrices["router"]),
            correction=self._optional_vector(layout, "correction"),
            experts=tuple(self._dense(layout, f"expert {e} ") for e in range(ffn.routing.num_experts)),
            shared=None if ffn.shared_width is None else self._dense(layout, "shared "),
        )

    def _linear(self, matrix: Matrix, *, gated: bool = False) -> Linear:
        bias = self._joined(matrix, ".bias") if matrix.bias else None
        stored = None if matrix.exact else self._int4([name + ".weight" for name, _ in matrix.parts])
        if stored is not None:
            return self.ops.pack_int4(stored, bias, gated=gated)
        return self.ops.pack(self._taken(matrix), bias, exact=matrix.exact, gated=gated)

    def _int4(self, names: Sequence[str]) -> Int4Matrix | None:
        """One matrix of these, as stored in 4-bit groups; None: they are not, or the ops do not hold such."""
        if not self.ops.holds_int4 or not isinstance(self.source, Int4Source):
            return None
        parts = []
        for name in names:
            parts.append(self.source.take_int4(name))
            if parts[-1] is None:
                return None
        stored = joined(parts)
        if stored is None:
            _log.warning(
                "%s: %s have unlike groups or orders of columns; they are held in the compute dtype, "
                "which takes more memory than planned",
                self.source.where,
                " and ".join(names),
            )
        return stored

    def _taken(self, matrix: Matrix) -> Tensor:
        return self._joined(matrix, ".weight")

    def _joined(self, matrix: Matrix, kind: str) -> Tensor:
        parts = [self.source.take(name + kind) for name, _ in matrix.parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def gates_last(rows: Tensor, shape: PlainAttention) -> Tensor:
    """Joined rows of q_proj, k_proj and v_proj, with the gates, which follow each head's queries, moved to the end."""
    size = shape.num_heads * shape.head_dim
    heads = rows[: 2 * size].view(shape.num_heads, 2, shape.head_dim, *rows.shape[1:])
    return torch.cat((heads[:, 0].flatten(0, 1), rows[2 * size :], heads[:, 1].flatten(0, 1)))


def _by_kind(matrix: Tensor, shape: DeltaNet, rows: tuple[int, ...]) -> Tensor:
    """Rows that stand by key head, each with `rows` of every kind, ordered by kind instead."""
    heads = matrix.view(shape.num_key_heads, sum(rows), matrix.shape[1])
    return torch.cat([part.flatten(0, 1) for part in torch.split(heads, list(rows), dim=1)])
