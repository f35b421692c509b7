"""Filters of the tokens that may be sampled: min_p, top_k, top_p, in this order. Knows values and ids, no noise.

Candidates have one total order: descending value, then ascending id, so that ties never depend on a sort. Each filter
keeps a leading part of this order:

    min_p   tokens with at least min_p of the likeliest token's probability, at this temperature
    top_k   the first k
    top_p   the shortest part with at least top_p of the probability of the tokens that min_p and top_k kept

top_p counts probabilities in integer units of 2^-40 of the likeliest token's. Sums of integers do not depend on their
order, so only the likeliest tokens need to be sorted. Less than one unit counts as zero.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...core.request import SamplingParams
from .noise import F32, I64

_UNITS = np.float32(2.0**40)
_DEEPEST = 16.0
_FEW = 1024
_DEPTHS = (10.0, 7.5, 5.0, 2.5)  # bounds of -log(weight / heaviest weight) that `RoughTopP` tries


class Candidates(NamedTuple):
    """Values of tokens, in ascending order of ids. `ids` None: the whole vocabulary."""

    values: F32
    ids: I64 | None

    def at(self, places: NDArray[np.intp]) -> Candidates:
        """Candidates at ascending `places`."""
        return Candidates(self.values[places], places if self.ids is None else self.ids[places])


def apply_filters(row: F32, params: SamplingParams) -> Candidates:
    """Tokens of a row of logits that all filters keep. Logits may be minus infinity, but not all of them."""
    candidates = before_top_p(row, params)
    return candidates if params.top_p >= 1.0 else exact_top_p(candidates, params)


def before_top_p(row: F32, params: SamplingParams) -> Candidates:
    """Tokens that min_p and top_k keep."""
    candidates = Candidates(row, None)
    if params.min_p > 0.0:
        lowest = float(row.max()) + params.temperature * math.log(params.min_p)
        candidates = candidates.at(np.flatnonzero(row >= _not_below(lowest)))
    if 0 < params.top_k < len(candidates.values):
        candidates = first(candidates, params.top_k)
    return candidates


def first(candidates: Candidates, count: int) -> Candidates:
    """First `count` candidates of the total order; 0 < count < number of candidates."""
    values = candidates.values
    last = np.partition(values, len(values) - count)[len(values) - count]
    places = np.flatnonzero(values >= last)
    if len(places) > count:  # of those equal to the last one, keep the lowest ids
        above = values[places] > last
        ties = np.flatnonzero(~above)[: count - int(above.sum())]
        above[ties] = True
        places = places[above]
    return candidates.at(places)


def exact_top_p(candidates: Candidates, params: SamplingParams) -> Candidates:
    """Tokens that top_p keeps."""
    scores = _scores(candidates.values, params.temperature)
    weights = (np.exp(scores) * _UNITS).astype(np.int64)
    count, lightest = _leading(weights, math.ceil(params.top_p * int(weights.sum())))
    if count >= len(weights):
        return candidates
    near = np.flatnonzero(weights >= lightest - (lightest >> 16))  # rounding in `exp` may swap neighbours only
    return first(candidates.at(near), count) if count < len(near) else candidates.at(near)


class RoughTopP:
    """Fast bounds in float32 of the tokens that top_p keeps. They decide nearly every token.

    Its sums have a relative error of at most 1e-5; `exact_top_p` decides tokens within 1e-3 of the limit.
    """

    def __init__(self, candidates: Candidates, params: SamplingParams) -> None:
        self._scores = _scores(candidates.values, params.temperature)
        self._weights = np.exp(self._scores)
        self._limit = params.top_p * float(self._weights.sum())
        self.near = candidates  # superset of the tokens that top_p keeps
        for depth in _DEPTHS:
            is_near = self._scores >= np.float32(-depth)
            if 2 * np.count_nonzero(is_near) > len(is_near):
                continue  # too many tokens: copies would cost more than they save
            places = np.flatnonzero(is_near)
            weights = self._weights[places]
            if float(weights.sum()) < self._limit * 1.001:
                break
            self.near = self.near.at(places)
            self._scores, self._weights = self._scores[places], weights

    def keeps(self, token_id: int) -> bool:
        """Return True only if top_p certainly keeps this token of `near`."""
        ids = self.near.ids
        place = token_id if ids is None else int(np.searchsorted(ids, token_id))
        likelier = np.flatnonzero(self._scores >= self._scores[place])  # includes the token and its equals
        return float(self._weights[likelier].sum()) - float(self._weights[place]) < self._limit * 0.999


def _leading(weights: I64, limit: int) -> tuple[int, int]:
    """Number of heaviest weights with a sum below `limit` before them, and the weight of the last of these.

    Bisects to a few weights and sorts only those; `before` and `count` are sum and number of the heavier ones.
    """
    before = count = 0
    low, high = 0.0, _DEEPEST  # range of -log(weight / heaviest weight) that is left
    while len(weights) > _FEW and high - low > 1e-3:
        middle = (low + high) / 2
        bound = int(float(_UNITS) * math.exp(-middle))
        is_heavy = weights >= bound
        heavy = weights[np.flatnonzero(is_heavy)]
        mass = int(heavy.sum())
        if before + mass >= limit:
            weights, high = heavy, middle
        else:
            weights, low = weights[np.flatnonzero(~is_heavy)], middle
            before, count = before + mass, count + len(heavy)
    falling = np.sort(weights)[::-1]
    more = 1 + int((np.cumsum(falling)[:-1] < limit - before).sum())
    return count + more, int(falling[more - 1])


def _scores(values: F32, temperature: float) -> F32:
    scores: F32 = (values - values.max()) / np.float32(temperature)
    return scores


def _not_below(bound: float) -> np.float32:
    """Smallest float32 >= `bound`. For float32 numbers, x >= bound has the same result with either."""
    rounded = np.float32(bound)
    return rounded if float(rounded) >= bound else np.nextafter(rounded, np.float32(np.inf))
