"""Measured transfer rate of KV from peers, updated when hand-overs end. Pure: instants are passed in, no clock."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

_WEIGHT = 0.2  # of the newest hand-over
_MIN_SAMPLE_BYTES = 64 << 10  # below this size latency dominates; the sample is ignored


class Arrival(NamedTuple):
    """Arrival of one frame whose digests matched."""

    at_s: float
    num_bytes: int


def rate_of(arrivals: Iterable[Arrival], prefilled_s: float) -> float:
    """Bytes per second of the frames that came after the prompt was computed; 0.0 if these are too few to tell."""
    late = [arrival for arrival in arrivals if arrival.at_s > prefilled_s]
    num_bytes = sum(arrival.num_bytes for arrival in late)
    return num_bytes / (late[-1].at_s - prefilled_s) if num_bytes >= _MIN_SAMPLE_BYTES else 0.0


class HandoverSpeed:
    """Moving average of bytes per second after the prompt was computed; 0.0 before the first sample.

    Frames that arrive while the peer still computes are limited by its computation, so only later ones count.
    """

    def __init__(self) -> None:
        self.bytes_per_s = 0.0

    def observe(self, arrivals: Iterable[Arrival], prefilled_s: float) -> None:
        """Add a complete hand-over; the peer had computed its prompt at `prefilled_s` of our clock."""
        rate = rate_of(arrivals, prefilled_s)
        if not rate:
            return
        self.bytes_per_s = (1 - _WEIGHT) * self.bytes_per_s + _WEIGHT * rate if self.bytes_per_s else rate
