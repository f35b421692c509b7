"""Part of a sequence's cache: its token range and blocks, and its bytes with their digests in stores and frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .block import BlockId


@dataclass(frozen=True, slots=True)
class HeldTokens:
    """Tokens [start, start + count) of one sequence, and the blocks with their generations, from token 0 on.

    Seals are per hash block, so `start` is the beginning of a hash block.
    """

    block_table: Sequence[BlockId]
    generations: Sequence[int]
    start: int
    count: int

    @property
    def end(self) -> int:
        """The first token after the range."""
        return self.start + self.count


@dataclass(frozen=True, slots=True, eq=False)
class SectionData:
    """Bytes and digests of one component for a range of layers, heads and tokens. Arrays may view an envelope."""

    group: str
    component: str
    layer_start: int
    layer_count: int
    head_start: int
    head_count: int
    codec: int
    row_bytes: int
    payload: NDArray[np.uint8]  # [layers, heads, tokens, row_bytes]
    scales: NDArray[np.uint8] | None  # [layers, heads, tokens]
    digests: NDArray[np.uint64]  # [layers, heads, ceil(tokens / 16)]

    @property
    def num_bytes(self) -> int:
        """Bytes of payload and scales."""
        return self.payload.nbytes + (0 if self.scales is None else self.scales.nbytes)
