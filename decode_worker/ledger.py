"""Dispatch table of a decode worker: its runs by router, request and epoch, and their sessions. Pure.

    session ──▶ router (id, incarnation) ──▶ request, choice ──▶ the one run of the highest epoch; epochs of ended ones

Request names that clients choose are unique within one incarnation of one router only. So a router replaces, cancels
and gets the output of its own runs, never of another router's run with the same request name. A restarted router
counts as another router. Runs whose session is lost continue as orphans until their grace period is over.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from enum import StrEnum
from typing import Generic, NamedTuple, TypeVar

from ..core.request import Epoch, SequenceKey

MAX_ENDED_EPOCHS = 4_096  # remembered, so that a late duplicate of an ended choice's order is not run again

TaskT = TypeVar("TaskT", bound=Hashable)
SessionT = TypeVar("SessionT", bound=Hashable)


class RouterKey(NamedTuple):
    """One incarnation of one router, from its hello."""

    router_id: str
    incarnation: int


class Standing(StrEnum):
    """Relation of an order to earlier orders of the same choice."""

    NEW = "new"
    DUPLICATE = "duplicate"
    STALE = "stale"


class Named(NamedTuple, Generic[TaskT]):
    """Runs that a cancel ends."""

    runs: tuple[TaskT, ...]
    num_stale: int  # runs of a newer dispatch, which the cancel does not end


class _Entry(NamedTuple, Generic[SessionT]):
    router: RouterKey
    key: SequenceKey
    epoch: Epoch
    session: SessionT


class Ledger(Generic[TaskT, SessionT]):
    """All runs of one worker. Sessions and runs are compared by identity."""

    def __init__(self, max_ended: int = MAX_ENDED_EPOCHS) -> None:
        self._max_ended = max_ended
        self._entries: dict[TaskT, _Entry[SessionT]] = {}  # runs of older epochs that are still ending included
        self._newest: dict[RouterKey, dict[SequenceKey, TaskT]] = {}
        self._ended: OrderedDict[tuple[RouterKey, SequenceKey], Epoch] = OrderedDict()
        self._sessions: dict[SessionT, None] = {}  # in the order they came

    # ------------------------------------------------------------------ sessions

    def open(self, session: SessionT) -> None:
        """Add a router's session."""
        self._sessions[session] = None

    def is_open(self, session: SessionT) -> bool:
        """True until the session is lost."""
        return session in self._sessions

    @property
    def sessions(self) -> tuple[SessionT, ...]:
        """Open sessions, in the order they came."""
        return tuple(self._sessions)

    def lose(self, session: SessionT) -> tuple[TaskT, ...]:
        """Remove a router's session; returns its runs, which are orphans now."""
        self._sessions.pop(session, None)
        return tuple(run for run, entry in self._entries.items() if entry.session is session)

    # ------------------------------------------------------------------ orders

    def standing(self, router: RouterKey, key: SequenceKey, epoch: Epoch) -> Standing:
        """Relation of an order to earlier ones; only a NEW order must be carried out."""
        older, ended = self.older(router, key), self._ended.get((router, key))
        running = None if older is None else self._entries[older].epoch
        known = max((one for one in (running, ended) if one is not None), default=None)  # `ended`: also a refused order
        if known is None or epoch > known:
            return Standing.NEW
        return Standing.DUPLICATE if epoch == known else Standing.STALE

    def older(self, router: RouterKey, key: SequenceKey) -> TaskT | None:
        """The run that a new order of the same choice replaces, or None."""
        return self._newest.get(router, {}).get(key)

    def begin(self, run: TaskT, session: SessionT, router: RouterKey, key: SequenceKey, epoch: Epoch) -> None:
        """Add the run of an order."""
        self._entries[run] = _Entry(router, key, epoch, session)
        self._newest.setdefault(router, {})[key] = run

    def refuse(self, router: RouterKey, key: SequenceKey, epoch: Epoch) -> None:
        """Remember an order that ended before it became a run."""
        self._remember(router, key, epoch)

    def end(self, run: TaskT) -> None:
        """Remove a run that is over."""
        router, key, epoch, _ = self._entries.pop(run)
        newest = self._newest.get(router, {})  # empty: a newer run of the same choice has ended before this one
        if newest.get(key) is run:
            del newest[key]
            if not newest:
                del self._newest[router]
            self._remember(router, key, epoch)

    # ------------------------------------------------------------------ cancels

    def named(self, router: RouterKey, request_id: str, epoch: Epoch) -> Named[TaskT]:
        """The runs of a router's request that a cancel with `epoch` ends."""
        runs = [run for key, run in self._newest.get(router, {}).items() if key.request_id == request_id]
        meant = tuple(run for run in runs if epoch >= self._entries[run].epoch)
        return Named(meant, len(runs) - len(meant))

    # ------------------------------------------------------------------ runs

    @property
    def runs(self) -> tuple[TaskT, ...]:
        """All runs that have not ended, those of older epochs that are still ending included."""
        return tuple(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, run: TaskT) -> bool:
        return run in self._entries

    def router_of(self, run: TaskT) -> RouterKey:
        """The router of a run."""
        return self._entries[run].router

    def _remember(self, router: RouterKey, key: SequenceKey, epoch: Epoch) -> None:
        self._ended[router, key] = max(epoch, self._ended.get((router, key), epoch))
        self._ended.move_to_end((router, key))
        while len(self._ended) > self._max_ended:
            self._ended.popitem(last=False)
