"""Work that all ranks of a worker do together: rank 0 leads with plans and store operations, the others follow.

    engine: run(plan) ─▶ Leader ─ plan ─▶ rank link ─▶ follow: run(plan)
                           └───────── run, sums over the ranks ─────────┘
                                    agree: did all succeed?

Every piece of work ends with one number per rank (`together`), so that it succeeds or fails at all ranks alike: a step
that fails at one rank fails for the engine, which repeats it sequence by sequence.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol, TypeVar

from ..core.errors import InternalError, KvCorrupted, RankLost, RanksDiffer
from ..engine.link.rank_link import RankReceiver, RankSender
from ..engine.loop import StepRunner
from ..engine.plan import SequenceStep, StepPlan, StepResult
from ..engine.store_ops import FetchOp, ReadOp, StoreOp, SwapInOp, SwapOutOp, WriteOp
from ..engine.turn import Store
from ..kv.section import SectionData
from ..kv.slices import RankSlices
from ..model.parallel.shared_group import SharedMemoryGroup
from .machine import pin_thread

T = TypeVar("T")
_log = logging.getLogger(__name__)

_DONE, _FAILED, _DAMAGED = range(3)  # how a rank's work ended; damaged: swapped-in tokens do not match their seals
_REMEMBERED_STEPS = 4  # as in model/runner.py


class Agreement(Protocol):
    """The part of a group that ends each piece of work; `SharedMemoryGroup` implements it."""

    def agree(self, mine: int) -> Sequence[int]:
        """Every rank's number."""
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


class Leader:
    """Rank 0's runner. Implements `StepRunner` of engine/loop.py; sends every plan before it runs it."""

    def __init__(
        self, runner: StepRunner, sender: RankSender, group: SharedMemoryGroup, processors: Sequence[int] = ()
    ) -> None:
        """`processors`: of the engine's thread; empty: any."""
        self._processors = processors
        self._runner = runner
        self._sender = sender
        self._group = group
        self._results: dict[int, StepResult] = {}

    def warm_up(self) -> None:
        """Warm up all ranks at once. Called in the engine's thread."""
        pin_thread(self._processors)
        self._sender.send_warm_up()
        together(self._group, self._runner.warm_up)

    def run(self, plan: StepPlan) -> StepResult:
        """Compute one step at all ranks; the result is rank 0's.

        Tokens that earlier steps sampled are filled in first: the other ranks do not sample, and do not know them.
        """
        known = StepPlan(plan.step, tuple(map(self._filled_in, plan.sequences)))
        self._sender.send_plan(known)
        result = together(self._group, lambda: self._runner.run(known))
        self._results[result.step] = result
        while len(self._results) > _REMEMBERED_STEPS:
            del self._results[next(iter(self._results))]
        return result

    def _filled_in(self, step: SequenceStep) -> SequenceStep:
        place = step.from_place
        if place is None:
            return step
        sampled = self._results[place.step].tokens[place.row]
        # A sequence that failed in that step has no token; its rows are computed anyway, and the caller drops them.
        first, history = sampled[-1] if sampled else 0, step.history
        if history is not None:
            history = history._replace(output_ids=(*history.output_ids, first))
        return step._replace(token_ids=(first, *step.token_ids[1:]), from_place=None, history=history)


class SlicedStore:
    """The KV memory of all ranks as one store. Implements `Store` of engine/turn.py, at rank 0.

    Reads join the heads of all ranks, writes take them apart; swaps are done by each rank in its own host memory.
    """

    def __init__(self, mine: Store, sender: RankSender, group: SharedMemoryGroup, slices: RankSlices) -> None:
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


def follow(
    receiver: RankReceiver, runner: StepRunner, store: Store, group: SharedMemoryGroup, slices: RankSlices
) -> None:
    """Do this rank's part of all work, until rank 0 ends.

    Raises:
        LinkEnded: rank 0 has ended.
        RankLost: another rank is gone.
        WireError: the link between the ranks failed.
    """

    def look() -> None:
        lost = group.lost_rank()
        if lost is not None:
            raise RankLost(f"rank {lost} of {group.size} is gone")

    while True:
        message = receiver.receive(look)
        try:
            if message is None:
                together(group, runner.warm_up)
            elif isinstance(message, StepPlan):
                plan = message
                together(group, lambda: runner.run(plan))  # noqa: B023 - called at once
            else:
                _execute(message, store, group, slices)
        except RankLost:
            raise
        except Exception:
            _log.exception("rank %d: %s failed", group.rank, type(message).__name__)


def _execute(op: StoreOp, store: Store, group: SharedMemoryGroup, slices: RankSlices) -> None:
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
