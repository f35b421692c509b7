"""Blocks of preempted sequences in host memory, with their seals. Knows no sequence and no time.

Both sides are stores of sealed planes, so a swap uses the same reads and writes as a hand-over to a peer. On a GPU only
the copy between the two memories differs, not the order of steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from ...core.errors import KvCorrupted
from ..section import HeldTokens, SectionData
from ..spec import HASH_BLOCK_TOKENS


class SealedStore(Protocol):
    """A store of planes with their seals: `KvStore` of kv/store/store.py, and the store of the simulator."""

    def is_sealed(self, held: HeldTokens) -> bool:
        """True if a range is sealed for these generations of its blocks."""
        ...

    def seal(self, held: HeldTokens) -> None:
        """Seal the present contents of a range."""
        ...

    def parts(self, held: HeldTokens) -> list[tuple[HeldTokens, bool]]:
        """A range in parts that are here without their windowed layers (True), or with all layers (False)."""
        ...

    def read_tokens(self, held: HeldTokens, *, without_windows: bool = False) -> tuple[SectionData, ...]:
        """Copies of a range's planes, with their seals.

        Raises:
            KvCorrupted: the range is not sealed.
        """
        ...

    def write_tokens(self, held: HeldTokens, sections: Sequence[SectionData]) -> None:
        """Store planes with the seals that they came with."""
        ...

    def verify(self, held: HeldTokens) -> bool:
        """True if the contents of a range match its seals."""
        ...


class HostStore:
    """Swap space of one rank: host blocks beside its device store. Used by the engine's thread only."""

    def __init__(self, device: SealedStore, host: SealedStore) -> None:
        """`host`: of the same spec and digest key as `device`."""
        self._device = device
        self._host = host

    def swap_out(self, held: HeldTokens, host: HeldTokens) -> None:
        """Copy tokens out to host blocks, with the digests made when the tokens were written.

        Generated tokens that do not fill a hash block yet are sealed here. Damage done before keeps its old digest,
        so `swap_in` detects it.

        Raises:
            KvCorrupted: a hash block was never sealed for this generation of its block.
        """
        last = held.end - held.end % HASH_BLOCK_TOKENS
        if last < held.end:
            tail = replace(held, start=last, count=held.end - last)
            if not self._device.is_sealed(tail):
                self._device.seal(tail)
        _copy(self._device, held, self._host, host)

    def swap_in(self, host: HeldTokens, held: HeldTokens) -> bool:
        """Copy tokens back into newly taken blocks; returns True if all of them match their seals there."""
        try:
            _copy(self._host, host, self._device, held)
        except KvCorrupted:
            return False
        return self._device.verify(held)


def _copy(source: SealedStore, held: HeldTokens, target: SealedStore, there: HeldTokens) -> None:
    """Copy a range; what lacks its windowed layers lacks them there too."""
    for part, lacks in source.parts(held):
        sections = source.read_tokens(part, without_windows=lacks)
        target.write_tokens(replace(there, start=part.start, count=part.count), sections)
