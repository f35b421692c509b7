"""Named instants of a request. Every latency, metric and plot is a difference of two of them.

router:   arrived → admitted → routed → … → first_sent → finished
decode:   received → promised → bound → first_frame → first_token → last_frame → second_token → last_token
prefill:  offered (queued) → started → prefilled
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import NamedTuple


class Instant(StrEnum):
    """Event of a request's life; the value is its name on the wire and in `explain`."""

    ARRIVED = "arrived"  # router: the request's body is complete
    ADMITTED = "admitted"  # router: validated, tokenised, within the bounds
    ROUTED = "routed"  # router: workers chosen, order sent
    RECEIVED = "received"  # decode: order taken off the session
    PROMISED = "promised"  # decode: room is promised, the hand-over may open
    OFFERED = "offered"  # prefill: the request is in the queue
    STARTED = "started"  # prefill: next to run; it asks decode to bind
    BOUND = "bound"  # decode: physical blocks are bound
    PREFILL_BEGAN = "prefill_began"  # the first chunk enters a step
    PREFILLED = "prefilled"  # the last chunk left a step
    FIRST_FRAME = "first_frame"  # decode: the first KV frame matched its digests
    FIRST_TOKEN = "first_token"
    LAST_FRAME = "last_frame"  # decode: the prompt's KV is complete
    SECOND_TOKEN = "second_token"
    LAST_TOKEN = "last_token"  # decode: the last token that counts
    FIRST_SENT = "first_sent"  # router: first piece handed to the client
    FINISHED = "finished"


class Phases(NamedTuple):
    """Time of a request in each phase, in seconds. None: the phase did not end."""

    queue_s: float | None  # from its arrival in the queue until its first chunk entered a step
    prefill_s: float | None  # from the first chunk in a step to the first token
    decode_s: float | None  # from the first token to the last
    inference_s: float | None  # sum of prefill and decode


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
        """Time of an instant, or None if it has not happened."""
        return self._at_s.get(instant)

    def between_s(self, start: Instant, end: Instant) -> float | None:
        """Seconds from `start` to `end`, or None when either has not happened."""
        if start not in self._at_s or end not in self._at_s:
            return None
        return self._at_s[end] - self._at_s[start]

    def phases(self, queued_s: float) -> Phases:
        """The phases of a request that began to wait at `queued_s`."""
        began, first = self.at_s(Instant.PREFILL_BEGAN), self.at_s(Instant.FIRST_TOKEN)
        first = self.at_s(Instant.PREFILLED) if first is None else first  # a prefill worker samples it there
        last = self.at_s(Instant.LAST_TOKEN)
        last = first if last is None else last
        return Phases(
            _length_s(queued_s, began), _length_s(began, first), _length_s(first, last), _length_s(began, last)
        )

    def since_ns(self, origin_s: float) -> dict[str, int]:
        """Instants as nanoseconds since `origin_s`, never negative: the form on the wire."""
        return {name.value: max(0, round((at - origin_s) * 1e9)) for name, at in self._at_s.items()}

    def adopt(self, since_ns: Mapping[str, int] | Iterable[tuple[str, int]], origin_s: float) -> None:
        """Add a peer's instants, relative to our own `origin_s`. Unknown names (of newer peers) are ignored."""
        known = {instant.value: instant for instant in Instant}
        for name, ns in dict(since_ns).items():
            if name in known:
                self.mark(known[name], origin_s + ns * 1e-9)


def _length_s(start_s: float | None, end_s: float | None) -> float | None:
    return None if start_s is None or end_s is None else max(0.0, end_s - start_s)
