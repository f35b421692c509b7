"""Builds the engine of a worker from its settings, and the facts that its face needs. Knows no socket."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ..checkpoint.config_json import load_spec
from ..checkpoint.sizes import cache_codec, context_length, held_bytes
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
from ..kv.keys import PromptHasher, digest_key, identity_key
from ..kv.sizing import MemoryFacts, PoolSize
from ..kv.store.host_store import HostStore
from ..model.loader import RunnerOptions, load_runner, numerics_class
from ..model.ops.device import chosen_kernels, resolve_device
from ..model.weights.tensors import weights_fingerprint
from ..prefill_worker.policy import prefill_policy
from ..text.incremental import check_decoder
from ..text.tokenizer import Tokenizer
from .automatic import decided_context, decided_pool, decided_step
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
    directory = Path(settings.model_directory)
    settings, pool_size = _decided(settings, directory)
    tokenizer = Tokenizer.load(directory)
    check_decoder(tokenizer)
    model = _model_facts(settings, directory, tokenizer.eos_ids)
    key = identity_key(settings.cluster_key)
    cache, step = settings.cache, settings.step
    options = replace(
        _runner_options(settings, model.max_model_len),
        num_blocks=pool_size.num_blocks,
        end_ids=tuple(sorted(model.eos_ids)),
    )
    runner = load_runner(directory, options)
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
    )
    host = None
    if pool_size.num_swap_blocks:
        host = HostStore(runner.store, runner.store.on_host(pool_size.num_swap_blocks))
    engine = Engine(core, runner, runner.store, link, clock, host=host)
    return BuiltEngine(engine, link, facts, tokenizer, pool_size)


def _model_facts(settings: WorkerSettings, directory: Path, end_ids: Sequence[int]) -> ModelFacts:
    """Facts of the model. `end_ids`: the tokenizer's end tokens; many chat models name their end of turn only there."""
    spec = load_spec(directory)
    for remark in spec.remarks:
        _log.warning("%s: %s", settings.model_name, remark)
    max_model_len = context_length(spec, settings.model.max_model_len)
    numerics = numerics_class(directory, _runner_options(settings, max_model_len))
    return ModelFacts(
        name=settings.model_name,
        directory=str(directory),
        vocab_size=spec.vocab_size,
        max_model_len=max_model_len,
        eos_ids=frozenset((*spec.eos_ids, *(id_ for id_ in end_ids if id_ < spec.vocab_size))),
        weights_fingerprint=weights_fingerprint(directory),
        numerics_class=numerics.digest,
        numerics_description=numerics.description,
        deterministic=settings.model.deterministic,
        kv_spec=spec.kv_spec(cache_codec(settings.cache.dtype)),
    )


def _runner_options(settings: WorkerSettings, max_model_len: int) -> RunnerOptions:
    """Runner options with num_blocks=0; used to load the runner and to compute its numerics class."""
    return RunnerOptions(
        num_blocks=0,
        block_tokens=settings.cache.block_size,
        dtype=settings.model.dtype,
        kv_dtype=settings.cache.dtype,
        num_threads=settings.num_threads,
        max_model_len=max_model_len,
        digest_key=digest_key(settings.cluster_key),
        quantization=settings.model.quantization,
        kernels=settings.model.kernels,
        device=settings.model.device,
        gpu=settings.gpu,
        graph_seqs=settings.step.max_num_seqs,
    )


def _decided(settings: WorkerSettings, directory: Path) -> tuple[WorkerSettings, PoolSize]:
    """The settings with all values decided, and the pool's size. In a cluster the plan has decided them before."""
    spec = load_spec(directory)
    cache, device = settings.cache, resolve_device(settings.model.device, settings.gpu)
    kind: Literal["cpu", "cuda"] = "cpu" if device.type == "cpu" else "cuda"
    kernels = chosen_kernels(settings.model.kernels, kind, built_library)
    weights = held_bytes(directory, spec, settings.model, kernels)
    machine = machine_facts()
    available = machine.memory_bytes if kind == "cpu" else machine.gpu_bytes[settings.gpu]
    step, _ = decided_step(settings.step, kind, available)
    facts = MemoryFacts(settings.memory_bytes or available, weights, cache.swap_bytes, swaps_elsewhere=kind == "cuda")
    context, wanted = context_length(spec, settings.model.max_model_len), settings.model.max_model_len
    kv_spec = spec.kv_spec(cache_codec(cache.dtype))
    size, cache, _ = decided_pool(kv_spec, cache, kind, facts, step.max_num_seqs * context)
    context, decision = decided_context(context, wanted, size)
    if wanted is None:
        _log.info("%s is %s: %s", decision.setting, decision.value, decision.reason)
    model = settings.model.model_copy(update={"max_model_len": context})
    return settings.model_copy(update={"step": step, "cache": cache, "model": model}), size
