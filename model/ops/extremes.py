"""What sampling asks of every row before anything else: its least number, its greatest, and where that is. Numpy."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..sampling.noise import F32


class Extremes(NamedTuple):
    """Of rows [n, vocab]. No promise of `greatest` and `best` in a row with a NaN."""

    least: F32  # [n]; NaN where a row holds one
    greatest: F32  # [n]
    best: NDArray[np.integer]  # [n]: the place of the greatest number, the first of equals


def extremes(logits: F32) -> Extremes:
    """The definition."""
    return Extremes(logits.min(1), logits.max(1), logits.argmax(1))
