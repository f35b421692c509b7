"""Planted bugs, and the number of seeds within which the simulator must find each: the measure of the simulator.

Each is one small change of production code, as somebody could make it by accident; some were real. The command
`twostroke sim faults --list-bugs` prints them. Each was looked for in ten disjoint ranges of seeds. Its bound is at
least 16 times the mean, 8 times the median and twice the maximum of the schedules that this took, so that a change of
the random draws misses none. A bug that ordinary settings rarely show is looked for in biased settings (`planting.py`).
"""

from __future__ import annotations

from ..sim import (
    planted_blocks,
    planted_engine,
    planted_handover,
    planted_returns,
    planted_router,
    planted_wires,
    planted_worker,
)
from .planting import Planted

__all__ = ["PLANTED", "Planted"]

PLANTED = (
    *planted_handover.BUGS,
    *planted_engine.BUGS,
    *planted_worker.BUGS,
    *planted_blocks.BUGS,
    *planted_returns.BUGS,
    *planted_router.BUGS,
    *planted_wires.BUGS,
)
