"""What the pure core asks of the store: small values, executed by the engine (or the simulator's fake store).

Execute them in order, before the core's next call: block tables hold only until then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..core.request import SequenceKey
from ..kv.block import BlockId

if TYPE_CHECKING:
    from ..kv.section import SectionData


@dataclass(frozen=True, slots=True)
class ReadOp:
    """Read the planes and sealed digests of a sequence's tokens; becomes a `KvRead`."""

    key: SequenceKey
    token_start: int
    token_count: int
    block_table: tuple[BlockId, ...]  # of the sequence, from its first token on
    generations: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WriteOp:
    """Write verified planes into a sequence's own, unpublished blocks; becomes a `KvWritten`."""

    key: SequenceKey
    token_start: int
    token_count: int
    block_table: tuple[BlockId, ...]  # of the sequence, from its first token on
    generations: tuple[int, ...]
    sections: tuple[SectionData, ...]


@dataclass(frozen=True, slots=True)
class FetchOp:
    """Read cached hash blocks, wherever they lie; becomes a `BlocksFetched` of `token_count` / 16 blocks."""

    fetch_id: int
    token_start: int
    token_count: int
    block_table: tuple[BlockId, ...]  # indexed like a sequence's; entries before `token_start` mean nothing
    generations: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SwapOutOp:
    """Copy a preempted sequence's tokens with their seals to host blocks, before anybody writes its blocks again."""

    key: SequenceKey
    token_start: int  # a block begins here
    token_count: int
    block_table: tuple[BlockId, ...]  # of the sequence as it was
    generations: tuple[int, ...]
    host_table: tuple[BlockId, ...]  # indexed like `block_table`; entries before `token_start` mean nothing
    host_generations: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SwapInOp:
    """Copy tokens back from host blocks into fresh ones; `EngineCore.swap_failed` where their digests do not hold."""

    key: SequenceKey
    token_start: int
    token_count: int
    block_table: tuple[BlockId, ...]  # of the sequence as it is now
    generations: tuple[int, ...]
    host_table: tuple[BlockId, ...]
    host_generations: tuple[int, ...]


SwapOp = SwapOutOp | SwapInOp
StoreOp = ReadOp | WriteOp | FetchOp | SwapOutOp | SwapInOp
