"""Ranks of a simulated worker: each has the KV of some heads, and production joins them to one store.

The KV of a head of a token is a function of its cell, so a store keeps cells; heads are made and checked at its edge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.errors import KvCorrupted, RankLost
from ...engine.rank_store import SlicedStore, carry_out
from ...engine.store_ops import FetchOp, ReadOp, StoreOp, SwapInOp, SwapOp, SwapOutOp, WriteOp
from ...kv.digest import frame_digests, places
from ...kv.section import HeldTokens, SectionData
from ...kv.slices import RankSlices
from ...kv.spec import HASH_BLOCK_TOKENS, KvSpec
from ...kv.store.host_store import HostStore
from ..invariants import Violation
from .cells import CELL_BYTES, DIGEST_KEY, CellStore

_UNLIKE = 0x48_45_41_44  # makes heads of a token unlike each other


def planes_of_heads(cells: Sequence[int], heads: range) -> NDArray[np.uint8]:
    """Planes [heads, tokens, bytes] of tokens with these cells."""
    marks = np.array([head * _UNLIKE for head in heads], np.uint64)[:, None]
    row: NDArray[np.uint8] = (np.array(cells, np.uint64)[None, :] ^ marks).view(np.uint8)
    return row.reshape(len(heads), len(cells), CELL_BYTES)


class HeadCells(CellStore):
    """Blocks of cells of which a rank has some heads."""

    heads = range(1)

    def read_tokens(self, held: HeldTokens, *, without_windows: bool = False) -> tuple[SectionData, ...]:
        """Implements `SealedStore.read_tokens`: heads are counted from the rank's first one."""
        (whole,) = super().read_tokens(held)
        if not self.verify(held):
            raise KvCorrupted(f"tokens {held.start}+{held.count} are not what was sealed")
        cells = whole.payload.reshape(-1).view(np.uint64).tolist()
        payload = planes_of_heads(cells, self.heads)[None]
        numbers = np.arange(held.start // HASH_BLOCK_TOKENS, -(-held.end // HASH_BLOCK_TOKENS))
        place = places(np.zeros((1, 1, 1), np.int64), 0, np.array(self.heads)[None, :, None], numbers)
        seals = frame_digests(payload, None, place, DIGEST_KEY, HASH_BLOCK_TOKENS)
        return (replace(whole, head_count=len(self.heads), payload=payload, digests=seals),)

    def write_tokens(self, held: HeldTokens, sections: Sequence[SectionData]) -> None:
        """Implements `SealedStore.write_tokens`. Checks K4: each head gets its own planes, once."""
        rows: dict[int, Any] = {}
        for section in sections:
            for place in range(section.head_count):
                rows[section.head_start + place] = section.payload[0, place]
        first = self.heads.start
        if sorted(rows) != [head - first for head in self.heads]:
            raise Violation("K4", f"heads {sorted(rows)} are written of {self.heads} at {held.start}+{held.count}")
        mark = np.uint64(first * _UNLIKE)
        cells = (np.ascontiguousarray(rows[0]).reshape(-1).view(np.uint64) ^ mark).tolist()
        wanted = planes_of_heads(cells, self.heads)
        if any(rows[head - first].tobytes() != wanted[place].tobytes() for place, head in enumerate(self.heads)):
            raise Violation("K4", f"a head of {held.start}+{held.count} gets planes of another one")
        self.write(held, cells)
        self.seal(held)
        if self._damaged():
            block, offset = self._place(held, held.start)
            self._cells[block][offset] ^= 4


class RankStore:
    """One rank's part. Implements `Store` of engine/turn.py."""

    def __init__(self, device: HeadCells, host: HeadCells) -> None:
        self.device = device
        self._host = HostStore(device, host)

    def read(self, op: ReadOp | FetchOp) -> tuple[SectionData, ...]:
        """Implements `Store.read`."""
        held = _held(op)
        self.device.check_owned(held)
        return self.device.read_tokens(held)

    def write(self, op: WriteOp) -> None:
        """Implements `Store.write`."""
        self.device.write_tokens(_held(op), op.sections)

    def swap_out(self, op: SwapOutOp) -> None:
        """Implements `Store.swap_out`."""
        self._host.swap_out(_held(op), _on_host(op))

    def swap_in(self, op: SwapInOp) -> bool:
        """Implements `Store.swap_in`."""
        return self._host.swap_in(_on_host(op), _held(op))


@dataclass(slots=True)
class _Follower:
    """The group's end of another rank, which works before rank 0 here. Implements `RankGroup`."""

    rank: int
    size: int
    said: list[int] = field(default_factory=list)
    gathered: list[Any] = field(default_factory=list)

    def agree(self, mine: int) -> Sequence[int]:
        """Implements `Agreement.agree`."""
        self.said.append(mine)
        return [mine]

    def gather_bytes(self, mine: Any) -> None:
        """Implements `RankGroup.gather_bytes`."""
        self.gathered.append(mine)


class SimRanks:
    """All ranks of a worker, and rank 0's end of their group. Implements `RankGroup` and `OtherRanks`."""

    rank = 0

    def __init__(self, stores: Sequence[RankStore], spec: KvSpec) -> None:
        self.size = len(stores)
        self.stores = stores
        self.lost: int | None = None
        self._slices = RankSlices(spec, self.size)
        self._followers = [_Follower(rank, self.size) for rank in range(1, self.size)]
        self.store = SlicedStore(stores[0], self, self, self._slices)

    def send_operations(self, operations: Sequence[StoreOp]) -> None:
        """Implements `OtherRanks.send_operations`: every living rank does its part at once."""
        for follower, store, op in zip(self._followers, self.stores[1:], operations, strict=True):
            follower.said.clear()
            follower.gathered.clear()
            if follower.rank == self.lost:
                continue
            try:
                carry_out(op, store, follower, self._slices)
            except Violation:
                raise
            except Exception:
                follower.gathered.clear()  # told to the group; production's `follow` logs it

    def agree(self, mine: int) -> Sequence[int]:
        """Implements `Agreement.agree`."""
        if self.lost is not None:
            raise RankLost(f"rank {self.lost} is gone")
        found = [mine, *(follower.said[-1] if follower.said else mine for follower in self._followers)]
        for follower in self._followers:
            follower.said.clear()
        return found

    def gather_bytes(self, mine: Any) -> Sequence[Any]:
        """Implements `RankGroup.gather_bytes`."""
        return [mine, *(follower.gathered[-1] for follower in self._followers)]


def make_ranks(make: partial[HeadCells], host: partial[HeadCells], spec: KvSpec, num_ranks: int) -> list[RankStore]:
    """The stores of all ranks of a worker."""
    found = []
    for rank in range(num_ranks):
        (component,) = spec.of_rank(rank, num_ranks).main.components
        pair = make(), host()
        for cells in pair:
            cells.heads = range(component.first_head, component.first_head + component.heads)
        found.append(RankStore(*pair))
    return found


def _held(op: StoreOp) -> HeldTokens:
    return HeldTokens(op.block_table, op.generations, op.token_start, op.token_count)


def _on_host(op: SwapOp) -> HeldTokens:
    return HeldTokens(op.host_table, op.host_generations, op.token_start, op.token_count)
