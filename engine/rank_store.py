"""The KV memory of all ranks of a worker as one store: every operation is done at all ranks, or fails at all. Pure.

    engine: read(op) ─▶ SlicedStore ─ op ─▶ every rank: carry_out
                            └────── rank 0's part ──────┘
                          agree: did all succeed? gather: the parts of all ranks

Every piece of work ends with one number per rank (`together`), so that it succeeds or fails at all ranks alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol, TypeVar

from ..core.errors import InternalError, KvCorrupted, RankLost, RanksDiffer
from ..kv.section import SectionData
from ..kv.slices import U8, RankSlices
from .store_ops import FetchOp, ReadOp, StoreOp, SwapInOp, SwapOutOp, WriteOp
from .turn import Store

T = TypeVar("T")

_DONE, _FAILED, _DAMAGED = range(3)  # how a rank's work ended; damaged: swapped-in tokens do not match their seals


class Agreement(Protocol):
    """The part of a group that ends each piece of work; `SharedMemoryGroup` implements it."""

    def agree(self, mine: int) -> Sequence[int]:
        """Every rank's number."""
        ...


class RankGroup(Agreement, Protocol):
    """One rank's end of its group; `SharedMemoryGroup` implements it."""

    @property
    def rank(self) -> int:
        """The rank's number."""
        ...

    @property
    def size(self) -> int:
        """Number of ranks."""
        ...

    def gather_bytes(self, mine: U8) -> Sequence[U8] | None:
        """The arrays of all ranks at rank 0, uint8 of one size; None at the others."""
        ...


class OtherRanks(Protocol):
    """The link to the other ranks; `RankSender` implements it."""

    def send_operations(self, operations: Sequence[StoreOp]) -> None:
        """Send each rank its own operation, from rank 1 on."""
        ...


def together(group: Agreement, work: Callable[[], T], ended: Callable[[T], int] = lambda _: _DONE) -> T:
    """Do one piece of work at all ranks; it succeeds at all of them, or raises at all of them.

    `ended`: what the other ranks learn of this rank's result.

    Raises:
        RankLost: a rank is gone, for good.
        InternalError: the work failed at another rank.
        Exception: it failed here.
    """
    try:
        result = work()
    except (RankLost, RanksDiffer):
        raise  # all ranks know
    except Exception:
        _tell_failure(group)
        raise
    found = group.agree(ended(result))
    failed = [rank for rank, number in enumerate(found) if number == _FAILED]
    if failed:
        raise InternalError(f"rank {failed[0]} could not do its part; the worker's log has more")
    if _DAMAGED in found:
        raise KvCorrupted("swapped-in tokens do not match their seals at some rank")
    return result


def _tell_failure(group: Agreement) -> None:
    try:
        group.agree(_FAILED)
    except RanksDiffer:
        pass  # the others were in the middle of the work, and know it now


class SlicedStore:
    """The KV memory of all ranks as one store. Implements `Store` of engine/turn.py, at rank 0.

    Reads join the heads of all ranks, writes take them apart; swaps are done by each rank in its own host memory.
    """

    def __init__(self, mine: Store, sender: OtherRanks, group: RankGroup, slices: RankSlices) -> None:
        """`mine`: rank 0's own store."""
        self._mine = mine
        self._sender = sender
        self._group = group
        self._slices = slices

    def read(self, op: ReadOp | FetchOp) -> tuple[SectionData, ...]:
        """Copy planes out of all ranks, with their seals."""
        into = op.into if isinstance(op, ReadOp) else None
        if isinstance(op, ReadOp):
            op = replace(op, into=None)  # of this process, and for the joined heads
        self._send(op)
        sections = together(self._group, lambda: self._mine.read(op))
        parts = self._group.gather_bytes(self._slices.packed(0, sections, op.token_count))
        assert parts is not None, "rank 0 gathers"
        return self._slices.joined(parts, op.token_count, into, without_windows=op.without_windows)

    def write(self, op: WriteOp) -> None:
        """Give every rank its heads of verified planes."""
        own, *others = (replace(op, sections=sections) for sections in self._slices.taken_apart(op.sections))
        self._sender.send_operations(others)
        together(self._group, lambda: self._mine.write(own))

    def swap_out(self, op: SwapOutOp) -> None:
        """Copy to host memory at all ranks."""
        self._send(op)
        together(self._group, lambda: self._mine.swap_out(op))

    def swap_in(self, op: SwapInOp) -> bool:
        """Copy back from host memory at all ranks; returns True if all copied tokens match their seals everywhere."""
        self._send(op)
        try:
            return together(self._group, lambda: self._mine.swap_in(op), _swapped_in)
        except KvCorrupted:
            return False

    def _send(self, op: StoreOp) -> None:
        self._sender.send_operations([op] * (self._group.size - 1))


def carry_out(op: StoreOp, store: Store, group: RankGroup, slices: RankSlices) -> None:
    """Do the part of a rank other than 0."""
    match op:
        case ReadOp() | FetchOp():
            sections = together(group, lambda: store.read(op))
            group.gather_bytes(slices.packed(group.rank, sections, op.token_count))
        case WriteOp():
            together(group, lambda: store.write(op))
        case SwapOutOp():
            together(group, lambda: store.swap_out(op))
        case SwapInOp():
            together(group, lambda: store.swap_in(op), _swapped_in)


def _swapped_in(is_sound: bool) -> int:
    return _DONE if is_sound else _DAMAGED
