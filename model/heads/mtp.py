"""The model's own layer for multi-token prediction, as a head.

    x = eh_proj [norm_e(e), norm_h(f)]  e: embedding of the token p + 1; f: the model's normalised hidden state at p
    y = layer(x);  logits = H norm(y): the token p + 2
    the next row: f = y, e = embedding of the guess

Source: DeepSeek-V3 (2024), section 2.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...checkpoint.heads.mtp import EMBEDDING_NORM, HEAD, HIDDEN_NORM, JOIN, NORM, MtpSpec
from ..decoder.decoder import embedded
from ..ops.seam import Linear, Norm, Ops
from ..runner import Runner
from ..weights.tensors import TensorSource
from ..weights.weights import Weights, load_layer
from .layered import LayerHead


@dataclass(frozen=True, slots=True)
class _MtpInput:
    """Implements `LayerInput`."""

    ops: Ops
    model_norm: Norm
    embedding_norm: Norm
    hidden_norm: Norm
    join: Linear

    def features(self, taps: Tensor) -> Tensor:
        """Implements `LayerInput.features`."""
        return self.ops.rms_norm(taps.contiguous(), self.model_norm)

    def rows(self, embeddings: Tensor, features: Tensor) -> tuple[Tensor, None]:
        """Implements `LayerInput.rows`."""
        parts = self.ops.rms_norm(embeddings, self.embedding_norm), self.ops.rms_norm(features, self.hidden_norm)
        return self.ops.linear(torch.cat(parts, dim=1), self.join), None


def load_mtp_head(spec: MtpSpec, source: TensorSource, target: Runner) -> LayerHead:
    """Read and pack the layer with the ops of the model's runner. Call it before `ops.prepare`.

    Raises:
        CheckpointError: a tensor cannot be read.
    """
    ops = target.ops

    def norm(part: str) -> Norm:
        weight = source.take(spec.name(part)).float() + spec.whole.norm_offset
        return Norm(weight.to(ops.device).contiguous(), spec.whole.rms_eps)

    weights = Weights(
        embedding=target.weights.embedding,  # not read: rows are given
        layers=(load_layer(source, spec.whole, ops, spec.index),),
        norm=norm(NORM),
        head=ops.pack(source.take(spec.name(HEAD)), wide=True) if spec.has_head else target.weights.head,
        fingerprint=b"",
    )
    inputs = _MtpInput(
        ops, target.weights.norm, norm(EMBEDDING_NORM), norm(HIDDEN_NORM), ops.pack(source.take(spec.name(JOIN)))
    )
    return LayerHead(
        spec.layer, weights, inputs, lambda ids: embedded(target.weights.embedding, ids, target.spec), token_ids=None
    )
