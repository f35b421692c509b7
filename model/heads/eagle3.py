"""An EAGLE-3 head: one decoder layer over the model's hidden states and the embeddings of the tokens behind them.

    f = fc [x_low, x_mid, x_high]           x: the model's residual stream before three of its layers, at position p
    h = [norm_e(e), norm_h(f)]              e: embedding of the token p + 1
    y = layer(h), residual f (or norm_h(f));  logits = H norm(y): the token p + 2
    the next row: f = y, e = embedding of the guess

Source: EAGLE-3 (Li et al. 2025), section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...checkpoint.heads.eagle3 import EMBEDDING, FC, HEAD, HIDDEN_NORM, MAP, NORM, Eagle3Spec, open_head
from ...core.errors import CheckpointError
from ..decoder.decoder import embedded
from ..ops.seam import Linear, Norm, Ops
from ..runner import Runner
from ..weights.tensors import TensorSource
from ..weights.weights import Weights, load_layer
from .layered import LayerHead, LayerInput


class Renamed:
    """Implements `TensorSource`: tensors of a head under the names that the layout of a decoder layer has."""

    def __init__(self, source: TensorSource, names: Mapping[str, str]) -> None:
        self.where = source.where
        self._source, self._names = source, names
        shapes = source.shapes()
        self._shapes = {name: shapes[stored] for name, stored in names.items()}

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Implements `TensorSource.shapes`."""
        return self._shapes

    def take(self, name: str) -> Tensor:
        """Implements `TensorSource.take`."""
        return self._source.take(self._names[name])

    def fingerprint(self) -> bytes:
        """Implements `TensorSource.fingerprint`."""
        return self._source.fingerprint()


@dataclass(frozen=True, slots=True)
class _Eagle3Input:
    """Implements `LayerInput`."""

    ops: Ops
    fc: Linear
    embedding_norm: Norm
    hidden_norm: Norm
    norm_first: bool

    def features(self, taps: Tensor) -> Tensor:
        """Implements `LayerInput.features`."""
        return self.ops.linear(taps, self.fc)

    def rows(self, embeddings: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Implements `LayerInput.rows`."""
        normalised = self.ops.rms_norm(features, self.hidden_norm)
        h = torch.cat((self.ops.rms_norm(embeddings, self.embedding_norm), normalised), dim=1)
        return (normalised if self.norm_first else features), h


def load_eagle3_head(spec: Eagle3Spec, target: Runner) -> LayerHead:
    """Read and pack the head's tensors with the ops of the model's runner. Call it before `ops.prepare`.

    Raises:
        CheckpointError: a tensor cannot be read, or d2t names a token that the model does not have.
    """
    ops = target.ops
    source = Renamed(open_head(spec.directory), spec.names)
    layer = load_layer(source, spec.layer, ops, 0)

    def norm(name: str) -> Norm:
        return Norm(source.take(name).float().to(ops.device).contiguous(), spec.layer.rms_eps)

    embed: Callable[[Tensor], Tensor]
    if spec.has_embedding:
        table = source.take(EMBEDDING).to(ops.device, ops.dtype).contiguous()
        embed = _lookup(table)
    else:  # as in the model's own first layer
        embed = lambda ids: embedded(target.weights.embedding, ids, target.spec)  # noqa: E731
    weights = Weights(
        embedding=target.weights.embedding,  # not read: rows are given
        layers=(layer,),
        norm=norm(NORM),
        head=ops.pack(source.take(HEAD), wide=True),
        fingerprint=b"",
    )
    inputs: LayerInput = _Eagle3Input(
        ops, ops.pack(source.take(FC)), layer.attention_norm, norm(HIDDEN_NORM), spec.norm_first
    )
    return LayerHead(spec.layer, weights, inputs, embed, _token_ids(spec, source))


def _lookup(table: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda ids: table.index_select(0, ids)


def _token_ids(spec: Eagle3Spec, source: TensorSource) -> Tensor | None:
    """Token of each output [rows] int64; None: its number."""
    if MAP not in spec.names:
        return None
    ids = source.take(MAP).long() + torch.arange(spec.num_rows)
    if int(ids.min()) < 0 or int(ids.max()) >= spec.layer.vocab_size:
        raise CheckpointError(
            f"{spec.directory}: {MAP} names tokens {int(ids.min())} to {int(ids.max())}; the model has 0 to "
            f"{spec.layer.vocab_size - 1}"
        )
    return ids
