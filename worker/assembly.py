"""The engine's deciding part and the facts about it, from a worker's settings. Knows no weights and no device."""

from __future__ import annotations

from ..core.request import Role
from ..decode_worker.policy import combined_policy, decode_policy
from ..engine.core import CoreLimits, EngineCore
from ..engine.facts import FaceFacts, ModelFacts
from ..engine.policy import StepLimits, scored_rows
from ..engine.speculation.speculation import Speculation
from ..kv.cache.pool import BlockPool
from ..kv.cache.prefix import PrefixCache
from ..kv.handover.plane_channel import TransportPolicy
from ..kv.keys import PromptHasher, digest_key, identity_key
from ..prefill_worker.policy import prefill_policy
from .automatic import SizedWorker
from .settings import WorkerSettings


def engine_core(
    settings: WorkerSettings, sized: SizedWorker, model: ModelFacts, speculation: Speculation | None
) -> EngineCore:
    """The deciding part of the engine, over an empty pool."""
    step, cache = sized.step, sized.cache
    limits = StepLimits(step.max_num_seqs, step.max_num_batched_tokens, step.max_waiting, target_ms=step.target_ms)
    roles = {
        Role.PREFILL: prefill_policy(limits),
        Role.DECODE: decode_policy(limits),
        Role.COMBINED: combined_policy(limits),
    }
    pool = BlockPool(sized.pool.num_blocks, cache.block_size)
    bounds = CoreLimits(
        model.max_model_len,
        sized.pool.num_swap_blocks,
        scored_rows(model.vocab_size),
        num_states=sized.num_states,
        num_seats=step.max_num_seqs,
    )
    return EngineCore(
        bounds,
        pool,
        PrefixCache(pool, enabled=cache.prefix_caching, windowed=model.kv_spec.main.windowed),
        roles[settings.role],
        eos_ids=model.eos_ids,
        key=identity_key(settings.cluster_key),
        roles=roles,
        speculation=speculation,
    )


def face_facts(settings: WorkerSettings, sized: SizedWorker, model: ModelFacts) -> FaceFacts:
    """What the face needs to know of the engine."""
    step, cache = sized.step, sized.cache
    return FaceFacts(
        worker_id=settings.worker_id,
        model=model,
        namer=PromptHasher.of(identity_key(settings.cluster_key), model),
        digest_key=digest_key(settings.cluster_key),
        num_blocks=sized.pool.num_blocks,
        block_tokens=cache.block_size,
        frame_bytes=cache.frame_bytes,
        frame_slots=cache.frame_slots,
        max_num_seqs=step.max_num_seqs,
        max_batch_tokens=step.max_num_batched_tokens,
        transport=TransportPolicy(cache.transport, cache.require_transport),
        num_ranks=settings.num_ranks,
    )
