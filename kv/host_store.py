"""Where a preempted sequence's blocks wait in host memory, with their seals. Knows bytes, not who waits nor how long.

The host side is a store of its own with the same planes and seals, so whatever the device store can hand to a peer it
can hand to the host: on a GPU only the copy between the two differs, not this order of steps.
"""

from __future__ import annotations

from dataclasses import replace

from ..core.errors import KvCorrupted
from .spec import HASH_BLOCK_TOKENS
from .store import HeldTokens, KvStore


class HostStore:
    """Host blocks beside one rank's store. One thread at a time: the engine's."""

    def __init__(self, store: KvStore, num_blocks: int, digest_key: int = 0) -> None:
        """`digest_key`: the one of `store`."""
        self._device = store
        self._host = KvStore(store.spec, num_blocks, store.block_tokens, digest_key=digest_key)

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
