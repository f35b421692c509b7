"""Builds the engine of a worker from its settings, and the facts that its face needs. Knows no socket."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from ..core.clock import Clock
from ..core.request import Role
from ..decode_worker.policy import combined_policy, decode_policy
from ..engine.core import CoreLimits, EngineCore
from ..engine.facts import FaceFacts, ModelFacts
from ..engine.link.thread_link import ThreadLink
from ..engine.loop import Engine
from ..engine.policy import StepLimits, scored_rows
from ..kernels.cpu.build import built_library
from ..kv.cache.pool import BlockPool
from ..kv.cache.prefix import PrefixCache
from ..kv.handover.plane_channel import TransportPolicy
from ..kv.keys import PromptHasher, digest_key, identity_key
from ..kv.sizing import PoolSize
from ..kv.store.host_store import HostStore
from ..model.loader import RunnerOptions, load_runner, numerics_class
from ..model.ops.device import resolve_device
from ..model.resolved import DeviceKind, ResolvedModel, resolve
from ..model.weights.tensors import weights_fingerprint
from ..prefill_worker.policy import prefill_policy
from ..text.incremental import check_decoder
from ..text.tokenizer import Tokenizer
from .automatic import SizedWorker, size_worker
from .machine import machine_facts
from .settings import WorkerSettings

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """A loaded engine that has not started yet, and the facts that the face needs of it."""

    engine: Engine
    link: ThreadLink
    facts: FaceFacts
    tokenizer: Tokenizer
    pool_size: PoolSize


def build_engine(settings: WorkerSettings, clock: Clock) -> BuiltEngine:
    """Load weights and tokenizer, size the pool, build the engine. Takes seconds: call it in a thread.

    Raises:
        CheckpointError: the directory holds no model that we serve.
        DoesNotFit: nothing is left for the KV pool, or the longest context does not fit it; with the arithmetic.
        ConfigError: a setting cannot work on this machine.
    """
    device = resolve_device(settings.model.device, settings.gpu)
    kind: DeviceKind = "cpu" if device.type == "cpu" else "cuda"
    directory = Path(settings.model_directory)
    resolved = resolve(directory, settings.model, settings.cache.dtype, kind, built_library)
    sized = _sized(settings, resolved)
    step, cache, pool_size = sized.step, sized.cache, sized.pool
    tokenizer = Tokenizer.load(directory)
    check_decoder(tokenizer)
    # many chat models name their end of turn in the tokenizer only
    resolved = replace(resolved.ends_with(tokenizer.eos_ids), max_model_len=sized.max_model_len)
    model = _model_facts(settings, resolved)
    key = identity_key(settings.cluster_key)
    options = RunnerOptions(
        num_blocks=pool_size.num_blocks,
        block_tokens=cache.block_size,
        num_threads=settings.num_threads,
        digest_key=digest_key(settings.cluster_key),
        gpu=settings.gpu,
        graph_seqs=step.max_num_seqs,
    )
    runner = load_runner(resolved, options)
    limits = StepLimits(step.max_num_seqs, step.max_num_batched_tokens, step.max_waiting, target_ms=step.target_ms)
    roles = {
        Role.PREFILL: prefill_policy(limits),
        Role.DECODE: decode_policy(limits),
        Role.COMBINED: combined_policy(limits),
    }
    pool = BlockPool(pool_size.num_blocks, cache.block_size)
    bounds = CoreLimits(model.max_model_len, pool_size.num_swap_blocks, scored_rows(model.vocab_size))
    prefix = PrefixCache(pool, enabled=cache.prefix_caching)
    core = EngineCore(bounds, pool, prefix, roles[settings.role], eos_ids=model.eos_ids, key=key, roles=roles)
    link = ThreadLink()
    facts = FaceFacts(
        worker_id=settings.worker_id,
        model=model,
        namer=PromptHasher.of(key, model),
        digest_key=options.digest_key,
        num_blocks=pool_size.num_blocks,
        block_tokens=cache.block_size,
        frame_bytes=cache.frame_bytes,
        frame_slots=cache.frame_slots,
        max_num_seqs=step.max_num_seqs,
        max_batch_tokens=step.max_num_batched_tokens,
        transport=TransportPolicy(cache.transport, cache.require_transport),
    )
    host = None
    if pool_size.num_swap_blocks:
        host = HostStore(runner.store, runner.store.on_host(pool_size.num_swap_blocks))
    engine = Engine(core, runner, runner.store, link, clock, host=host)
    return BuiltEngine(engine, link, facts, tokenizer, pool_size)


def _model_facts(settings: WorkerSettings, model: ResolvedModel) -> ModelFacts:
    for remark in model.spec.remarks:
        _log.warning("%s: %s", settings.model_name, remark)
    numerics = numerics_class(model, settings.gpu)
    return ModelFacts(
        name=settings.model_name,
        directory=str(model.directory),
        vocab_size=model.spec.vocab_size,
        max_model_len=model.max_model_len,
        eos_ids=frozenset(model.spec.eos_ids),
        weights_fingerprint=weights_fingerprint(model.directory),
        numerics_class=numerics.digest,
        numerics_description=numerics.description,
        deterministic=settings.model.deterministic,
        kv_spec=model.kv_spec,
    )


def _sized(settings: WorkerSettings, model: ResolvedModel) -> SizedWorker:
    """What fits this device. In a cluster the plan has decided most of it before, and sends that as settings."""
    machine = machine_facts()
    available = machine.memory_bytes if model.device == "cpu" else machine.gpu_bytes[settings.gpu]
    wanted = settings.model.max_model_len
    sized = size_worker(
        model,
        settings.step,
        settings.cache,
        model.device,
        memory_bytes=settings.memory_bytes or available,
        device_bytes=available,
        wanted=wanted,
    )
    if wanted is None:
        context = sized.decisions[-1]
        _log.info("%s is %s: %s", context.setting, context.value, context.reason)
    return sized
