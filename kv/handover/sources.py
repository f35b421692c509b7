"""Which worker is asked next for the blocks that an order lacks here. Pure: knows no stream and no engine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ...core.ports import check_address
from ...protos import worker_pb2
from ..block import BlockIdentity
from ..spec import HASH_BLOCK_TOKENS, WindowedLayers
from .fetching import FetchEnd, Wanted

MOST_SOURCES = 4  # of one order that are asked
MOST_LEFT_TOKENS = 64 + HASH_BLOCK_TOKENS  # left after a fetch: less is computed here even if a prefill worker would


@dataclass(frozen=True, slots=True)
class BlockSource:
    """A worker that holds leading blocks of an order's chain."""

    worker_id: str
    incarnation: int
    address: str
    num_blocks: int  # hash blocks, as the router believes


class FetchedBlocks(NamedTuple):
    """What the fetches of one order brought, all sources together."""

    num_tokens: int = 0
    source: str = ""  # the last worker that gave some
    end: str = ""  # of the last fetch, a `FetchEnd`; empty: none was begun


NOTHING_FETCHED = FetchedBlocks()


def sources_from_wire(messages: Iterable[worker_pb2.BlockSource]) -> tuple[BlockSource, ...]:
    """The first MOST_SOURCES sources that a message names.

    Raises:
        InvalidRequest: an address is not host:port.
    """
    return tuple(
        BlockSource(m.worker_id, m.incarnation, check_address(m.address, "block_sources.address"), m.num_blocks)
        for m, _ in zip(messages, range(MOST_SOURCES), strict=False)
    )


def sources_to_wire(sources: Iterable[BlockSource]) -> list[worker_pb2.BlockSource]:
    """Sources as messages name them."""
    return [
        worker_pb2.BlockSource(
            worker_id=s.worker_id, incarnation=s.incarnation, address=s.address, num_blocks=s.num_blocks
        )
        for s in sources
    ]


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
