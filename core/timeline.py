"""The named instants of a request's life. Every latency, metric and plot is a difference of two of them.

router:   arrived → admitted → routed → … → first_sent → finished
decode:   received → promised → bound → first_frame → first_token → last_frame → second_token → decoded
prefill:  offered (queued) → started → prefilled
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum


class Instant(StrEnum):
    """What happened; the value is its name on the wire and in `explain`."""

    ARRIVED = "arrived"  # router: the request's body is complete
    ADMITTED = "admitted"  # router: validated, tokenised, within the bounds
    ROUTED = "routed"  # router: workers chosen, order sent
    RECEIVED = "received"  # decode: order taken off the session
    PROMISED = "promised"  # decode: room is promised, the hand-over may open
    OFFERED = "offered"  # prefill: the request is in the queue
    STARTED = "started"  # prefill: next to run, asks decode to bind
    BOUND = "bound"  # decode: physical blocks are bound
    PREFILL_BEGAN = "prefill_began"  # the first chunk enters a step
    PREFILLED = "prefilled"  # the last chunk left a step
    FIRST_FRAME = "first_frame"  # decode: the first KV frame held its digests
    FIRST_TOKEN = "first_token"
    LAST_FRAME = "last_frame"  # decode: the prompt's KV is complete
    SECOND_TOKEN = "second_token"
    FIRST_SENT = "first_sent"  # router: first piece handed to the client
    FINISHED = "finished"


class Timeline:
    """Instants of one request in one process, in seconds of that process's monotonic clock.

    Only durations leave a process: `since` gives them relative to an instant of the same process.
    """

    __slots__ = ("_at_s",)

    def __init__(self) -> None:
        self._at_s: dict[Instant, float] = {}

    def mark(self, instant: Instant, now_s: float) -> None:
        """Note that `instant` happened. Its first time counts; later ones are ignored."""
        self._at_s.setdefault(instant, now_s)

    def at_s(self, instant: Instant) -> float | None:
        """When it happened, or None."""
        return self._at_s.get(instant)

    def between_s(self, start: Instant, end: Instant) -> float | None:
        """Seconds from `start` to `end`, or None when either has not happened."""
        if start not in self._at_s or end not in self._at_s:
            return None
        return self._at_s[end] - self._at_s[start]

    def since_ns(self, origin_s: float) -> dict[str, int]:
        """Every instant as nanoseconds since `origin_s`, never negative: the form that crosses the wire."""
        return {name.value: max(0, round((at - origin_s) * 1e9)) for name, at in self._at_s.items()}

    def adopt(self, since_ns: Mapping[str, int] | Iterable[tuple[str, int]], origin_s: float) -> None:
        """Take over a peer's instants, placed after our own `origin_s`. Unknown names (newer peers) are left out."""
        known = {instant.value: instant for instant in Instant}
        for name, ns in dict(since_ns).items():
            if name in known:
                self.mark(known[name], origin_s + ns * 1e-9)
