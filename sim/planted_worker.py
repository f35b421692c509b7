"""Planted bugs of a worker towards its routers: sessions, epochs, messages, and forgotten requests."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from ..core.request import Epoch, SequenceKey
from ..decode_worker.ledger import Ledger, Named, RouterKey, Standing
from ..decode_worker.outbox import Outbox
from ..engine.link.messages import CacheDelta, CacheSnapshot
from ..protos import worker_pb2
from ..worker.watch import Watcher
from .planting import Planted, instead, losing_routers


def stale_orders_run() -> AbstractContextManager[None]:
    """An order of an older dispatch replaces the newer run."""
    original = Ledger.standing

    def standing(self: Ledger[Any, Any], router: RouterKey, key: SequenceKey, epoch: Epoch) -> Standing:
        found = original(self, router, key, epoch)
        return Standing.NEW if found is Standing.STALE else found

    return instead(Ledger, "standing", standing)


def stale_cancels_kill() -> AbstractContextManager[None]:
    """A cancel of an older dispatch ends the newer run."""
    original = Ledger.named

    def named(self: Ledger[Any, Any], router: RouterKey, request_id: str, epoch: Epoch) -> Named[Any]:
        return original(self, router, request_id, Epoch(epoch.incarnation + 1, 0))

    return instead(Ledger, "named", named)


def one_orphan_survives() -> AbstractContextManager[None]:
    """The first run of a lost session is not cancelled when its grace is over."""
    original = Ledger.lose

    def lose(self: Ledger[Any, Any], session: Any) -> tuple[Any, ...]:
        return original(self, session)[1:]

    return instead(Ledger, "lose", lose)


def ends_are_forgotten() -> AbstractContextManager[None]:
    """A late copy of an order is run again after its run has ended."""
    return instead(Ledger, "_remember", lambda *_: None)


def removals_are_not_told() -> AbstractContextManager[None]:
    """A watching router is told of new blocks only, not of evicted ones."""
    original = Watcher.hear_cache

    def hear_cache(self: Watcher, event: CacheDelta | CacheSnapshot) -> None:
        original(self, replace(event, removed=()) if isinstance(event, CacheDelta) else event)

    return instead(Watcher, "hear_cache", hear_cache)


def ends_overtake_tokens() -> AbstractContextManager[None]:
    """When a message is full, a choice's end leaves before its last tokens."""
    original = Outbox.take

    def take(self: Outbox) -> worker_pb2.StepOutput | None:
        output = original(self)
        if output is not None:
            output.ends.extend(self._ends)
            self._ends = []
        return output

    return instead(Outbox, "take", take)


BUGS = (
    Planted(stale_orders_run, ("R6",), 100),
    Planted(stale_cancels_kill, ("R6",), 100),
    Planted(one_orphan_survives, ("R7",), 100, losing_routers),
    Planted(ends_are_forgotten, ("R6",), 100),
    Planted(removals_are_not_told, ("K5",), 100),
    Planted(ends_overtake_tokens, ("R1",), 450),
)
