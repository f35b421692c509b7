"""Restart decisions for the wanted members, dead or unresponsive, with back-off. Knows no process, no clock."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class Standing(Enum):
    """State of a member."""

    STARTING = "starting"
    READY = "ready"
    WAITING = "waiting"  # dead, its back-off runs
    STOPPED = "stopped"  # must not run any more
    WITHHELD = "withheld"  # dead, and its GPU is cordoned


STOPPED_LOOKS = 4
"""Looks in a row at which a process must be seen stopped. Looks and not seconds: a pause of ours adds none."""


LONGEST_LOOK_S = 5.0
"""Longest time between two looks at the members; what exceeds it is a pause of our own, or of the whole machine."""


class Use(Enum):
    """Availability of a member as the router reports it."""

    SERVES = "serves"
    DRAINS = "drains"  # refuses new work, though the supervisor did not stop it: then it would be STOPPED
    NONE = "none"  # unknown, silent or unreachable


@dataclass(frozen=True, slots=True)
class BackOff:
    """Restart delays: the first restart at once, then doubling waits; a long healthy run resets the count."""

    first_s: float = 0.0
    base_s: float = 0.5
    longest_s: float = 30.0
    forgiven_after_s: float = 60.0

    def wait_s(self, failures_in_a_row: int) -> float:
        """Seconds to wait before the restart after the n-th failure in a row (n from 1)."""
        if failures_in_a_row <= 1:
            return self.first_s
        return float(min(self.longest_s, self.base_s * 2 ** min(failures_in_a_row - 2, 30)))


@dataclass(frozen=True, slots=True)
class Patience:
    """Longest time that a running process may be unavailable before it is replaced, in seconds."""

    missing_s: float = 20.0  # for a process that served before
    draining_s: float = 20.0  # for a draining process, which never takes new work again
    starting_s: float = 120.0  # for a process that has never served


@dataclass(slots=True)
class _Member:
    standing: Standing = Standing.STARTING
    failures: int = 0
    restarts: int = 0
    since_s: float = 0.0
    due_s: float = 0.0
    last_words: str = ""
    use: Use = Use.SERVES  # as last seen
    missing_since_s: float | None = None  # when a READY member became unavailable, for the reason in `use`
    stopped_looks: int = 0  # in a row


@dataclass(slots=True)
class RestartBook:
    """The wanted members and their states; the only owner of restart decisions."""

    back_off: BackOff = field(default_factory=BackOff)
    patience: Patience = field(default_factory=Patience)
    _members: dict[str, _Member] = field(default_factory=dict)
    _looked_s: float | None = None

    def want(self, name: str, now_s: float) -> None:
        """Add a member that must run; its start is due at once."""
        self._members[name] = _Member(Standing.WAITING, since_s=now_s, due_s=now_s)

    def due(self, now_s: float) -> list[str]:
        """Members to start now, in the order they were wanted."""
        return [n for n, m in self._members.items() if m.standing is Standing.WAITING and m.due_s <= now_s]

    def next_due_s(self) -> float | None:
        """Time of the next due start, or None."""
        return min((m.due_s for m in self._members.values() if m.standing is Standing.WAITING), default=None)

    def started(self, name: str, now_s: float) -> None:
        """Record that a member's process was started."""
        member = self._members[name]
        member.standing, member.since_s, member.missing_since_s = Standing.STARTING, now_s, None
        member.use = Use.SERVES

    def ready(self, name: str, now_s: float) -> None:
        """Record that a starting member serves."""
        member = self._members[name]
        if member.standing is Standing.STARTING:
            member.standing, member.since_s = Standing.READY, now_s

    def looked(self, now_s: float) -> None:
        """Record that all members are looked at now. A pause of our own is no absence of theirs."""
        pause_s = 0.0 if self._looked_s is None else now_s - self._looked_s - LONGEST_LOOK_S
        self._looked_s = now_s
        for member in self._members.values() if pause_s > 0.0 else ():
            if member.missing_since_s is not None:
                member.missing_since_s += pause_s
            if member.standing is Standing.STARTING:
                member.since_s += pause_s

    def seen(self, name: str, use: Use | None, now_s: float) -> None:
        """Record the availability of a READY member. None: unknown; an earlier absence does not count then."""
        member = self._members[name]
        if use in (None, Use.SERVES) or member.standing is not Standing.READY:
            member.missing_since_s = None
        elif member.missing_since_s is None or member.use is not use:
            member.missing_since_s = now_s
        member.use = use or member.use

    def overdue(self, now_s: float) -> list[str]:
        """Members whose process has been unavailable for too long; the caller ends them, and they are restarted.

        A process that is frozen, unreachable, or drains without our order never ends by itself. Each is returned once
        per patience interval.
        """
        found = []
        for name, member in self._members.items():
            if member.standing is Standing.READY and member.missing_since_s is not None:
                is_draining = member.use is Use.DRAINS
                patience_s = self.patience.draining_s if is_draining else self.patience.missing_s
                is_overdue = now_s - member.missing_since_s > patience_s
            else:
                is_overdue = member.standing is Standing.STARTING and now_s - member.since_s > self.patience.starting_s
            if is_overdue:
                found.append(name)
                member.since_s, member.missing_since_s = now_s, None
        return found

    def stands_still(self, name: str, *, is_stopped: bool) -> bool:
        """Record a look at a member's process. True: a signal stopped it, so it does nothing; the caller ends it.

        Unlike silence this is certain: no load on the machine makes a process look so. True once per so many looks.
        """
        member = self._members[name]
        member.stopped_looks = member.stopped_looks + 1 if is_stopped else 0
        if member.stopped_looks < STOPPED_LOOKS or member.standing is Standing.STOPPED:
            return False
        member.stopped_looks = 0
        return True

    def ended(self, name: str, last_words: str, now_s: float) -> float | None:
        """Record the end of a member's process; returns the time of its restart, or None if it was stopped."""
        member = self._members[name]
        if member.standing is Standing.STOPPED:
            return None
        healthy = member.standing is Standing.READY and now_s - member.since_s >= self.back_off.forgiven_after_s
        member.failures = 1 if healthy else member.failures + 1
        member.restarts += 1
        member.last_words = last_words
        member.standing, member.since_s = Standing.WAITING, now_s
        member.due_s = now_s + self.back_off.wait_s(member.failures)
        return member.due_s

    def withhold(self, name: str, last_words: str, now_s: float) -> None:
        """Record the end of a member that must not be started again, because no usable GPU is left for it."""
        member = self._members[name]
        if member.standing is not Standing.STOPPED:
            member.standing, member.since_s, member.last_words = Standing.WITHHELD, now_s, last_words

    def last_words(self, name: str) -> str:
        """Cause of a member's last end."""
        return self._members[name].last_words

    def stop(self, name: str) -> None:
        """Record that a member must not run any more, also one that was never wanted."""
        self._members.setdefault(name, _Member()).standing = Standing.STOPPED

    def resume(self, name: str, now_s: float) -> None:
        """A member that was stopped, and whose process runs, must run on."""
        member = self._members[name]
        member.standing, member.since_s, member.missing_since_s = Standing.READY, now_s, None

    def forget(self, name: str) -> None:
        """A stopped member is gone for good."""
        self._members.pop(name, None)

    def owned(self, name: str) -> bool:
        """True if a member runs or will run again."""
        return self._members[name].standing not in (Standing.STOPPED, Standing.WITHHELD)

    def standing(self, name: str) -> Standing:
        """State of a member."""
        return self._members[name].standing

    def use(self, name: str) -> Use:
        """Availability of a member when it was last seen."""
        return self._members[name].use

    def restarts(self, name: str) -> int:
        """Number of restarts of a member."""
        return self._members[name].restarts

    def starting(self) -> list[str]:
        """Members that do not serve yet: starting, or waiting for a restart."""
        return [n for n, m in self._members.items() if m.standing in (Standing.STARTING, Standing.WAITING)]

    def names(self) -> list[str]:
        """All members ever wanted."""
        return list(self._members)
