"""Mixture-of-experts layer: the experts that each token chooses, and the shared expert. Knows no attention.

A token's output is the sum of its experts' outputs, in ascending order of expert numbers, in float32, rounded once. So
it depends on the token's own row only, not on other rows that chose the same experts.
Source: Mixtral (Jiang et al. 2024); DeepSeek-V2 and V3 (2024) for groups, correction and shared experts;
gpt-oss (2025) for the softmax of the chosen.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...checkpoint.spec import ExpertsFfn, Routing
from ..ops.elementwise import sigmoid
from ..ops.seam import Activation, Ops
from ..weights.weights import DenseWeights, ExpertsWeights


class ChosenExperts(NamedTuple):
    """Experts of each row, with their weights."""

    experts: Tensor  # [rows, per_token] int64
    weights: Tensor  # [rows, per_token] float32


def mix_experts(ops: Ops, h: Tensor, weights: ExpertsWeights, shape: ExpertsFfn, activation: Activation) -> Tensor:
    """Output [rows, hidden] of the layer for h [rows, hidden]."""
    routing = shape.routing
    scores = ops.linear(h, weights.router)  # [rows, num_experts (+ 1)] float32
    choice = route(scores[:, : routing.num_experts], weights.correction, routing)
    total = torch.zeros(h.shape, dtype=torch.float32, device=h.device)
    for expert in torch.unique(choice.experts).tolist():  # ascending
        rows, place = (choice.experts == expert).nonzero().unbind(1)  # rows that chose it, and its place there
        spare = -len(rows) % ops.row_multiple
        answers = _dense(ops, torch.cat((h[rows], h.new_zeros(spare, h.shape[1]))), weights.experts[expert], activation)
        total[rows] += answers[: len(rows)].float() * choice.weights[rows, place].unsqueeze(1)
    if weights.shared is not None:
        answer = _dense(ops, h, weights.shared, activation).float()
        total += answer * sigmoid(scores[:, -1:]) if shape.shared_gate else answer
    return total.to(h.dtype)


def route(logits: Tensor, correction: Tensor | None, routing: Routing) -> ChosenExperts:
    """Choose experts by logits [rows, num_experts] float32, before softmax or sigmoid.

    "softmax_of_chosen": those with the largest logits, whose weights are the softmax of their logits alone (gpt-oss).

    With groups, only experts of the best groups can be chosen. The score of a group is its best expert's score or, with
    a correction, the sum of its best two corrected scores. The correction affects the choice, but not the weights.
    """
    if routing.scores == "softmax_of_chosen":
        best, experts = logits.topk(routing.per_token, dim=-1)  # best first
        powers = torch.exp(best - best[:, :1])
        return ChosenExperts(experts, powers / powers.sum(-1, keepdim=True))
    if routing.scores == "softmax":
        powers = torch.exp(logits - logits.amax(-1, keepdim=True))
        scores = powers / powers.sum(-1, keepdim=True)
    else:
        scores = sigmoid(logits)
    ranked = scores if correction is None else scores + correction
    if routing.num_groups > 1:
        groups = ranked.view(len(ranked), routing.num_groups, -1)
        best = groups.amax(-1) if correction is None else groups.topk(2, dim=-1).values.sum(-1)
        kept = torch.zeros_like(best).scatter_(1, best.topk(routing.groups_per_token, dim=-1).indices, 1.0)
        out = kept.repeat_interleave(groups.shape[-1], dim=1) == 0
        if correction is None:
            ranked = scores = scores.masked_fill(out, 0.0)
        else:
            ranked = ranked.masked_fill(out, float("-inf"))
    experts = ranked.topk(routing.per_token, dim=-1).indices
    weights = scores.gather(1, experts)
    if routing.normalised:
        weights = weights / (weights.sum(-1, keepdim=True) + (1e-20 if routing.scores == "sigmoid" else 0.0))
    return ChosenExperts(experts, weights * routing.scale)


def _dense(ops: Ops, x: Tensor, weights: DenseWeights, activation: Activation) -> Tensor:
    return ops.linear(ops.gated_linear(x, weights.gate_up, activation), weights.down)
