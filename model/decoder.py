"""The decoder: token ids to logits, in one readable pass. Knows layers; no scheduler, no sampling, no digests.

Row by row its arithmetic is float32, rounded to the compute dtype after each step of the paper; every product has fixed
bits for every row count (`products.py`, `attention.py`), so a row's logits depend on its own prefix alone.
Source: Llama (Touvron et al. 2023), with grouped queries (Ainslie et al. 2023).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.reference import rms_norm, rotary
from ..kv.store import KvStore
from .attention import Attention
from .batch import StepBatch
from .products import Product
from .spec import ModelSpec, RopeScaling
from .weights import LayerWeights, Weights


class Hidden(NamedTuple):
    """What the layers leave: the residual stream, and which rows had keys or values that were not finite."""

    rows: Tensor  # [padded rows, hidden] compute dtype
    non_finite: Tensor  # [padded rows] int32: refused rows of keys and values, over all layers


class Decoder:
    """One model on one CPU. Stateless between steps but for the cache that it is handed."""

    def __init__(self, spec: ModelSpec, weights: Weights, max_model_len: int) -> None:
        self.spec = spec
        self.weights = weights
        self.attention = Attention(spec.num_heads, spec.num_kv_heads, spec.head_dim)
        self._products = {
            name: Product(matrix.shape[1], matrix.shape[0], matrix.dtype, transposed=True)
            for name, matrix in _matrices(weights).items()
        }
        self._cos, self._sin = rotary_table(spec, max_model_len)

    def hidden(self, batch: StepBatch, store: KvStore) -> Hidden:
        """Run all layers over a step's rows, storing their keys and values on the way."""
        x = self.weights.embedding.index_select(0, batch.token_ids)  # [rows, hidden]
        cos, sin = self._cos.index_select(0, batch.positions), self._sin.index_select(0, batch.positions)
        non_finite = torch.zeros(len(x), dtype=torch.int32)
        for index, layer in enumerate(self.weights.layers):
            q, k, v = self._project(rms_norm(x, layer.attention_norm, self.spec.rms_eps), layer)
            q, k = rotary(q, k, cos, sin)
            # Stored first, attended to after: attention reads what the cache holds, rounding included.
            non_finite += store.write(index, k, v, batch.slots)
            k_planes, v_planes = store.planes(index)
            mixed = self.attention(q, k_planes, v_planes, batch.attention).flatten(1)
            x = x + self._linear("output", mixed, layer.output)
            x = x + self._feed_forward(rms_norm(x, layer.ffn_norm, self.spec.rms_eps), layer)
        return Hidden(x, non_finite)

    def logits(self, rows: Tensor) -> Tensor:
        """Logits of rows [n, hidden], n a multiple of 16, of the residual stream; [n, vocab] float32."""
        return self._linear("head", rms_norm(rows, self.weights.norm, self.spec.rms_eps), self.weights.head).float()

    def _project(self, x: Tensor, layer: LayerWeights) -> tuple[Tensor, Tensor, Tensor]:
        spec = self.spec
        heads = self._linear("qkv", x, layer.qkv).view(len(x), -1, spec.head_dim)
        q, k, v = torch.split(heads, [spec.num_heads, spec.num_kv_heads, spec.num_kv_heads], dim=1)
        return q, k, v  # each [rows, heads, head_dim]

    def _feed_forward(self, x: Tensor, layer: LayerWeights) -> Tensor:
        return self._linear("down", silu_mul(self._linear("gate_up", x, layer.gate_up)), layer.down)

    def _linear(self, name: str, x: Tensor, matrix: Tensor) -> Tensor:
        return self._products[name].rows(x, matrix.t())


def _matrices(weights: Weights) -> dict[str, Tensor]:
    layer = weights.layers[0]
    return {
        "qkv": layer.qkv,
        "output": layer.output,
        "gate_up": layer.gate_up,
        "down": layer.down,
        "head": weights.head,
    }


def silu_mul(gate_up: Tensor) -> Tensor:
    """`kernels.reference.silu_mul`, to one unit in the last place, from steps that round alike wherever a number lies.

    torch's own silu computes the last few numbers of each thread's range with another exponential than the rest, so
    its bits depend on the number of rows and threads; `exp` alone does not.
    """
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (gate / (1.0 + torch.exp(-gate)) * up).to(gate_up.dtype)


def rotary_table(spec: ModelSpec, max_model_len: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [max_model_len, head_dim / 2] float32 by absolute position.

    Angles are float32 products, as the models were trained; their cosines are taken in float64 and rounded once, so
    that an entry does not depend on the length of the table.
    """
    exponent = torch.arange(0, spec.head_dim, 2, dtype=torch.int64).float() / spec.head_dim
    frequency = _stretched(1.0 / (spec.rope_theta**exponent), spec.rope_scaling)
    angles = (torch.arange(max_model_len, dtype=torch.float32).unsqueeze(1) * frequency).double()
    return torch.cos(angles).float(), torch.sin(angles).float()


def _stretched(frequency: Tensor, scaling: RopeScaling | None) -> Tensor:
    """Frequencies after scaling. "llama3" keeps short wavelengths, divides long ones and blends between."""
    if scaling is None:
        return frequency
    if scaling.kind == "linear":
        return frequency / scaling.factor
    wavelength = 2 * math.pi / frequency
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = ((scaling.original_max_len / wavelength - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - blend) * frequency / scaling.factor + blend * frequency
