"""Decode workers that were lost and may come back: a supervisor restarts them. Pure.

A request whose model has no other decode worker waits for them instead of failing at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from .facts import ModelFacts, WorkerFacts

MAX_LOST = 1024


class _Lost(NamedTuple):
    facts: WorkerFacts
    until_s: float


class LostWorkers:
    """Lost decode workers by name, each for `return_s` seconds after its loss."""

    def __init__(self, return_s: float) -> None:
        self._return_s = return_s
        self._lost: dict[str, _Lost] = {}

    def add(self, facts: WorkerFacts, now_s: float) -> None:
        """A decode worker was lost without announcing that it leaves. A loss that is known already keeps its time."""
        if self._return_s > 0 and len(self._lost) < MAX_LOST:
            self._lost.setdefault(facts.worker_id, _Lost(facts, now_s + self._return_s))

    def remove(self, worker_id: str) -> None:
        """The worker is back, or it left on purpose."""
        self._lost.pop(worker_id, None)

    def tick(self, now_s: float) -> None:
        """Forget the workers whose time is over."""
        for worker_id in [worker_id for worker_id, lost in self._lost.items() if lost.until_s <= now_s]:
            del self._lost[worker_id]

    def until_s(self, model: str) -> float | None:
        """Time until which a lost decode worker of the model may come back; None: none was lost."""
        return max((lost.until_s for lost in self._lost.values() if lost.facts.model.name == model), default=None)

    def models(self) -> Iterable[ModelFacts]:
        """Models of the lost workers."""
        return [lost.facts.model for lost in self._lost.values()]

    def workers(self) -> Iterable[WorkerFacts]:
        """The lost workers, as they announced themselves."""
        return [lost.facts for lost in self._lost.values()]
