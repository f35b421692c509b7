"""Counters of hand-overs, added to those of their worker while they run. Pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields
from typing import Literal

from .machine import Counters

Side = Literal["decode", "prefill"]
"""The side of a hand-over that counts."""

FIELDS = tuple(field.name for field in fields(Counters))


def counter_name(side: Side, field: str) -> str:
    """The name of a field of `Counters` among a worker's counters."""
    return f"handover_{side}_{field}"


class CountersExport:
    """The counters of one hand-over as part of its worker's counters."""

    def __init__(self, counters: Counters, side: Side, totals: Counter[str]) -> None:
        self._counters = counters
        self._totals = totals
        self._names = {field: counter_name(side, field) for field in FIELDS}
        self._exported = dict.fromkeys(FIELDS, 0)

    def update(self) -> None:
        """Add to the worker's counters what was counted since the last call."""
        for field, exported in self._exported.items():
            count: int = getattr(self._counters, field)
            if count != exported:
                self._totals[self._names[field]] += count - exported
                self._exported[field] = count
