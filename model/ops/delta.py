"""The gated delta rule in torch: the definition for all devices. Knows no projection, no cache.

A head's memory S [key width, value width] is a map from keys to values. A token with query q, key k, value v, decay a
and step b, all of its own row, changes and reads it so:

    S <- a S            forget
    d  = b (v - k^T S)  what the memory gets wrong about this key, as far as it is corrected
    S <- S + k d^T      correct
    out = q^T S         read, computed as q^T S before the correction, plus (q . k) d

q, k and v come from a causal convolution over the last inputs of each channel, then silu; q and k have length one, q is
divided by sqrt(key width). b = sigmoid(step), a = exp(-rate * softplus(decay + bias)).

Tokens are taken one by one, and every sum has one order (`tree_sum`), so the bits do not depend on how a sequence is
cut into steps or which others are in them. A chunked form would be faster for prompts, with other bits at each cut.
Source: Gated DeltaNet (Yang, Kautz and Hatamizadeh 2024); Qwen3-Next (2025) for convolution, norms and rates.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...checkpoint.spec import DeltaNet
from ...kv.store.states import LayerStates
from .delta_spans import DeltaSpans
from .elementwise import activated, sigmoid

_LEAST_SQUARE = 1e-6  # added to the squared length of queries and keys
_LOG_TERMS = 12  # of the series in `softplus`; enough for float64 to be exact to 1e-12


class DeltaParts(NamedTuple):
    """Small weights of a gated delta net, all float32."""

    taps: Tensor  # [taps, channels]; the last is the token's own
    decay: Tensor  # [value heads], below zero
    step_bias: Tensor  # [value heads]


class DeltaJob(NamedTuple):
    """A layer's part in one step, besides its rows."""

    rates: Tensor  # [rows, 2 * value heads] float32: step, then decay
    parts: DeltaParts
    shape: DeltaNet
    spans: DeltaSpans | None  # None: all rows are padding
    states: LayerStates


class _Rows(NamedTuple):
    """Inputs of the recurrence, float32, for each row and value head."""

    keys: Tensor  # [rows, heads, key width]
    queries: Tensor
    values: Tensor  # [rows, heads, value width]
    overlaps: Tensor  # [rows, heads, 1]: q . k
    decays: Tensor  # [rows, heads, 1, 1]
    steps: Tensor  # [rows, heads, 1]


def delta(x: Tensor, job: DeltaJob) -> Tensor:
    """Read [rows, value heads, value width] of each row, in x's dtype; rows of no span are zero. Writes states.

    x [rows, channels]: queries, keys, values before the convolution.
    """
    rates, parts, shape, spans, states = job
    out = torch.zeros(len(x), shape.num_value_heads, shape.value_width, dtype=x.dtype, device=x.device)
    if spans is None:
        return out
    mixed = _convolved(x, parts.taps, spans, states.convs).to(x.dtype).float()
    _recur(_rows(mixed, rates.float(), parts, shape), spans, states.memories, out)
    return out


def tree_sum(x: Tensor, dim: int) -> Tensor:
    """Sum over one axis, halves added to each other again and again: the same bits for any shape of the others."""
    while (size := x.shape[dim]) > 1:
        half = size // 2
        total = x.narrow(dim, 0, half) + x.narrow(dim, half, half)
        x = torch.cat((total, x.narrow(dim, size - 1, 1)), dim) if size % 2 else total
    return x.squeeze(dim)


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), float32; of exp and IEEE arithmetic only, as in elementwise.py.

    max(x, 0) + log(1 + u) for u = exp(-|x|), and log(1 + u) = 2 artanh(u / (2 + u)) by its series, in float64.
    """
    power = torch.exp(-x.abs()).double()
    ratio = power / (2.0 + power)
    square = ratio * ratio
    series = torch.zeros_like(ratio)
    for term in reversed(range(_LOG_TERMS)):
        series = series * square + 1.0 / (2 * term + 1)
    return (x.clamp(min=0.0).double() + 2.0 * ratio * series).float()


def _convolved(x: Tensor, taps: Tensor, spans: DeltaSpans, convs: Tensor) -> Tensor:
    """silu of the causal convolution of x [rows, channels]; float32. Keeps each written state's last inputs."""
    num_taps = len(taps)
    inputs = torch.cat((convs[spans.sources].flatten(0, 1), x.float()))
    total = torch.zeros_like(x, dtype=torch.float32)
    places_by_tap, tails = spans.inputs(num_taps)
    for tap, places in zip(taps, places_by_tap, strict=True):
        total = total + inputs[places] * tap
    convs[spans.places] = inputs[tails]
    return activated(total, "silu")


def _rows(mixed: Tensor, rates: Tensor, parts: DeltaParts, shape: DeltaNet) -> _Rows:
    widths = (shape.keys_width, shape.keys_width, shape.values_width)
    queries, keys, values = torch.split(mixed, list(widths), dim=1)
    queries = _unit(queries, shape) * shape.key_width**-0.5
    keys = _unit(keys, shape)
    step, decay = rates.chunk(2, dim=1)
    decays = torch.exp(parts.decay * softplus(decay + parts.step_bias))
    return _Rows(
        keys,
        queries,
        values.view(len(mixed), shape.num_value_heads, shape.value_width),
        tree_sum(keys * queries, 2).unsqueeze(2),
        decays[:, :, None, None],
        sigmoid(step).unsqueeze(2),
    )


def _unit(x: Tensor, shape: DeltaNet) -> Tensor:
    """Vectors of length one [rows, value heads, key width], of x [rows, key heads * key width]."""
    heads = x.view(len(x), shape.num_key_heads, shape.key_width)
    length = torch.sqrt(tree_sum(heads * heads, 2).unsqueeze(2) + _LEAST_SQUARE)
    return (heads / length).repeat_interleave(shape.num_value_heads // shape.num_key_heads, dim=1)


def _recur(rows: _Rows, spans: DeltaSpans, memories: Tensor, out: Tensor) -> None:
    """Change and read memories [states, heads, key width, value width]; out [rows, heads, value width]."""
    memory = memories[spans.sources]  # [spans, heads, key width, value width]: a copy
    written = iter(spans.after)
    due = next(written, None)
    for time in range(spans.spans[0].num_rows):
        count = spans.num_active(time)
        at, active = spans.first_rows[:count] + time, memory[:count]
        key, query = rows.keys[at].unsqueeze(3), rows.queries[at].unsqueeze(3)
        active *= rows.decays[at]
        wrong = (rows.values[at] - tree_sum(active * key, 2)) * rows.steps[at]
        seen = tree_sum(active * query, 2)
        active += key * wrong.unsqueeze(2)
        out[at] = (seen + rows.overlaps[at] * wrong).to(out.dtype)
        while due is not None and due[0] == time + 1:
            memories[due[2]] = memory[due[1]]
            due = next(written, None)
