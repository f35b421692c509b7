"""Content of an engine's beat: counts by state, blocks, counters, histograms. Pure; changes no state."""

from __future__ import annotations

from collections.abc import Mapping

from ..core.tally import Tally
from .link.messages import LoadNews, Source
from .scheduler import Scheduler
from .sequence import QUEUE_STATES, SequenceState

_S = SequenceState
_FOR_PEER = (_S.OFFERED, _S.PARKED, _S.PROMISED, _S.BOUND)  # they wait for the other worker of the hand-over
_FOR_ROOM = (_S.WAITING, _S.QUEUED, _S.READY, _S.SWAPPED)


def load_news(scheduler: Scheduler, counters: Mapping[str, int], num_steps: int, step_tokens: Tally) -> LoadNews:
    """Beat of an idle engine; the engine loop, which has the clock, sets phase and coefficients."""
    holdings = scheduler.holdings
    pool = holdings.pool
    running = scheduler.within(_S.PREFILLING, _S.DECODING)
    to_prefill = [s for s in scheduler.within(*QUEUE_STATES, _S.PREFILLING) if s.source is not Source.PEER]
    return LoadNews(
        phase="idle",
        steps=num_steps,
        waiting=scheduler.count(*QUEUE_STATES),
        running=len(running),
        queued_prefill_tokens=sum(s.num_expected for s in to_prefill),
        queued_prefill_pairs=sum(s.expected_pairs for s in to_prefill),
        running_context_tokens=sum(s.num_computed for s in running),
        free_blocks=pool.num_free,
        cached_blocks=pool.num_cached,
        promised_blocks=scheduler.num_promised,
        total_blocks=pool.num_blocks,
        prefill_ms_per_token=0.0,
        prefill_ms_per_token_pair=0.0,
        decode_step_ms=0.0,
        counters=tuple(sorted({**counters, **_preemptions(scheduler), **_others(scheduler)}.items())),
        waiting_for_peer=scheduler.count(*_FOR_PEER),
        waiting_for_room=scheduler.count(*_FOR_ROOM),
        spreads=(("iteration_tokens", step_tokens.spread), *holdings.residency.spreads),
    )


def _preemptions(scheduler: Scheduler) -> dict[str, int]:
    """Counts of preemptions by kind, and of the use of host blocks."""
    total, swaps, space = scheduler.num_preemptions, scheduler.num_swaps, scheduler.holdings.swap
    counters = {"preemptions": total, "preemptions_recompute": total - swaps, "preemptions_swap": swaps}
    if space is not None:
        counters |= {
            "swap_blocks": space.pool.num_blocks,
            "swap_blocks_in_use": space.pool.num_live,
            "swaps_refused": space.refused_total,
            "swap_gaps": space.gaps_total,
        }
    return counters


def _others(scheduler: Scheduler) -> dict[str, int]:
    """Counts of a draft model's blocks and of recurrent states, where there are some."""
    states, drafts = scheduler.holdings.states, scheduler.holdings.drafts
    if drafts is not None:
        return {"draft_blocks": drafts.pool.num_blocks, "draft_blocks_in_use": drafts.pool.num_live}
    if states is None:
        return {}
    pool = states.pool
    return {
        "states": pool.num_states,
        "states_in_use": pool.num_states - pool.num_free,
        "state_snapshots": pool.num_snapshots,
        "state_snapshot_hits": pool.hits_total,
    }
