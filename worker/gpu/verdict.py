"""Verdict on one device, from its readings, failed readings and XIDs. Pure: no NVML, thread or clock.

    ok ⇄ throttled      heat or power slows the clocks for a while, or NVML does not answer
    ok → drain | restart | cordon      and never back: the process ends, and the next one begins anew

Standing conditions (rows that wait for a reset, old error counts) change nothing. What a process finds at its start
counts only if it makes the device unfit: a failed remap, or a driver that asks for a reset.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .reading import THROTTLED_BY, ClockReason, Failure, Reading, Recovery
from .xid import Action, rule_of

MAX_REASONS = 8
UNCORRECTABLE, CONTAINED = 48, 94
"""XID 48 comes with 94 where the error is contained in one application: then a restart is enough."""


@dataclass(frozen=True, slots=True)
class HealthLimits:
    """Times of the verdict, in seconds, and bounds of the slowdown."""

    throttled_after_s: float = 2.0  # a short dip of the clocks is no state
    cool_after_s: float = 5.0  # without a reason to throttle
    silent_after_s: float = 5.0  # without an answer of NVML
    settled_after_s: float = 2.0  # after XID 48: XID 94 may follow
    default_slowdown: float = 2.0  # where the clocks are unknown
    least_slowdown: float = 1.2
    most_slowdown: float = 8.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """Verdict on a device, with its reasons."""

    action: Action = Action.NOTHING
    reasons: tuple[str, ...] = ()  # at most MAX_REASONS, newest last; some change nothing and are for operators
    lets_work_end: bool = True  # of DRAIN and CORDON: running work may end first
    slowdown: float = 1.0  # of THROTTLED: predicted times grow by this factor
    is_settled: bool = True  # False: it may become harder in a moment; the process ends anyway

    @property
    def ends_process(self) -> bool:
        """True if the worker must end."""
        return self.action >= Action.DRAIN


_CORDONED_BY = {
    Recovery.GPU_RESET: False,
    Recovery.NODE_REBOOT: False,
    Recovery.BUS_RESET: False,
    Recovery.SYSTEM_REBOOT: False,
    Recovery.DRAIN_AND_RESET: True,
}  # value: running work may end
_DRAINED_BY = (Recovery.DRAIN_P2P, Recovery.RECOVER_IMEX_DOMAIN)


class DeviceHealth:
    """Health of one device during the life of one process."""

    def __init__(self, now_s: float, limits: HealthLimits | None = None) -> None:
        self._limits = limits or HealthLimits()
        self._action = Action.NOTHING
        self._lets_work_end = True
        self._notes: dict[str, None] = {}  # in order, each once
        self._last: Reading | None = None
        self._first_uncorrected: int | None = None
        self._answered_s = now_s
        self._throttled_since_s: float | None = None
        self._throttled_seen_s: float | None = None
        self._is_throttled = False
        self._slowdown = 1.0
        self._slowed_by = ClockReason(0)
        self._doubt_since_s: float | None = None  # XID 48 came, and 94 did not
        self._num_xids: dict[int, int] = {}

    # ------------------------------------------------------------------ events

    def read(self, reading: Reading, now_s: float) -> None:
        """A poll succeeded."""
        is_first = self._last is None
        self._last, self._answered_s = reading, now_s
        self._look_at_clocks(reading, now_s)
        self._look_at_memory(reading)
        if reading.recovery in _CORDONED_BY:
            word = reading.recovery.name.lower().replace("_", " ")
            self._decide(Action.CORDON, f"the driver asks for: {word}", _CORDONED_BY[reading.recovery])
        elif reading.recovery in _DRAINED_BY and not is_first:
            self._decide(Action.DRAIN, f"the driver asks for: {reading.recovery.name.lower().replace('_', ' ')}", True)

    def failed(self, kind: Failure, message: str) -> None:
        """A poll failed. Failures of NVML itself count as silence."""
        if kind is Failure.LOST:
            self._decide(Action.CORDON, f"the GPU is lost: {message}", False)
        elif kind is Failure.RESET_REQUIRED:
            self._decide(Action.CORDON, f"the GPU needs a reset: {message}", False)

    def xid(self, code: int, now_s: float) -> None:
        """The driver reported an XID of this device."""
        rule, action = rule_of(code), rule_of(code).action
        self._num_xids[code] = self._num_xids.get(code, 0) + 1
        if code == UNCORRECTABLE:
            action = Action.RESTART
            if CONTAINED not in self._num_xids:
                self._doubt_since_s = now_s
        elif code == CONTAINED:
            self._doubt_since_s = None
        self._decide(action, f"XID {code}: {rule.meaning}", rule.lets_work_end)

    # ------------------------------------------------------------------ answers

    def verdict(self, now_s: float) -> Verdict:
        """The verdict now."""
        notes = tuple(self._notes)
        if self._doubt_since_s is not None and now_s - self._doubt_since_s >= self._limits.settled_after_s:
            self._doubt_since_s = None
            self._decide(Action.CORDON, f"XID {UNCORRECTABLE} came without {CONTAINED}", False)
            notes = tuple(self._notes)
        if self._action >= Action.DRAIN:
            is_settled = self._doubt_since_s is None or self._action is Action.CORDON
            return Verdict(self._action, notes[-MAX_REASONS:], self._lets_work_end, is_settled=is_settled)
        silence_s = now_s - self._answered_s
        if silence_s > self._limits.silent_after_s:
            # How long is not told: a text that changes all the time would be news all the time.
            why = f"NVML has not answered for more than {self._limits.silent_after_s:g} s"
            return Verdict(Action.THROTTLED, (*notes, why)[-MAX_REASONS:], slowdown=self._limits.default_slowdown)
        if self._is_throttled:
            why = f"clocks are slowed by {_words(self._slowed_by)}"
            return Verdict(Action.THROTTLED, (*notes, why)[-MAX_REASONS:], slowdown=self._slowdown)
        return Verdict(Action.NOTHING, notes[-MAX_REASONS:])

    @property
    def last(self) -> Reading | None:
        """The last reading; None before the first one."""
        return self._last

    @property
    def num_xids(self) -> dict[int, int]:
        """Number of XIDs by code."""
        return dict(self._num_xids)

    # ------------------------------------------------------------------ inside

    def _look_at_clocks(self, reading: Reading, now_s: float) -> None:
        limits = self._limits
        if reading.is_throttled:
            self._throttled_seen_s = now_s
            self._slowed_by = (reading.clock_reasons or ClockReason(0)) & THROTTLED_BY
            if self._throttled_since_s is None:
                self._throttled_since_s = now_s
            if now_s - self._throttled_since_s >= limits.throttled_after_s:
                self._is_throttled, self._slowdown = True, self._slowdown_of(reading)
        else:
            self._throttled_since_s = None
            seen_s = self._throttled_seen_s
            if seen_s is None or now_s - seen_s >= limits.cool_after_s:
                self._is_throttled = False

    def _slowdown_of(self, reading: Reading) -> float:
        limits = self._limits
        if not reading.sm_clock_mhz or not reading.max_sm_clock_mhz:
            return limits.default_slowdown
        slowdown = reading.max_sm_clock_mhz / reading.sm_clock_mhz
        # In steps of a tenth, because clocks move a little all the time.
        return round(min(limits.most_slowdown, max(limits.least_slowdown, slowdown)), 1)

    def _look_at_memory(self, reading: Reading) -> None:
        if reading.has_remap_failed:
            self._decide(Action.CORDON, "a memory row could not be remapped", True)
        if reading.is_remap_pending:
            self._note("memory rows wait for a reset to be remapped")
        if reading.are_pages_pending:
            self._note("memory pages wait for a reload of the driver to be retired")
        errors = reading.uncorrected_errors
        if errors is None:
            return
        if self._first_uncorrected is None:
            self._first_uncorrected = errors
        elif errors > self._first_uncorrected:
            # The XID that belongs to it may be milder or harder; it comes by another way, before or after.
            self._decide(Action.RESTART, f"{errors - self._first_uncorrected} uncorrected ECC errors", False)
            self._first_uncorrected = errors

    def _decide(self, action: Action, reason: str, lets_work_end: bool) -> None:
        self._note(reason)
        if action > self._action:
            self._action, self._lets_work_end = action, lets_work_end
        elif action is self._action:
            self._lets_work_end = self._lets_work_end and lets_work_end

    def _note(self, reason: str) -> None:
        self._notes[reason] = None
        while len(self._notes) > 4 * MAX_REASONS:
            del self._notes[next(iter(self._notes))]


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """The verdict on a worker with several devices: the hardest action, the longest slowdown, all reasons."""
    found = list(verdicts)
    if not found:
        return Verdict()
    action = max(verdict.action for verdict in found)
    hardest = [verdict for verdict in found if verdict.action is action]
    return Verdict(
        action,
        tuple(reason for verdict in found for reason in verdict.reasons)[-MAX_REASONS:],
        all(verdict.lets_work_end for verdict in hardest),
        max(verdict.slowdown for verdict in found),
        all(verdict.is_settled for verdict in hardest),
    )


def _words(reasons: ClockReason) -> str:
    return ", ".join((reason.name or "").lower().replace("_", " ") for reason in ClockReason if reason & reasons)
