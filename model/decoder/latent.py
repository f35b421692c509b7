"""Multi-head latent attention in its absorbed form: the cache holds one latent and one rotary key per token.

Keys and values of all heads are products of one latent, k = U_k c and v = U_v c. A score is
q . (U_k c) = (U_k^T q) . c, and weighted values sum to U_v (sum of w c). So queries are projected into the latent's
space and attend there to a single head that is both key and value, and the result is projected back. Prompts and single
tokens use the same form, so that their arithmetic is the same. Knows no bytes of the cache.
Source: DeepSeek-V2 (2024), section 2.1 and appendix C.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...checkpoint.spec import LatentAttention
from ..ops.seam import Linear, Ops
from ..ops.step import LayerStep
from ..weights.weights import LatentWeights


def attend_latent(h: Tensor, weights: LatentWeights, shape: LatentAttention, step: LayerStep) -> tuple[Tensor, Tensor]:
    """Attention of h [rows, hidden]: its output [rows, hidden], and counts [rows] of non-finite latents and keys."""
    ops, rows = step.ops, len(h)
    down = h
    if weights.q_down is not None and weights.q_norm is not None:
        down = ops.rms_norm(ops.linear(h, weights.q_down), weights.q_norm)
    queries = ops.linear(down, weights.q).view(rows, shape.num_heads, shape.key_width + shape.rope_width)
    q_rope = ops.rotary(queries[..., shape.key_width :].contiguous(), step.cos, step.sin, interleaved=shape.interleaved)
    q_latent = _per_head(ops, queries[..., : shape.key_width], weights.to_latent)  # [rows, heads, latent_width]
    both = ops.linear(h, weights.kv_down)
    latent = ops.rms_norm(both[:, : shape.latent_width].contiguous(), weights.kv_norm).unsqueeze(1)
    k_rope = both[:, shape.latent_width :].contiguous().unsqueeze(1)
    k_rope = ops.rotary(k_rope, step.cos, step.sin, interleaved=shape.interleaved)
    refused = ops.write((latent, k_rope), step.planes, step.slots)
    latents = step.planes[0]
    mixed = ops.attend((q_latent, q_rope), step.planes, latents, step.layout, step.kind)
    values = _per_head(ops, mixed, weights.from_latent)  # [rows, heads, value_width]
    return ops.linear(values.flatten(1), weights.output), refused


def _per_head(ops: Ops, x: Tensor, matrices: Sequence[Linear]) -> Tensor:
    """Multiply each head of x [rows, heads, in] by its own matrix: [rows, heads, out]."""
    return torch.stack([ops.linear(x[:, i].contiguous(), matrix) for i, matrix in enumerate(matrices)], dim=1)
