"""Gumbel noise keyed by (seed, choice, position, token id), and the token with the largest total. Knows no filters.

The noise is a pure function of its key, so a token depends on no worker, batch, attempt or order of sampling.
Source: Gumbel-max (Gumbel 1954; Maddison et al. 2014), noise from splitmix64 (Steele, Lea and Flood 2014).

Two logarithms for each token of a vocabulary would take most of a sampler's time, so `winner` computes only a few. With
u the uniform number of a token, its noise -log(-log u) is below -log(1 - u). So a token with u <= 1 - 2^-8 has less
than 8 log 2 of noise, and cannot win if its score is more than that below a total that is already known. The other
tokens are few (1 in 256 by their noise, and those near the top by their score); their noise is computed exactly.
"""

from __future__ import annotations

import functools
import math

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
U64 = NDArray[np.uint64]

_GOLDEN = 0x9E3779B97F4A7C15
_WORD = (1 << 64) - 1
_FEW = 512  # up to this many candidates all noise is computed
_RARE_BITS = 8
_RARE = np.uint64(_WORD << (64 - _RARE_BITS) & _WORD)  # bits of uniform numbers at or above 1 - 2^-8
_COMMON_NOISE = _RARE_BITS * math.log(2.0)  # upper bound of the noise of all other numbers
_MARGIN = 1e-6  # far above the rounding errors of scores and noise


def gumbel(seed: int, choice: int, position: int, token_ids: I64) -> F64:
    """Standard Gumbel noise [n] of tokens [n], keyed by all four arguments."""
    return _noise(_mixed(_half_mixed(_key(seed, choice, position), len(token_ids), token_ids)))


def winner(values: F32, ids: I64 | None, temperature: float, key: tuple[int, int, int]) -> int:
    """Token with the largest (value - largest value) / temperature + noise; of equal ones the lowest id.

    `ids`: token ids of the values, ascending; None: a whole row. `key`: (seed, choice, position).
    """
    best = float(values.max())
    if len(values) <= _FEW:
        chosen = np.arange(len(values)) if ids is None else ids
        return int(chosen[_totals(values, best, temperature, gumbel(*key, chosen)).argmax()])
    half_mixed = _half_mixed(_key(*key), len(values), ids)

    def lead(places: NDArray[np.intp]) -> tuple[float, int]:
        totals = _totals(values[places], best, temperature, _noise(_mixed(half_mixed[places])))
        leader = int(totals.argmax())
        return float(totals[leader]), -int(places[leader])

    rare = np.flatnonzero(half_mixed >= _RARE)
    sure = lead(np.append(rare, values.argmax()))
    # A token with a value below `lowest` and without rare noise cannot reach `sure`.
    lowest = np.nextafter(np.float32(best + temperature * (sure[0] - _COMMON_NOISE - _MARGIN)), np.float32(-np.inf))
    high = np.flatnonzero(values >= lowest)
    place = -(max(sure, lead(high)) if len(high) else sure)[1]
    return int(place if ids is None else ids[place])


def _totals(values: F32, best: float, temperature: float, noise: F64) -> F64:
    totals: F64 = (values.astype(np.float64) - best) / temperature + noise
    return totals


def _noise(bits: U64) -> F64:
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53  # never 0
    uniform = np.minimum(uniform, 1.0 - 2.0**-53)  # the largest one would round to 1
    noise: F64 = -np.log(-np.log(uniform))
    return noise


def _key(seed: int, choice: int, position: int) -> int:
    return _mix_word((_mix_word((_mix_word(seed & _WORD) + choice) & _WORD) + position) & _WORD)


@functools.lru_cache(maxsize=4)
def _steps(num_ids: int) -> U64:
    """(id + 1) * golden for a whole vocabulary."""
    return (np.arange(num_ids, dtype=np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN)


def _half_mixed(key: int, count: int, ids: I64 | None) -> U64:
    """splitmix64 of (id + 1) * golden + key without its last step, which does not change the upper 31 bits."""
    steps = _steps(count) if ids is None else (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN)
    return _half_mix(steps + np.uint64(key))


def _half_mix(x: U64) -> U64:
    """Apply all steps of splitmix64 except the last one, in place."""
    scratch = x >> np.uint64(30)
    x ^= scratch
    x *= np.uint64(0xBF58476D1CE4E5B9)
    np.right_shift(x, np.uint64(27), out=scratch)
    x ^= scratch
    x *= np.uint64(0x94D049BB133111EB)
    return x


def _mixed(half_mixed: U64) -> U64:
    """Apply the last step of splitmix64."""
    return half_mixed ^ (half_mixed >> np.uint64(31))


def _mix_word(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _WORD
    return x ^ (x >> 31)
