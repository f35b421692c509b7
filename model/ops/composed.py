"""Ops composed of other ops, for devices on which fusing them saves no time. Knows no device."""

from __future__ import annotations

from torch import Tensor

from .seam import Linear, Logits, Norm, Ops
from .step import LayerStep


def head(ops: Ops, x: Tensor, norm: Norm, packed: Linear) -> Logits:
    """`Ops.head` as a norm and a product."""
    return Logits(ops.linear(ops.rms_norm(x, norm), packed).float(), None)


def store_heads(
    ops: Ops, qkv: Tensor, num_heads: int, norms: tuple[Norm, Norm] | None, step: LayerStep
) -> tuple[Tensor, Tensor]:
    """`Ops.store_heads` as norms, rotations and a write."""
    num_kv_heads = (qkv.shape[1] - num_heads) // 2
    v = qkv[:, num_heads + num_kv_heads :]
    if norms is not None:
        q_norm, k_norm = norms
        q = ops.rotary(ops.rms_norm(qkv[:, :num_heads].contiguous(), q_norm), step.cos, step.sin)
        k = qkv[:, num_heads : num_heads + num_kv_heads].contiguous()
        k = ops.rotary(ops.rms_norm(k, k_norm), step.cos, step.sin)
    else:
        turned = ops.rotary(qkv[:, : num_heads + num_kv_heads], step.cos, step.sin)
        q, k = turned[:, :num_heads], turned[:, num_heads:]
    return q, ops.write((k, v), step.planes, step.slots)
