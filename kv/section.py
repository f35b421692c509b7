"""A piece of a sequence's cache with its digests: what a store gives and takes, and what frames carry."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class SectionData:
    """One component over a layer and head range of a token range. Arrays may be views of an envelope."""

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
