"""How fast KV comes from peers, learned from hand-overs as they end. Pure: is told instants, has no clock."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

_WEIGHT = 0.2  # of the newest hand-over
_MIN_SAMPLE_BYTES = 64 << 10  # below this size latency dominates; the sample is ignored


class Arrival(NamedTuple):
    """One frame that held its digests."""

    at_s: float
    num_bytes: int


class HandoverSpeed:
    """Bytes per second of what had to travel after the prompt was computed; 0.0 until a hand-over told.

    Frames that came while the peer still computed say how fast it computes, so only the others count.
    """

    def __init__(self) -> None:
        self.bytes_per_s = 0.0

    def observe(self, arrivals: Iterable[Arrival], prefilled_s: float) -> None:
        """One hand-over is complete, whose prompt was computed at `prefilled_s` of our clock."""
        late = [arrival for arrival in arrivals if arrival.at_s > prefilled_s]
        num_bytes = sum(arrival.num_bytes for arrival in late)
        if num_bytes < _MIN_SAMPLE_BYTES:
            return
        rate = num_bytes / (late[-1].at_s - prefilled_s)
        self.bytes_per_s = (1 - _WEIGHT) * self.bytes_per_s + _WEIGHT * rate if self.bytes_per_s else rate
