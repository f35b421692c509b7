"""Bugs that were put in on purpose, and within how many seeds each must be found. What the simulator is measured with.

Each is one small change of production code, as somebody could make it by accident; some were real. The bound is at
least eight times the number of seeds that finding it took, counted from the first seed of campaign 0.

TABLE
"""

from __future__ import annotations

from contextlib import AbstractContextManager

from ..core.request import Epoch
from ..router import delivery
from ..router.run import Run as RouterRun
from . import planted_engine, planted_handover, planted_worker
from .planting import Planted, _patched, instead
from .router import RouterNode

__all__ = ["PLANTED", "Planted"]

def old_epochs_are_heard() -> AbstractContextManager[None]:
    """The router takes tokens of any dispatch of a request."""

    def standing(self: delivery.Delivery, choice: int, epoch: Epoch) -> delivery.Verdict:
        is_running = choice < len(self._choices) and self._choices[choice].finish is None
        return delivery.Verdict.TAKE if is_running else delivery.Verdict.AFTER_END

    return instead(delivery.Delivery, "_standing", standing)


def gaps_are_closed() -> AbstractContextManager[None]:
    """The router takes tokens that do not follow."""

    def tokens(self: delivery.Delivery, choice: int, epoch: Epoch, first_index: int, count: int) -> delivery.Verdict:
        verdict = self._standing(choice, epoch)
        if verdict is delivery.Verdict.TAKE:
            self._choices[choice].next_index = first_index + count
        return verdict

    return instead(delivery.Delivery, "tokens", tokens)


def epochs_begin_anew_with_each_request() -> AbstractContextManager[None]:
    """Was real: an id that comes again is dispatched under an epoch that its worker has seen."""

    def next_epoch(self: RouterNode, run: RouterRun) -> Epoch:
        return Epoch(self.process.life, len(run.dispatches) + 1)

    return _patched(RouterNode, "next_epoch", next_epoch)


_ROUTER = (
    Planted(old_epochs_are_heard, ("R6",), 300),
    Planted(gaps_are_closed, ("R2",), 50),
    Planted(epochs_begin_anew_with_each_request, ("L1",), 200),
)

PLANTED = (
    *planted_handover.BUGS,
    *planted_engine.BUGS,
    *planted_worker.BUGS,
    *_ROUTER,
)
