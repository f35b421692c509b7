"""Where a match in a worker's prefix cache ends, for readers of its events: the same rule, and its encoding. Pure.

identities     a b c d | e f g h | i j k l | m        block_tokens = 64
lacking                d         h                    bits 0x88: blocks without their windowed layers
a chain a … m          match: l, if the window reaches back to i only; else nothing
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

from ..block import BlockIdentity
from ..spec import HASH_BLOCK_TOKENS, WindowedLayers
from ..windows import last_start

MAX_BLOCK_TOKENS = 1 << 12


class Reach(NamedTuple):
    """What decides where matches of a cache end."""

    block_tokens: int = HASH_BLOCK_TOKENS  # physical blocks are found whole
    window_tokens: int = 0  # the largest window; 0: no layer has one

    def whole(self, num_held: int) -> int:
        """A number of leading hash blocks, rounded down to whole physical blocks."""
        return num_held - num_held % (self.block_tokens // HASH_BLOCK_TOKENS)

    def usable(self, identities: Sequence[BlockIdentity], num_held: int, lacks: Callable[[BlockIdentity], bool]) -> int:
        """Number of leading hash blocks after which computing may begin, of the first `num_held`, which are stored.

        `lacks`: the hash block ends a block without its windowed layers.
        """
        span = self.block_tokens // HASH_BLOCK_TOKENS
        windowed = WindowedLayers((), self.window_tokens) if self.window_tokens else None

        def lacks_number(number: int) -> bool:
            return lacks(identities[(number + 1) * span - 1])

        return last_start(windowed, num_held // span, self.block_tokens, lacks_number) * span


EVERYWHERE = Reach()
"""Matches end anywhere: blocks of one hash block, no windows. Also of workers of an older release."""


def reach_of(block_tokens: int, windowed: WindowedLayers | None) -> Reach:
    """The reach of a worker's cache."""
    return Reach(block_tokens, 0 if windowed is None else windowed.tokens)


def told_reach(block_tokens: int, window_tokens: int) -> Reach:
    """The reach that a worker told; what cannot be counts as `EVERYWHERE`."""
    if not 0 < block_tokens <= MAX_BLOCK_TOKENS or block_tokens % HASH_BLOCK_TOKENS:
        return EVERYWHERE
    return Reach(block_tokens, window_tokens)


def bits_of(identities: Sequence[BlockIdentity], lacking: Collection[BlockIdentity]) -> bytes:
    """One bit per identity, least first, set if it is among `lacking`; empty if none is."""
    bits = bytearray(-(-len(identities) // 8))
    for place, identity in enumerate(identities if lacking else ()):
        if identity in lacking:
            bits[place >> 3] |= 1 << (place & 7)
    return bytes(bits).rstrip(b"\0")


def places_of(bits: bytes) -> Iterator[int]:
    """Places of the bits that are set, in order."""
    for place, byte in enumerate(bits):
        for bit in range(8):
            if byte >> bit & 1:
                yield 8 * place + bit
