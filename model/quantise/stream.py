"""Runs one layer of a model over windows of tokens, with the model's own decoder, and compares what two models say.

Between layers the residual stream is the table of embeddings from which the next layer's decoder takes its rows. So
only one layer's weights are in memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ...checkpoint.layout import EMBEDDING, HEAD
from ...checkpoint.spec import ModelSpec
from ...core.request import SamplingParams, SequenceKey
from ...engine.plan import SequenceStep, StepPlan
from ...kv.block import BlockId
from ...kv.store.store import KvStore
from ..batch import build_batch, read_whole
from ..decoder.decoder import Decoder, embedded
from ..ops.elementwise import softcapped
from ..weights.tensors import TensorSource
from ..weights.weights import LayerWeights, Weights, load_norm
from .observing import ObservingOps

_BLOCK_TOKENS = 16
_KEY = SequenceKey("window", 0)
_PARAMS = SamplingParams(max_tokens=1, temperature=0.0)  # nothing is sampled


class Overlay:
    """A `TensorSource` in which some tensors are others."""

    def __init__(self, below: TensorSource, tensors: Mapping[str, Tensor]) -> None:
        self.where = below.where
        self._below = below
        self._tensors = tensors

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of all tensors; none is replaced by one of another shape."""
        return self._below.shapes()

    def take(self, name: str) -> Tensor:
        """Read one tensor."""
        return self._tensors[name] if name in self._tensors else self._below.take(name)

    def fingerprint(self) -> bytes:
        """Fingerprint of the checkpoint below."""
        return self._below.fingerprint()


def first_rows(source: TensorSource, spec: ModelSpec, windows: Sequence[Sequence[int]]) -> Tensor:
    """Residual stream before the first layer: [windows, tokens, hidden] float32."""
    table = source.take(EMBEDDING)
    return torch.stack([embedded(table, torch.tensor(ids), spec).float() for ids in windows])


@torch.inference_mode()
def through_layer(spec: ModelSpec, index: int, weights: LayerWeights, ops: ObservingOps, x: Tensor) -> Tensor:
    """Residual stream after layer `index`, for x [windows, tokens, hidden] before it. Tokens: a multiple of 16."""
    count = x.shape[1]
    assert count % _BLOCK_TOKENS == 0
    alone = replace(spec, layers=(spec.layers[index],), embedding_scale=None)
    store = KvStore(alone.kv_spec("float32"), count // _BLOCK_TOKENS, _BLOCK_TOKENS)
    table = tuple(BlockId(block) for block in range(count // _BLOCK_TOKENS))
    ids = tuple(range(count))
    step = SequenceStep(_KEY, 0, ids, table, (1,) * len(table), samples=False, params=_PARAMS, num_generated=0)
    batch = read_whole(build_batch(StepPlan(0, (step,)), [ids], _BLOCK_TOKENS, ops))
    length = spec.max_model_len if spec.length_matters else min(spec.max_model_len, count)
    out = torch.empty_like(x)
    unused, decoder = ops.pack(x.new_zeros(1, x.shape[2])), None  # of the norm and the head after the last layer
    for window, rows in enumerate(x):
        held = Weights(rows, (weights,), weights.attention_norm, unused, b"")
        if decoder is None:
            decoder = Decoder(alone, held, ops, length)
        decoder.weights = held
        out[window] = decoder.hidden(batch, store).rows
    return out


@dataclass(frozen=True, slots=True)
class Comparison:
    """A quantised model beside its original, over the same tokens. KL in nats, of the original ‖ the quantised."""

    tokens: int
    perplexity: float
    original_perplexity: float
    kl: float
    same_first: float  # share of tokens for which both like the same token best


@torch.inference_mode()
def compare(
    source: TensorSource,
    spec: ModelSpec,
    ops: ObservingOps,
    windows: Sequence[Sequence[int]],
    streams: tuple[Tensor, Tensor],
) -> Comparison:
    """Compare two streams [windows, tokens, hidden] after the last layer: the original's, and the quantised model's."""
    norm = load_norm(source, spec, ops)
    head = ops.pack(source.take(EMBEDDING if spec.tied_embeddings else HEAD), wide=True)
    losses, divergence, same, count = [0.0, 0.0], 0.0, 0, 0
    for ids, *pair in zip(windows, *streams, strict=True):
        targets = torch.tensor(ids[1:])
        logs = []
        for which, rows in enumerate(pair):
            logits = ops.head(rows[:-1].contiguous(), norm, head).rows
            if spec.final_softcap is not None:
                logits = softcapped(logits, spec.final_softcap)
            logs.append(F.log_softmax(logits, dim=-1))
            losses[which] += float(F.nll_loss(logs[which], targets, reduction="sum"))
        divergence += float((logs[0].exp() * (logs[0] - logs[1])).sum())
        same += int((logs[0].argmax(-1) == logs[1].argmax(-1)).sum())
        count += len(targets)
    return Comparison(count, math.exp(losses[1] / count), math.exp(losses[0] / count), divergence / count, same / count)
