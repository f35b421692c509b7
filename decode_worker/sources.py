"""Which worker is asked next for the blocks that an order lacks here. Pure: knows no stream and no engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..kv.block import BlockIdentity
from ..kv.handover.fetching import FetchEnd, Wanted
from ..kv.spec import HASH_BLOCK_TOKENS, WindowedLayers

MOST_SOURCES = 4  # of one order that are asked
MOST_LEFT_TOKENS = 64 + HASH_BLOCK_TOKENS  # left after a fetch: less is computed here even if a prefill worker would


@dataclass(frozen=True, slots=True)
class BlockSource:
    """A worker that holds leading blocks of an order's chain."""

    worker_id: str
    incarnation: int
    address: str
    num_blocks: int  # hash blocks, as the router believes


class SourceLine:
    """The sources of one order, best first. Each is asked once; again once if what it sent was damaged on the way."""

    def __init__(self, sources: Sequence[BlockSource], identities: Sequence[BlockIdentity], num_tokens: int) -> None:
        """`identities`: of the order's full hash blocks. The last token is always computed, so no fetch covers it."""
        self._waiting = list(sources[:MOST_SOURCES])
        self._findable = tuple(identities[: (num_tokens - 1) // HASH_BLOCK_TOKENS])
        self._asked: BlockSource | None = None
        self._has_asked_again = False

    def next(self, held_tokens: int) -> BlockSource | None:
        """The source to ask for the blocks after `held_tokens`; None: none may have more."""
        while self._waiting:
            source = self._waiting.pop(0)
            if min(source.num_blocks, len(self._findable)) * HASH_BLOCK_TOKENS > held_tokens:
                self._asked = source
                return source
        return None

    def may_help(self, held_tokens: int) -> bool:
        """True if `next` would return a source."""
        most = max((source.num_blocks for source in self._waiting), default=0)
        return min(most, len(self._findable)) * HASH_BLOCK_TOKENS > held_tokens

    def wanted(self, held_tokens: int, numerics_class: bytes | None, windowed: WindowedLayers | None = None) -> Wanted:
        """What to ask it for: all blocks after `held_tokens`, since it may have more than the router knows."""
        return Wanted(self._findable[held_tokens // HASH_BLOCK_TOKENS :], held_tokens, numerics_class, windowed)

    def ended(self, end: str) -> None:
        """The fetch from the last source is over."""
        if end == FetchEnd.CORRUPTED and not self._has_asked_again and self._asked is not None:
            self._has_asked_again = True
            self._waiting.insert(0, self._asked)
