"""Planted bugs, and the number of seeds within which the simulator must find each: the measure of the simulator.

Each is one small change of production code that could be made by accident; some were real. The bound is at least eight
times the number of seeds that finding it took, counted from the first seed of campaign 0.
"""

from __future__ import annotations

from ..sim import planted_engine, planted_handover, planted_router, planted_worker
from .planting import Planted

__all__ = ["PLANTED", "Planted"]

PLANTED = (
    *planted_handover.BUGS,
    *planted_engine.BUGS,
    *planted_worker.BUGS,
    *planted_router.BUGS,
)
