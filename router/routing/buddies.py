"""Which worker keeps a copy of a stream's KV. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...kv.handover.pairing import why_refused
from .candidates import RoutingDecision, WorkerView

KEEPS = "blocks.keep.1"
"""Capability of a worker that can keep copies."""


def buddy_of(choice: RoutingDecision, workers: Sequence[WorkerView], held: Mapping[str, int]) -> WorkerView | None:
    """The worker to copy the chosen decode worker's blocks to; None: there is none.

    The prefill worker of the prompt, which has most of them already. Else who holds most of the prompt, then who has
    most room for it.
    """
    decode = choice.winner.decode
    fitting = [w for w in workers if w.key != decode.key and KEEPS in w.capabilities and why_refused(decode, w) is None]
    if choice.winner.computes in fitting:
        return choice.winner.computes
    return max(fitting, key=lambda w: (held.get(w.worker_id, 0), w.free_kv_tokens, w.worker_id), default=None)
