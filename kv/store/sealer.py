"""Sealing of hash blocks in host memory by the CPU kernels, in one call per step. Knows no sequence."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...kernels.cpu import library as native
from ..digest import MAX_HASH_BLOCKS, U64
from .planes_cpu import CpuPlanes


class Marks(NamedTuple):
    """Generation and number of tokens that each hash block is sealed for: int64 [num_blocks, hash blocks per block]."""

    generations: NDArray[np.int64]
    tokens: NDArray[np.int64]


class Sealer:
    """Arguments of `twostroke_seal` for one store, built once, so that a seal runs little Python."""

    def __init__(self, library: native.Library, planes: Sequence[native.SealedPlanes], marks: Marks) -> None:
        self._library = library
        self._points_to = planes, marks
        self._planes = (native.SealedPlanes * len(planes))(*planes)
        self._num_blocks, self._block_units = marks.generations.shape
        self._to = self._block_units, marks.generations.ctypes.data, marks.tokens.ctypes.data

    @staticmethod
    def make(components: Sequence[object], first_places: Sequence[U64], key: int, marks: Marks) -> Sealer | None:
        """A sealer for components in host memory; None if the kernels cannot read one of them.

        first_places: per component uint64 [layers, heads, 1], the places of hash block 0.
        """
        planes = [part for part in components if isinstance(part, CpuPlanes)]
        libraries = [part.library for part in planes if part.library is not None]
        if not libraries or len(libraries) < len(components):
            return None
        described = [part.sealed_planes(key, first) for part, first in zip(planes, first_places, strict=True)]
        return Sealer(libraries[0], described, marks)

    def seal(self, hash_blocks: Sequence[tuple[int, int, int, int, int]]) -> None:
        """Digest the present contents of hash blocks and mark them sealed.

        Each is (block, hash block within it, generation of the block, number in the sequence, tokens present).

        Raises:
            IndexError: the store has no such block.
            ValueError: a number is outside the limit of `digest.places`.
        """
        for block, unit, _, number, _ in hash_blocks:
            if not (0 <= block < self._num_blocks and 0 <= unit < self._block_units):  # the kernel would write there
                raise IndexError(f"the store has {self._num_blocks} blocks; to be sealed is block {block}, {unit}")
            if not 0 <= number < MAX_HASH_BLOCKS:
                raise ValueError(f"hash block {number} of a sequence; the limit is {MAX_HASH_BLOCKS}")
        numbers = array("q", chain.from_iterable(hash_blocks))
        address, _ = numbers.buffer_info()
        self._library.seal(self._planes, len(self._planes), address, len(hash_blocks), *self._to)
