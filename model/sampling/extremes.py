"""What sampling asks of every row before anything else: its least number and where its greatest is. Numpy."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .noise import F32


class Extremes(NamedTuple):
    """Of rows [n, vocab]."""

    least: F32  # [n]; NaN where a row holds one
    greatest: NDArray[np.integer]  # [n]: the place of the greatest number, the first of equals; no promise with a NaN


def extremes(logits: F32) -> Extremes:
    """The definition."""
    return Extremes(logits.min(1), logits.argmax(1))
