"""Part of a sequence's cache: its token range and blocks, and its bytes with their digests in stores and frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np
from numpy.typing import NDArray

from .block import BlockId

PLANE_ALIGNMENT = 16  # bytes, of every plane in a frame


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


class PlaneBuffer:
    """Memory that receives the planes of one range, each behind the one before and aligned to 16 bytes."""

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        self._end = 0

    def take(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """Take the place of the next plane: uint8 of `shape`, not initialised.

        Raises:
            ValueError: it does not fit the rest of the memory.
        """
        start = self._end + -self._end % PLANE_ALIGNMENT
        size = prod(shape)
        if start + size > len(self._memory):
            raise ValueError(f"planes of {start + size} bytes for a buffer of {len(self._memory)}")
        self._end = start + size
        return np.frombuffer(self._memory, np.uint8, size, start).reshape(shape)


@dataclass(frozen=True, slots=True, eq=False)
class SectionData:
    """Bytes and digests of one component for a range of layers, heads and tokens.

    Arrays may view an envelope or a slot of shared memory.
    """

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
    digests: NDArray[np.uint64]  # [layers, heads, ceil(tokens / 16)]: the seals
    # The digests of these very bytes, computed as they were copied. None: not computed yet. A link between processes
    # does not carry them: what has travelled is verified anew.
    found: NDArray[np.uint64] | None = field(default=None, metadata={"is_local": True})

    @property
    def num_bytes(self) -> int:
        """Bytes of payload and scales."""
        return self.payload.nbytes + (0 if self.scales is None else self.scales.nbytes)
