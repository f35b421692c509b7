"""Smallest and greatest number of each row of logits, and the place of the greatest: the first step of sampling."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..sampling.noise import F32


class Extremes(NamedTuple):
    """Extremes of rows [n, vocab]. In a row with a NaN, `greatest` and `best` are undefined."""

    least: F32  # [n]; NaN for a row with a NaN
    greatest: F32  # [n]
    best: NDArray[np.integer]  # [n]: place of the greatest number; of equal ones the first


def extremes(logits: F32) -> Extremes:
    """Extremes of logits [n, vocab] by numpy; faster versions must give the same."""
    return Extremes(logits.min(1), logits.max(1), logits.argmax(1))
