"""Bugs that were put in on purpose, and within how many seeds each must be found. What the simulator is measured with.

Each is one small change of production code, as somebody could make it by accident; some were real. The bound is at
least eight times the number of seeds that finding it took, counted from the first seed of campaign 0.
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
