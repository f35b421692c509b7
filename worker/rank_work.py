"""Work that all ranks of a worker do together: rank 0 leads with plans and store operations, the others follow.

    engine: run(plan) ─▶ Leader ─ plan ─▶ rank link ─▶ follow: run(plan)
                           └───────── run, sums over the ranks ─────────┘
                                    agree: did all succeed?

Every piece of work succeeds or fails at all ranks alike (`engine/rank_store.py`, which also has the store of all
ranks): a step that fails at one rank fails for the engine, which repeats it sequence by sequence.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ..core.errors import RankLost
from ..engine.link.rank_link import RankReceiver, RankSender
from ..engine.loop import StepRunner
from ..engine.plan import SequenceStep, StepPlan, StepResult
from ..engine.rank_store import carry_out, together
from ..engine.turn import Store
from ..kv.slices import RankSlices
from ..model.parallel.shared_group import SharedMemoryGroup
from .machine import pin_thread

_log = logging.getLogger(__name__)

_REMEMBERED_STEPS = 4  # as in model/runner.py


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
                carry_out(message, store, group, slices)
        except RankLost:
            raise
        except Exception:
            _log.exception("rank %d: %s failed", group.rank, type(message).__name__)
