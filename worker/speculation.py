"""Speculation of a worker as configured: who guesses, and the draft model beside the served one. Knows no socket."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ..checkpoint.spec import ModelSpec
from ..core.errors import ConfigError
from ..core.request import Role
from ..engine.speculation.draft_model.catch_up import CatchUp
from ..engine.speculation.draft_model.holdings import DraftHoldings
from ..engine.speculation.draft_model.planner import DraftBounds, DraftPlanner
from ..engine.speculation.ngram import NgramLimits, NgramProposer
from ..engine.speculation.speculation import Speculation
from ..kernels.cpu.build import built_library
from ..model.drafter import ModelDrafter
from ..model.loader import RunnerOptions, load_runner, runner_over_new_store
from ..model.resolved import DeviceKind, ResolvedModel, resolve_draft
from ..model.runner import Runner
from .settings import WorkerSettings

CATCH_UP_SHARE = 0.25  # of `step.target_ms`, for the draft model's chunks beside streams


@dataclass(frozen=True, slots=True)
class Guessing:
    """What guesses in an engine."""

    speculation: Speculation
    drafter: ModelDrafter | None = None  # the draft model, if one guesses


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


def resolved_draft(settings: WorkerSettings, kind: DeviceKind) -> ResolvedModel | None:
    """The draft model with every choice made; its `speculation.model` is a local directory. None: no model guesses.

    Raises:
        CheckpointError, ConfigError: as `resolve_draft`.
    """
    directory = settings.speculation.draft_model
    if directory is None or settings.num_ranks > 1:
        return None
    return resolve_draft(Path(directory), settings.model, settings.cache.codec, kind, built_library)


def load_guessing(
    settings: WorkerSettings,
    model: ResolvedModel,
    draft: ResolvedModel | None,
    target: Runner,
    options: RunnerOptions,
    *,
    loaded: Runner | None = None,
) -> Guessing | None:
    """Load what guesses beside the runner `target` of `model`; None: speculation is off.

    `settings` with the decided step and cache. `options`: of the target; the draft model's pool has as many blocks.
    `loaded`: a runner of the draft model that was loaded before, whose weights are kept.

    Raises:
        CheckpointError: the draft model's weights cannot be read.
    """
    config = settings.speculation
    step, most = settings.step, config.num_speculative_tokens
    if config.method is None or settings.num_ranks > 1:
        return None
    if draft is None:
        limits = NgramLimits(config.prompt_lookup_min, config.prompt_lookup_max)
        return Guessing(Speculation(lambda key, params: NgramProposer(limits), most, config.method))
    context = min(draft.max_model_len, model.max_model_len)
    draft = replace(draft, spec=_with_ends(draft.spec, model.spec), max_model_len=context)
    is_alike = (draft.dtype, draft.quantization, draft.kernels) == (model.dtype, model.quantization, model.kernels)
    options = replace(options, num_states=0, seals=False)
    if loaded is None:
        runner = load_runner(draft, options, ops=target.ops if is_alike else None)
    else:
        runner = runner_over_new_store(loaded, draft, options)
    holdings = DraftHoldings(options.num_blocks, options.block_tokens, finds_prefixes=settings.cache.prefix_caching)
    bounds = DraftBounds(draft.max_model_len, min(draft.spec.vocab_size, model.spec.vocab_size))
    planner = DraftPlanner(bounds, holdings, CatchUp(CATCH_UP_SHARE * step.target_ms, step.max_num_batched_tokens))
    return Guessing(Speculation(planner, most, config.method), ModelDrafter(runner))


def _with_ends(draft: ModelSpec, model: ModelSpec) -> ModelSpec:
    """The draft model's spec with the ends of the served model: what they are decides how a token is drawn."""
    return replace(draft, eos_ids=tuple(id_ for id_ in model.eos_ids if id_ < draft.vocab_size))
