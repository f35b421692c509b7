"""Speculation of a worker as configured: who guesses; a draft model or heads beside the model. Knows no socket."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..checkpoint.spec import ModelSpec
from ..core.errors import ConfigError
from ..core.request import Role
from ..engine.speculation.draft_model.catch_up import CatchUp
from ..engine.speculation.draft_model.holdings import DraftHoldings
from ..engine.speculation.draft_model.planner import DraftBounds, DraftPlanner
from ..engine.speculation.heads.layer_planner import LayerPlanner
from ..engine.speculation.heads.planner import HeadsPlanner
from ..engine.speculation.ngram import NgramLimits, NgramProposer
from ..engine.speculation.speculation import Speculation
from ..kernels.cpu.build import built_library
from ..kv.store.store import KvStore
from ..model.drafter import ModelDrafter
from ..model.heads.eagle3 import load_eagle3_head
from ..model.heads.layered import LayerDrafter, LayerHead
from ..model.heads.medusa import MedusaDrafter, load_medusa_weights
from ..model.heads.mtp import load_mtp_head
from ..model.heads.resolved import Drafts, ResolvedEagle3, ResolvedMedusa, ResolvedMtp, resolve_guesses
from ..model.loader import RunnerOptions, load_runner, runner_over_new_store
from ..model.resolved import ResolvedModel
from ..model.runner import Runner
from ..model.weights.tensors import open_source
from .settings import WorkerSettings

CATCH_UP_SHARE = 0.25  # of `step.target_ms`, for the draft model's chunks beside streams

LoadedDrafter = ModelDrafter | MedusaDrafter | LayerDrafter
"""What guesses with weights of its own; all are `Drafter` of engine/loop.py."""


@dataclass(frozen=True, slots=True)
class Guessing:
    """What guesses in an engine."""

    speculation: Speculation
    drafter: LoadedDrafter | None = None  # the draft model or the heads, if they guess


def refuse_ranks(settings: WorkerSettings) -> None:
    """Refuse speculation of several ranks, of which only the first one samples. A prefill worker does not guess.

    Raises:
        ConfigError: a worker that decodes has several ranks.
    """
    config = settings.speculation
    if config.method is not None and settings.num_ranks > 1 and settings.role is not Role.PREFILL:
        raise ConfigError(
            f"speculation.method is {config.method!r} and this worker has {settings.num_ranks} tensor-parallel ranks; "
            "speculation is served on one rank in this release: leave one of the two out"
        )


def resolved_draft(settings: WorkerSettings, model: ResolvedModel) -> Drafts | None:
    """What guesses beside `model`; its `speculation.model` is a local directory. None: neither a model nor heads.

    Raises:
        CheckpointError, ConfigError: as `resolve_guesses`.
    """
    if not settings.speculation.has_weights or settings.num_ranks > 1:
        return None
    return resolve_guesses(settings.speculation, settings.model, settings.cache.codec, model, built_library)


def load_guessing(
    settings: WorkerSettings,
    model: ResolvedModel,
    draft: Drafts | None,
    target: Runner,
    options: RunnerOptions,
    *,
    loaded: LoadedDrafter | None = None,
) -> Guessing | None:
    """Load what guesses beside the runner `target` of `model`; None: speculation is off.

    `settings` with the decided step and cache. `options`: of the target; what guesses has a pool of as many blocks.
    `loaded`: what was loaded before for `draft` and must not run any more: its weights are used again, none are read.

    Raises:
        CheckpointError: weights of the draft model or heads cannot be read.
    """
    config = settings.speculation
    step, most = settings.step, config.num_speculative_tokens
    if config.method is None or settings.num_ranks > 1:
        return None
    if draft is None:
        limits = NgramLimits(config.prompt_lookup_min, config.prompt_lookup_max)
        return Guessing(Speculation(lambda key, params: NgramProposer(limits), most, config.method))
    if isinstance(draft, ResolvedMedusa):
        if isinstance(loaded, MedusaDrafter):
            heads = loaded.weights
        else:
            heads = load_medusa_weights(draft.spec, target.ops, model.spec.vocab_size)
        speculation = Speculation(HeadsPlanner(len(heads.heads)), most, config.method)
        return Guessing(speculation, MedusaDrafter(target, heads, model.spec.eos_ids))
    if isinstance(draft, ResolvedEagle3 | ResolvedMtp):
        head = loaded.head if isinstance(loaded, LayerDrafter) else _head(draft, target)
        store = KvStore(draft.kv_spec, options.num_blocks, options.block_tokens, target.ops.device, options.digest_key)
        holdings = DraftHoldings(options.num_blocks, options.block_tokens, finds_prefixes=False)
        drafter = LayerDrafter(target, head, store, draft.taps)
        return Guessing(Speculation(LayerPlanner(model.max_model_len, holdings), most, config.method), drafter)
    context = min(draft.max_model_len, model.max_model_len)
    draft = replace(draft, spec=_with_ends(draft.spec, model.spec), max_model_len=context)
    is_alike = (draft.dtype, draft.quantization, draft.kernels) == (model.dtype, model.quantization, model.kernels)
    options = replace(options, num_states=0, seals=False)
    if isinstance(loaded, ModelDrafter):
        runner = runner_over_new_store(loaded.runner, draft, options)
    else:
        runner = load_runner(draft, options, ops=target.ops if is_alike else None)
    holdings = DraftHoldings(options.num_blocks, options.block_tokens, finds_prefixes=settings.cache.prefix_caching)
    bounds = DraftBounds(draft.max_model_len, min(draft.spec.vocab_size, model.spec.vocab_size))
    planner = DraftPlanner(bounds, holdings, CatchUp(CATCH_UP_SHARE * step.target_ms, step.max_num_batched_tokens))
    return Guessing(Speculation(planner, most, config.method), ModelDrafter(runner))


def _head(draft: ResolvedEagle3 | ResolvedMtp, target: Runner) -> LayerHead:
    if isinstance(draft, ResolvedEagle3):
        return load_eagle3_head(draft.spec, target)
    return load_mtp_head(draft.spec, open_source(draft.directory), target)


def _with_ends(draft: ModelSpec, model: ModelSpec) -> ModelSpec:
    """The draft model's spec with the ends of the served model: what they are decides how a token is drawn."""
    return replace(draft, eos_ids=tuple(id_ for id_ in model.eos_ids if id_ < draft.vocab_size))
