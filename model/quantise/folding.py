"""A layer's matrices in float32, and where scales of input channels can go so that the layer computes the same.

A matrix whose input column j is multiplied by s_j needs an input that is divided by s_j: by the norm before it, or by
the rows of the matrix before it where only products lie between.
Source: SmoothQuant (Xiao et al. 2023), section 4; AWQ (Lin et al. 2024), section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...checkpoint.layout import LayerLayout, layer_layout
from ...checkpoint.spec import DenseFfn, ExpertsFfn, LatentAttention, ModelSpec, PlainAttention
from ..ops.seam import Linear
from ..weights.tensors import TensorSource
from ..weights.weights import DenseWeights, ExpertsWeights, LatentWeights, LayerWeights, PlainWeights


@dataclass(frozen=True, slots=True)
class Fold:
    """Matrices that share an input, and what gives it: a norm, or rows of a matrix."""

    consumers: tuple[str, ...]
    norm: str | None = None
    producer: str | None = None
    first_row: int = 0
    heads: int = 1  # kinds of channels; each head of `width` rows gives the input of `shared` heads
    width: int = 0
    shared: int = 1

    def tie(self, numbers: Tensor) -> Tensor:
        """Mean of numbers [in] over the channels that one row gives, for each of them."""
        if self.shared == 1:
            return numbers
        heads = numbers.reshape(self.heads, self.shared, self.width)
        return heads.mean(1, keepdim=True).expand_as(heads).reshape(-1)


class LayerTensors:
    """Tensors of one layer by the decoder's names. Folding changes them in place."""

    def __init__(self, source: TensorSource, spec: ModelSpec, index: int) -> None:
        self.spec = spec
        self.index = index
        self.layout: LayerLayout = layer_layout(spec, index, source.shapes())
        self.matrices: dict[str, Tensor] = {}  # joined by rows, float32
        self.kept: dict[str, Tensor] = {}  # full name: what stays as it is stored
        self.dtype = torch.float32
        for name, matrix in self.layout.matrices.items():
            taken = [source.take(part + ".weight") for part, _ in matrix.parts]
            if matrix.exact:
                self.kept |= {part + ".weight": tensor for (part, _), tensor in zip(matrix.parts, taken, strict=True)}
            else:
                self.dtype = taken[0].dtype
                self.matrices[name] = torch.cat([tensor.float() for tensor in taken])
            if matrix.bias:
                self.kept |= {part + ".bias": source.take(part + ".bias") for part, _ in matrix.parts}
        for full, _ in self.layout.vectors.values():
            self.kept[full] = source.take(full)

    def parts(self, name: str, joined: Tensor) -> dict[str, Tensor]:
        """Split a matrix by rows into the modules of the checkpoint."""
        parts = self.layout.matrices[name].parts
        pieces = torch.split(joined, [rows for _, rows in parts])
        return {module: piece for (module, _), piece in zip(parts, pieces, strict=True)}

    def fold(self, fold: Fold, scale: Tensor) -> Tensor:
        """Divide the consumers' input by scale [in] and multiply their columns. Returns the scale as it was applied.

        A norm's weight is stored in few bits, so the scale is what the rounded weight makes of it, exactly.
        """
        if fold.norm is not None:
            full = self.layout.vectors[fold.norm][0]
            stored = self.kept[full]
            before = stored.float() + self.spec.norm_offset
            changed = (before / scale - self.spec.norm_offset).to(stored.dtype)
            after = changed.float() + self.spec.norm_offset
            possible = (before != 0) & (after != 0) & torch.isfinite(after)
            self.kept[full] = torch.where(possible, changed, stored)
            scale = torch.where(possible, before / torch.where(possible, after, 1.0), 1.0)
        else:
            assert fold.producer is not None
            heads = scale.reshape(fold.heads, fold.shared, fold.width)[:, 0]
            rows = self.matrices[fold.producer]
            rows[fold.first_row : fold.first_row + heads.numel()] /= heads.reshape(-1, 1)
        for name in fold.consumers:
            self.matrices[name] *= scale
        return scale


def folds(spec: ModelSpec, index: int) -> list[Fold]:
    """All places of a layer where scales can go, in the order in which the layer computes. Biases rule rows out."""
    found, attention, ffn = [], spec.attention, spec.layers[index].ffn
    if isinstance(attention, LatentAttention):
        query = "q" if attention.query_rank is None else "q_down"
        found.append(Fold((query, "kv_down"), norm="attention_norm"))
    else:
        found.append(Fold(("qkv",), norm="attention_norm"))
        found += _values(attention)
    if isinstance(ffn, DenseFfn):
        found.append(Fold(("gate_up",), norm="ffn_norm"))
        found += [] if ffn.bias else [_up("", ffn.width)]
        return found
    # The norm before experts also goes to the router, which stays as it is stored.
    found += [_up(f"expert {expert} ", ffn.width) for expert in range(ffn.routing.num_experts)]
    if ffn.shared_width is not None and not ffn.shared_bias:
        found.append(_up("shared ", ffn.shared_width))
    return found


def _values(attention: PlainAttention) -> list[Fold]:
    if attention.qkv_bias:
        return []
    heads, width = attention.num_kv_heads, attention.head_dim
    first_row = (attention.num_heads + heads) * width
    shared = attention.num_heads // heads
    return [Fold(("output",), None, "qkv", first_row, heads, width, shared)]


def _up(prefix: str, width: int) -> Fold:
    return Fold((prefix + "down",), None, prefix + "gate_up", first_row=width, width=width)


def linears(layer: LayerWeights, spec: ModelSpec, index: int) -> dict[int, str]:
    """The decoder's names of a layer's packed matrices, by id; those that are quantised and used whole."""
    found: dict[str, Linear] = {}
    attention = layer.attention
    if isinstance(attention, LatentWeights):
        found |= {"q": attention.q, "kv_down": attention.kv_down, "output": attention.output}
        if attention.q_down is not None:
            found["q_down"] = attention.q_down
    else:
        assert isinstance(attention, PlainWeights), "models with recurrent layers are refused before"
        found |= {"qkv": attention.qkv, "output": attention.output}
    if isinstance(layer.ffn, ExpertsWeights):
        assert isinstance(spec.layers[index].ffn, ExpertsFfn)
        for number, expert in enumerate(layer.ffn.experts):
            found |= _dense(f"expert {number} ", expert)
        if layer.ffn.shared is not None:
            found |= _dense("shared ", layer.ffn.shared)
    else:
        found |= _dense("", layer.ffn)
    return {id(linear): name for name, linear in found.items()}


def _dense(prefix: str, weights: DenseWeights) -> dict[str, Linear]:
    return {prefix + "gate_up": weights.gate_up, prefix + "down": weights.down}
