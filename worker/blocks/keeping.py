"""Whether a worker keeps a copy of another one's blocks now. Pure.

A copy is cached, not owned: it displaces only what was used longest ago, and only while much of the pool is free.
"""

from __future__ import annotations

from ...engine.link.messages import LoadNews

FREE_SHARE = 0.25  # of the pool that must stay free or evictable beside the copy and all promises
MAX_KEEPING = 4  # copies that are made at once


def why_not_kept(load: LoadNews | None, num_blocks: int, num_keeping: int) -> str:
    """The reason to keep no copy of `num_blocks` blocks, as text; empty: it is kept."""
    if load is None:
        return "its load is not known yet"
    if num_keeping >= MAX_KEEPING:
        return f"{num_keeping} copies are being made"
    left = load.free_blocks - load.promised_blocks - num_blocks
    if left < FREE_SHARE * load.total_blocks:
        return f"{num_blocks} blocks would leave {left} of {load.total_blocks} free"
    if load.waiting_for_room:
        return "sequences wait for room"
    return ""
