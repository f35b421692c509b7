"""Builds the engine of a worker from its settings, and the facts that its face needs. Knows no socket."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from ..core.clock import Clock
from ..core.errors import ConfigError, RankLost
from ..engine.link.thread_link import ThreadLink
from ..engine.loop import Engine
from ..engine.rank_store import SlicedStore
from ..kernels.cpu.build import NativeUnavailable, built_library
from ..kv.slices import RankSlices
from ..model.loader import RunnerOptions, load_runner
from ..model.ops.device import refuse_gpu_ranks, resolve_device
from ..model.resolved import DeviceKind, Guesses, ResolvedModel, needs_of_ranks, refuse_adapters, resolve
from ..model.runner import Runner
from ..model.weights.tensors import open_source, weights_fingerprint
from ..text.grammar import GrammarCompiler
from ..text.incremental import check_decoder
from ..text.same_tokens import check_draft
from ..text.tokenizer import Tokenizer
from .assembly import engine_core, face_facts
from .automatic import SizedWorker, size_worker
from .built import BuiltEngine, Loaded, adapter_reader, assembled, host_store, model_facts, runner_options
from .codec.guard import refuse_guard
from .machine import cores, cores_of_rank, machine_facts, pin_thread
from .rank_order import RankOrder
from .rank_work import Leader
from .ranks import Ranks
from .settings import WorkerSettings
from .speculation import load_guessing, refuse_ranks, resolved_draft
from .state_memory import refuse_beside_states, refuse_role

LOAD_S = 600.0  # longest time for all ranks to load a large model
LEAST_SLOT_BYTES, MOST_SLOT_BYTES = 1 << 18, 16 << 20  # of one rank in a sum; larger sums take several turns
_log = logging.getLogger(__name__)


class _LateEngine:
    """Passes the loss of a rank on to an engine that is built while the ranks load."""

    def __init__(self) -> None:
        self.engine: Engine | None = None

    def fail(self, reason: str) -> None:
        """End the engine, if there is one; while the ranks load, `Ranks.wait_ready` reports the loss."""
        if self.engine is not None:
            self.engine.fail(RankLost(reason))


def build_engine(settings: WorkerSettings, clock: Clock) -> BuiltEngine:
    """Load weights and tokenizer, size the pool, build the engine. Takes seconds: call it in a thread.

    Raises:
        CheckpointError: the directory holds no model that we serve.
        DoesNotFit: nothing is left for the KV pool, or the longest context does not fit it; with the arithmetic.
        ConfigError: a setting cannot work on this machine.
    """
    device = resolve_device(settings.model.device, settings.gpu)
    kind: DeviceKind = "cpu" if device.type == "cpu" else "cuda"
    refuse_settings(settings, kind)
    directory = Path(settings.model_directory)
    resolved = resolve(directory, settings.model, settings.cache.codec, kind, built_library)
    refuse_beside_states(resolved.spec, settings.model, settings.cache, settings.speculation)
    if resolved.spec.delta is not None:
        refuse_role(settings.model_name, settings.role)
    draft = resolved_draft(settings, resolved)
    sized = _sized(settings, resolved, draft)
    pool_size = sized.pool
    tokenizer = Tokenizer.load(directory)
    check_decoder(tokenizer)
    if isinstance(draft, ResolvedModel):  # heads have no tokenizer
        check_draft(draft.directory, tokenizer)
    # many chat models name their end of turn in the tokenizer only
    resolved = replace(resolved.ends_with(tokenizer.eos_ids), max_model_len=sized.max_model_len)
    for remark in resolved.spec.remarks:
        _log.warning("%s: %s", settings.model_name, remark)
    fingerprint = weights_fingerprint(directory)
    model = model_facts(settings, resolved, fingerprint)
    options = runner_options(settings, sized)
    late = _LateEngine()
    ranks = _started_ranks(settings, resolved, sized, late.fail) if settings.num_ranks > 1 else None
    try:
        runner = load_runner(resolved, options) if ranks is None else _load_pinned(resolved, options, settings, ranks)
    except BaseException:
        if ranks is not None:
            ranks.close()
        raise
    decided = settings.model_copy(update={"step": sized.step, "cache": sized.cache})
    guessing = load_guessing(decided, resolved, draft, runner, options)
    present = frozenset(open_source(directory).shapes())
    if ranks is None:
        drafter = None if guessing is None else guessing.drafter
        loaded = Loaded(resolved, draft, runner, drafter, tokenizer, present, fingerprint, sized)
        return assembled(settings, clock, loaded, model, guessing)
    runner.serve_grammars(GrammarCompiler(tokenizer, model.vocab_size, model.eos_ids).start)
    core = engine_core(settings, sized, model, None if guessing is None else guessing.speculation)
    link = ThreadLink()
    facts, read = face_facts(settings, sized, model), adapter_reader(settings, resolved, present)
    host = host_store(runner, pool_size)
    refuse_guard(sized.cache, "several tensor-parallel ranks")
    sender, group = ranks.sender, ranks.group
    slices = RankSlices(model.kv_spec, group.size)
    leader = Leader(runner, sender, group, _cores(settings, 0))
    engine = late.engine = Engine(
        core, leader, runner.store, link, clock, host=host,
        over_ranks=lambda mine: SlicedStore(mine, sender, group, slices),
    )  # fmt: skip
    return BuiltEngine(engine, link, facts, tokenizer, pool_size, read, ranks=ranks)


def refuse_settings(settings: WorkerSettings, kind: DeviceKind) -> None:
    """Refuse what no worker on this kind of device serves, whatever its model.

    Raises:
        ConfigError: several ranks on a GPU, or beside what is served on one rank.
    """
    refuse_gpu_ranks(settings.num_ranks, kind)
    refuse_adapters(settings.model, settings.num_ranks)
    refuse_ranks(settings)


def _started_ranks(
    settings: WorkerSettings, model: ResolvedModel, sized: SizedWorker, on_lost: Callable[[str], None]
) -> Ranks:
    """Start the processes of the other ranks, which load their parts while this process loads its own.

    Raises:
        ConfigError: this machine has no native kernels.
    """
    try:
        built_library()
    except NativeUnavailable as error:
        raise ConfigError(f"tensor-parallel ranks exchange sums by the native kernels, but {error}") from None
    decided = {"max_model_len": model.max_model_len, "kernels": model.kernels, "device": model.device}
    same = settings.model_copy(
        update={"step": sized.step, "cache": sized.cache, "model": settings.model.model_copy(update=decided)}
    )
    width = 4 * model.spec.hidden_size
    orders = [
        RankOrder(
            settings=same,
            rank=rank,
            size=settings.num_ranks,
            num_blocks=sized.pool.num_blocks,
            num_swap_blocks=sized.pool.num_swap_blocks,
            slot_bytes=min(max(LEAST_SLOT_BYTES, sized.step.max_num_batched_tokens * width), MOST_SLOT_BYTES),
            cores=_cores(settings, rank),
        )
        for rank in range(settings.num_ranks)
    ]
    return Ranks.start(orders, on_lost)


def _load_pinned(model: ResolvedModel, options: RunnerOptions, settings: WorkerSettings, ranks: Ranks) -> Runner:
    """Load rank 0's part in a thread on its cores, so that the kernels' threads stay there; wait for the others."""
    with ThreadPoolExecutor(1, "load", initializer=pin_thread, initargs=(_cores(settings, 0),)) as loading:
        own = loading.submit(load_runner, model, options, ranks.group)
        ranks.wait_ready(LOAD_S)
        return own.result()


def _cores(settings: WorkerSettings, rank: int) -> tuple[int, ...]:
    return cores_of_rank(cores(), settings.first_core, rank, settings.num_threads)


def _sized(settings: WorkerSettings, model: ResolvedModel, draft: Guesses | None = None) -> SizedWorker:
    """What fits this device. In a cluster the plan has decided most of it before, and sends that as settings."""
    machine = machine_facts()
    available = machine.memory_bytes if model.device == "cpu" else machine.gpu_bytes[settings.gpu]
    wanted = settings.model.max_model_len
    sized = size_worker(
        needs_of_ranks(model, settings.model, settings.num_ranks, draft),
        settings.step,
        settings.cache,
        model.device,
        memory_bytes=_share(settings.memory_bytes, available, model.device),
        device_bytes=available,
        wanted=wanted,
    )
    if wanted is None:
        context = sized.decisions[-1]
        _log.info("%s is %s: %s", context.setting, context.value, context.reason)
    return sized


def _share(planned: int | None, available: int, device: DeviceKind) -> int:
    """Memory to share out: as planned. On a GPU no more than is free now: others may use it since the plan was made."""
    if planned is None:
        return available
    return min(planned, available) if device == "cuda" else planned
