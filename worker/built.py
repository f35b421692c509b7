"""The engine of one rank, of loaded parts; built once more for another codec of its cache. Reads no weights."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ..checkpoint.adapters.adapter import AdapterLimits, read_adapter
from ..checkpoint.spec import ModelSpec
from ..core.clock import Clock
from ..engine.adapters import AdapterFiles
from ..engine.facts import FaceFacts, ModelFacts
from ..engine.link.thread_link import ThreadLink
from ..engine.loop import Engine
from ..kv.keys import digest_key
from ..kv.sizing import PoolSize
from ..kv.store.host_store import HostStore
from ..model.adapters.loading import AdapterLoader
from ..model.heads.resolved import Drafts, with_codec
from ..model.loader import RunnerOptions, numerics_class, runner_over_new_store
from ..model.resolved import ResolvedModel
from ..model.runner import Runner
from ..text.grammar import GrammarCompiler
from ..text.tokenizer import Tokenizer
from .adapters import ReadAdapter
from .assembly import engine_core, face_facts
from .automatic import SizedWorker
from .codec.guard import Fallback, codec_guard, fallback_of
from .ranks import Ranks
from .settings import WorkerSettings
from .speculation import Guessing, LoadedDrafter, load_guessing


@dataclass(frozen=True, slots=True)
class Loaded:
    """What was read from files for an engine of one rank, with what was decided for it."""

    model: ResolvedModel
    draft: Drafts | None
    runner: Runner
    drafter: LoadedDrafter | None  # of `draft`, over `runner`
    tokenizer: Tokenizer
    present: frozenset[str]  # names of the tensors of the model's checkpoint
    fingerprint: bytes  # of the weights
    sized: SizedWorker


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """A loaded engine that has not started yet, and the facts that the face needs of it."""

    engine: Engine
    link: ThreadLink
    facts: FaceFacts
    tokenizer: Tokenizer
    pool_size: PoolSize
    read_adapter: ReadAdapter  # of this worker's model
    loaded: Loaded | None = None  # what another engine can be built of, after this one's end; None: of several ranks
    fallback: Fallback | None = None  # when the guard finds the cache's codec too coarse; None: nothing
    ranks: Ranks | None = None  # the other ranks' processes, which `close` ends

    def close(self) -> None:
        """End the other ranks. Call it after the engine's end."""
        if self.ranks is not None:
            self.ranks.close(is_idle=self.engine.join(0))


def rebuild_engine(
    settings: WorkerSettings, clock: Clock, loaded: Loaded, fallback: Fallback, before: str
) -> BuiltEngine:
    """Build another engine of loaded weights, with the cache of `fallback`. The last one has ended; its pool is freed.

    `before`: the codec that it replaces because that was too coarse; empty: it replaces none, and is not watched again.
    Takes the time of a warm-up: call it in a thread.
    """
    model = replace(loaded.model, codec=fallback.codec)
    cache = loaded.sized.cache.model_copy(update={"tokens": fallback.pool.num_tokens, "guard_bound": None})
    sized = loaded.sized._replace(cache=cache, pool=fallback.pool)
    loaded.runner.release()
    if loaded.drafter is not None:
        loaded.drafter.release()
    options = runner_options(settings, sized)
    runner = runner_over_new_store(loaded.runner, model, options)
    decided = settings.model_copy(update={"step": sized.step, "cache": sized.cache})
    draft = None if loaded.draft is None else with_codec(loaded.draft, fallback.codec)
    guessing = load_guessing(decided, model, draft, runner, options, loaded=loaded.drafter)
    drafter = None if guessing is None else guessing.drafter
    facts = replace(model_facts(settings, model, loaded.fingerprint), fell_back_from=before)
    again = replace(loaded, model=model, draft=draft, runner=runner, drafter=drafter, sized=sized)
    return assembled(settings, clock, again, facts, guessing)


def assembled(
    settings: WorkerSettings, clock: Clock, loaded: Loaded, model: ModelFacts, guessing: Guessing | None
) -> BuiltEngine:
    """The engine of one rank."""
    sized, runner = loaded.sized, loaded.runner
    runner.serve_grammars(GrammarCompiler(loaded.tokenizer, model.vocab_size, model.eos_ids).start)
    link = ThreadLink()
    fallback = fallback_of(loaded.model, loaded.draft, sized)
    engine = Engine(
        engine_core(settings, sized, model, None if guessing is None else guessing.speculation),
        runner,
        runner.store,
        link,
        clock,
        host=host_store(runner, sized.pool),
        adapters=AdapterLoader(runner, loaded.present, _adapter_limits(settings)),
        drafter=None if guessing is None else guessing.drafter,
        guard=codec_guard(sized.cache, loaded.model, runner, clock, fallback),
    )
    facts, read = face_facts(settings, sized, model), adapter_reader(settings, loaded.model, loaded.present)
    return BuiltEngine(engine, link, facts, loaded.tokenizer, sized.pool, read, loaded, fallback)


def runner_options(settings: WorkerSettings, sized: SizedWorker) -> RunnerOptions:
    """Sizes and threads of a worker's runner."""
    return RunnerOptions(
        num_blocks=sized.pool.num_blocks,
        block_tokens=sized.cache.block_size,
        num_threads=settings.num_threads,
        digest_key=digest_key(settings.cluster_key),
        gpu=settings.gpu,
        graph_seqs=sized.step.max_num_seqs,
        num_states=sized.num_states,
    )


def host_store(runner: Runner, pool: PoolSize) -> HostStore | None:
    """Swap space beside a runner's store; None: there is none."""
    if not pool.num_swap_blocks:
        return None
    return HostStore(runner.store, runner.store.on_host(pool.num_swap_blocks))


def _adapter_limits(settings: WorkerSettings) -> AdapterLimits:
    return AdapterLimits(settings.model.max_lora_rank, settings.model.max_lora_bytes)


def adapter_reader(settings: WorkerSettings, model: ResolvedModel, present: Container[str]) -> ReadAdapter:
    """Reads adapters of this model. `present`: names of the tensors of its checkpoint."""
    return partial(_adapter_files, spec=model.spec, present=present, limits=_adapter_limits(settings))


def _adapter_files(directory: Path, spec: ModelSpec, present: Container[str], limits: AdapterLimits) -> AdapterFiles:
    """Read an adapter, all of it, for its digest and its size in memory. Raises CheckpointError as `read_adapter`."""
    adapter = read_adapter(directory, spec, present, limits)
    return AdapterFiles(adapter.digest, adapter.directory, adapter.rank, 4 * adapter.num_parameters)


def model_facts(settings: WorkerSettings, model: ResolvedModel, fingerprint: bytes) -> ModelFacts:
    """Facts about a worker's model, whose weights have this fingerprint."""
    numerics = numerics_class(model, settings.gpu, settings.num_ranks, fingerprint)
    return ModelFacts(
        name=settings.model_name,
        directory=str(model.directory),
        vocab_size=model.spec.vocab_size,
        max_model_len=model.max_model_len,
        eos_ids=frozenset(model.spec.eos_ids),
        weights_fingerprint=fingerprint,
        numerics_class=numerics.digest,
        numerics_description=numerics.description,
        deterministic=settings.model.deterministic,
        kv_spec=model.kv_spec,
        has_states=model.spec.delta is not None,
        cache_codec=model.codec,
    )
