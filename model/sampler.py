"""Which token follows: argmax of filtered logits / temperature + Gumbel noise. Numpy, row by row, float64 inside.

The noise is a pure function of (seed, choice, position, token id), so a token depends on no worker, batch, attempt or
order of sampling. Candidates have one total order, logit falling, then id rising, so that ties never depend on a sort.
Source: Gumbel-max (Gumbel 1954; Maddison et al. 2014), noise from splitmix64 (Steele, Lea and Flood 2014).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..core.request import SamplingParams

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
U64 = NDArray[np.uint64]

_GOLDEN = 0x9E3779B97F4A7C15
_WORD = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Draw:
    """What one row of logits is sampled for."""

    params: SamplingParams
    choice: int
    position: int  # tokens generated before this one
    logits_mask: bytes | None = None  # packed bits, least significant first; a set bit allows a token


def sample(logits: F32, draws: Sequence[Draw], eos_ids: Sequence[int]) -> list[int | None]:
    """One token per row of logits [len(draws), vocab]; None where a row is not a distribution.

    That is: it holds a NaN or positive infinity, or nothing is allowed.
    """
    return [_sample_row(row, draw, eos_ids) for row, draw in zip(logits, draws, strict=True)]


def gumbel(seed: int, choice: int, position: int, token_ids: I64) -> F64:
    """Standard Gumbel noise of some tokens, each keyed by all four."""
    key = _mix_word((_mix_word((_mix_word(seed & _WORD) + choice) & _WORD) + position) & _WORD)
    bits = _mix(np.uint64(key) + (token_ids.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN))
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53  # never 0 or 1
    noise: F64 = -np.log(-np.log(uniform))
    return noise


def _sample_row(row: F32, draw: Draw, eos_ids: Sequence[int]) -> int | None:
    params = draw.params
    if not np.isfinite(row).all():
        return None
    if draw.position < params.min_tokens or draw.logits_mask is not None:
        row = row.copy()
        if draw.position < params.min_tokens:
            row[[*eos_ids, *params.stop_token_ids]] = -np.inf
        if draw.logits_mask is not None:
            packed = np.frombuffer(draw.logits_mask, np.uint8)
            row[np.unpackbits(packed, count=len(row), bitorder="little") == 0] = -np.inf
    best = int(row.argmax())  # the first of equals: the lowest id
    if row[best] == -np.inf:
        return None
    if params.temperature == 0.0:
        return best
    ids = np.flatnonzero(row != -np.inf)
    ids = _top_k(row, ids, params.top_k)
    scores = (row[ids].astype(np.float64) - float(row[best])) / params.temperature
    ids, scores = _top_p(ids, scores, params.top_p)
    return int(ids[(scores + gumbel(params.seed, draw.choice, draw.position, ids)).argmax()])


def _top_k(row: F32, ids: I64, top_k: int) -> I64:
    """The first `top_k` in the total order, as rising ids; 0 keeps all."""
    if not 0 < top_k < len(ids):
        return ids
    values = row[ids]
    threshold = np.partition(values, len(values) - top_k)[len(values) - top_k]
    above = values > threshold
    ties = np.flatnonzero(values == threshold)[: top_k - int(above.sum())]
    above[ties] = True
    kept: I64 = ids[above]
    return kept


def _top_p(ids: I64, scores: F64, top_p: float) -> tuple[I64, F64]:
    """The shortest leading part of the total order that holds `top_p` of the probability, as rising ids."""
    if top_p >= 1.0:
        return ids, scores
    order = np.argsort(-scores, kind="stable")
    weights = np.exp(scores[order])
    before = np.cumsum(weights) - weights
    kept = np.sort(order[before < top_p * weights.sum()])
    return (ids[kept], scores[kept]) if len(kept) else (ids[order[:1]], scores[order[:1]])


def _mix(x: U64) -> U64:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _mix_word(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _WORD
    return x ^ (x >> 31)
