"""Store operations that the pure core requests; the engine (or the simulator's store) executes them.

Execute them in order, before the core's next call: block tables are valid only until then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..core.request import SequenceKey
from ..kv.block import BlockId

if TYPE_CHECKING:
    from ..kv.section import PlaneBuffer, SectionData


@dataclass(frozen=True, slots=True)
class ReadOp:
    """Read the planes and sealed digests of a sequence's tokens; becomes a `KvRead`."""

    key: SequenceKey
    token_start: int
    token_count: int
    block_table: tuple[BlockId, ...]  # of the sequence, from its first token on
    generations: tuple[int, ...]
    into: PlaneBuffer | None = None  # memory for the planes; None: new memory
    without_windows: bool = False  # of the full layers only (kv/windows.py)


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
    """Read cached hash blocks; becomes a `BlocksFetched` of `token_count` / 16 blocks."""

    fetch_id: int
    token_start: int
    token_count: int
    block_table: tuple[BlockId, ...]  # indexed like a sequence's; entries before `token_start` are invalid
    generations: tuple[int, ...]
    without_windows: bool = False


@dataclass(frozen=True, slots=True)
class SwapOutOp:
    """Copy a preempted sequence's tokens with their seals to host blocks, before its blocks are written again."""

    key: SequenceKey
    token_start: int  # a block begins here
    token_count: int
    block_table: tuple[BlockId, ...]  # of the sequence before its preemption
    generations: tuple[int, ...]
    host_table: tuple[BlockId, ...]  # indexed like `block_table`; entries before `token_start` are invalid
    host_generations: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SwapInOp:
    """Copy tokens back from host blocks into new ones; if digests do not match, call `EngineCore.swap_failed`."""

    key: SequenceKey
    token_start: int
    token_count: int
    block_table: tuple[BlockId, ...]  # of the sequence now
    generations: tuple[int, ...]
    host_table: tuple[BlockId, ...]
    host_generations: tuple[int, ...]


SwapOp = SwapOutOp | SwapInOp
StoreOp = ReadOp | WriteOp | FetchOp | SwapOutOp | SwapInOp
