"""Blocks that a prefill worker fetches from decode workers before it computes the rest of a prompt. Pure.

Decode workers hold what they generated, the earlier turns of a chat. A prefill worker has the prompts at most; where
moving these blocks is cheaper than computing them again, its order names who has them.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...core.request import Role
from ...kv.handover.pairing import why_refused
from .candidates import Source, WorkerView

RETURNS = "blocks.return.1"
"""Capability of a worker that fetches for its hand-overs, and tells its prefill workers whom to fetch from."""
MOST_RETURN_SOURCES = 2  # that one order names per prefill worker


def returns_to(prefill: WorkerView, decode: WorkerView, sources: Sequence[Source]) -> tuple[Source, ...]:
    """The decode workers that `prefill` can fetch from for a hand-over to `decode`, those with most blocks first.

    KV goes from one to the other as in a hand-over, so the same rules hold: no codec is rounded to another one.
    """
    if not (RETURNS in prefill.capabilities and RETURNS in decode.capabilities):
        return ()
    fitting = [
        source
        for source in sources
        if source.view.role is not Role.PREFILL
        and source.view.key != prefill.key
        and why_refused(source.view, prefill) is None
    ]
    return tuple(sorted(fitting, key=lambda s: (-s.blocks, s.view.in_flight, s.view.worker_id))[:MOST_RETURN_SOURCES])


def has_more(holder_blocks: int, prefill_blocks: Sequence[int]) -> bool:
    """True if a decode worker holds more leading blocks than one of the prefill workers, so that it may be a source."""
    return any(holder_blocks > blocks for blocks in prefill_blocks)
