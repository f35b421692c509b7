"""Upper bound of the memory that a step's intermediate values take on a GPU. Reads no weights, knows no tensor.

The values of one layer live at once; the next layer reuses their memory. Source of the terms: model/decoder.
"""

from __future__ import annotations

from typing import NamedTuple

from .spec import DTYPE_BYTES, DenseFfn, DType, ExpertsFfn, LayerSpec, ModelSpec, PlainAttention

_HIDDEN_COPIES = 4  # residual, normed input, output of a part, and its sum
_FFN_COPIES = 3  # gate, up, and their product
_LOGIT_BYTES = 4 * 3  # float32 logits, their log-probabilities, and what sampling sorts


class StepBytes(NamedTuple):
    """Memory of a step's intermediate values."""

    per_token: int  # bytes of each token that the step computes
    per_row: int  # bytes of each row that gets logits


NO_STEP = StepBytes(0, 0)


def step_bytes(spec: ModelSpec, dtype: DType) -> StepBytes:
    """Bounds for a model, or for one rank of it if `spec` is the rank's."""
    width = DTYPE_BYTES[dtype]
    largest = max(max(_attention_numbers(spec), _ffn_numbers(layer)) for layer in spec.layers)
    per_token = (_HIDDEN_COPIES * spec.hidden_size + largest) * width
    return StepBytes(per_token, (spec.head_rows or spec.vocab_size) * _LOGIT_BYTES)


def _attention_numbers(spec: ModelSpec) -> int:
    """Numbers per token: queries, keys, values and the output of all heads."""
    shape = spec.attention
    if isinstance(shape, PlainAttention):
        return 2 * (shape.num_heads + shape.num_kv_heads) * shape.head_dim
    head = shape.key_width + shape.rope_width
    return shape.num_heads * (2 * head + 2 * shape.value_width) + shape.latent_width + shape.rope_width


def _ffn_numbers(layer: LayerSpec) -> int:
    """Numbers per token of the feed-forward layer; of experts, those of each chosen one with its input and output."""
    ffn: DenseFfn | ExpertsFfn = layer.ffn
    if isinstance(ffn, DenseFfn):
        return _FFN_COPIES * ffn.width
    return _FFN_COPIES * (ffn.routing.per_token * ffn.width + (ffn.shared_width or 0))
