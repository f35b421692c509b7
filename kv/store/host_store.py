"""Where a preempted sequence's blocks wait in host memory, with their seals. Knows seals, not who waits nor how long.

Both sides are stores of sealed planes, so whatever the device store can hand to a peer it can hand to the host: on a
GPU only the copy between the two differs, not this order of steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from ...core.errors import KvCorrupted
from ..section import HeldTokens, SectionData
from ..spec import HASH_BLOCK_TOKENS


class SealedStore(Protocol):
    """What gives planes with their seals, and takes them: kv/store/store.py's `KvStore`, and the simulator's cells."""

    def is_sealed(self, held: HeldTokens) -> bool:
        """Whether a range is sealed for these uses of its blocks."""
        ...

    def seal(self, held: HeldTokens) -> None:
        """Seal a range as it is."""
        ...

    def read_tokens(self, held: HeldTokens) -> tuple[SectionData, ...]:
        """Copies of a range's planes, with their seals.

        Raises:
            KvCorrupted: it is not sealed.
        """
        ...

    def write_tokens(self, held: HeldTokens, sections: Sequence[SectionData]) -> None:
        """Store planes under the seals that they came with."""
        ...

    def verify(self, held: HeldTokens) -> bool:
        """Whether a range holds what was sealed."""
        ...


class HostStore:
    """Host blocks beside one rank's store. One thread at a time: the engine's."""

    def __init__(self, device: SealedStore, host: SealedStore) -> None:
        """`host`: of the same spec and digest key as `device`."""
        self._device = device
        self._host = host

    def swap_out(self, held: HeldTokens, host: HeldTokens) -> None:
        """Copy tokens out to host blocks, with the digests sealed at their birth.

        Generated tokens that do not fill a hash block yet are sealed here. What was damaged before stays damaged
        under its old digest: `swap_in` finds it.

        Raises:
            KvCorrupted: a hash block was never sealed for this use of its block.
        """
        last = held.end - held.end % HASH_BLOCK_TOKENS
        if last < held.end:
            tail = replace(held, start=last, count=held.end - last)
            if not self._device.is_sealed(tail):
                self._device.seal(tail)
        self._host.write_tokens(host, self._device.read_tokens(held))

    def swap_in(self, host: HeldTokens, held: HeldTokens) -> bool:
        """Copy tokens back into fresh blocks; whether all of them hold there what was sealed."""
        try:
            self._device.write_tokens(held, self._host.read_tokens(host))
        except KvCorrupted:
            return False
        return self._device.verify(held)
