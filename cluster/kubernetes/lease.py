"""Who of several processes acts: one holder of a Lease at a time. Pure; times are of this process's own clock.

A record is judged by how long *we* have seen it unchanged, never by the time written in it: clocks of machines differ.
The holder stops before others may begin:

    renewed ├────── acts ──────┤ renew_by_s ── calls under way end ──┤ duration_s: another one takes it

Source: Kubernetes' leader election (client-go, tools/leaderelection).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LeaseTiming:
    """Bounds of a tenure. A call that acts must end within duration_s - renew_by_s."""

    duration_s: float = 30.0
    renew_by_s: float = 20.0
    interval_s: float = 2.0  # between two looks


@dataclass(frozen=True, slots=True)
class Record:
    """The Lease as it was read."""

    holder: str  # empty: nobody
    version: str
    duration_s: float
    transitions: int = 0


@dataclass(frozen=True, slots=True)
class Create:
    """There is no Lease: make it, with us as its holder."""


@dataclass(frozen=True, slots=True)
class Take:
    """Write ourselves into this version of it."""

    version: str
    transitions: int


@dataclass(frozen=True, slots=True)
class Renew:
    """It is ours: write it again."""

    version: str
    transitions: int


@dataclass(frozen=True, slots=True)
class Wait:
    """Another one holds it."""

    holder: str


class Tenure:
    """Our part in one Lease."""

    def __init__(self, me: str, timing: LeaseTiming | None = None) -> None:
        """`me`: of this process alone; a restarted one is another."""
        self.me = me
        self.timing = timing or LeaseTiming()
        self.holder = ""  # the last that was seen
        self._renewed_at_s: float | None = None
        self._seen = ("", 0.0)  # version, and since when

    def holds(self, now_s: float) -> bool:
        """True if we may act now."""
        return self._renewed_at_s is not None and now_s - self._renewed_at_s < self.timing.renew_by_s

    def look(self, record: Record | None, now_s: float) -> Create | Take | Renew | Wait:
        """What to do about the Lease that was read; None: there is none."""
        if record is None:
            self._renewed_at_s = None
            return Create()
        self.holder = record.holder
        if record.version != self._seen[0]:
            self._seen = (record.version, now_s)
        if record.holder == self.me:
            return Renew(record.version, record.transitions)
        self._renewed_at_s = None
        if not record.holder or now_s - self._seen[1] > record.duration_s:
            return Take(record.version, record.transitions + 1)
        return Wait(record.holder)

    def written(self, asked_at_s: float) -> None:
        """The API server took what we wrote; `asked_at_s`: before it was asked."""
        self._renewed_at_s = asked_at_s
        self.holder = self.me

    def refused(self) -> None:
        """Another process has written meanwhile."""
        self._renewed_at_s = None
