"""Requirements of the configured checkpoint, read from its headers before workers are placed."""

from __future__ import annotations

from ..checkpoint.gguf.file import is_gguf
from ..checkpoint.locate import located, served_name
from ..checkpoint.quantised.plan import quantised_plan
from ..checkpoint.shards import group_sizes
from ..core.request import Role
from ..model.heads.resolved import resolve_guesses
from ..model.ops.device import chosen_kind, gpu_free_bytes
from ..model.resolved import Guesses, MemoryNeeds, ResolvedModel, needs_of_ranks, resolve
from ..router.api.defaults import SamplingDefaults, described
from ..text.same_tokens import check_draft
from ..text.tokenizer import Tokenizer
from ..worker.state_memory import refuse_beside_states, refuse_role
from .config import Config
from .placement import ModelFacts


def model_facts(config: Config, num_gpus: int | None = None) -> ModelFacts:
    """Requirements of the configured checkpoint, in the configured dtypes.

    `num_gpus`: of the machine that will serve it; None: this one's.

    Raises:
        CheckpointError: the checkpoint cannot be found or is not supported.
        ConfigError: the asked-for context is longer than the checkpoint's, the device cannot serve it, or its heads
            cannot be split over the ranks of a worker.
    """
    model = _resolved(config, num_gpus)
    directory, kind = model.directory, model.device
    cluster = config.cluster
    has_states = model.spec.delta is not None
    refuse_beside_states(model.spec, config.model, config.cache, config.speculation)
    if has_states and cluster.prefill and "prefill" in cluster.model_fields_set:
        refuse_role(served_name(config.model.path, config.model.name), Role.PREFILL)
    roles = (Role.PREFILL, Role.DECODE) if cluster.prefill and not has_states else (Role.COMBINED,)
    draft = _draft(config, model)
    needs = [needs_of_ranks(model, config.model, cluster.ranks_of(role), draft) for role in roles]
    most = max(needs, key=lambda each: each.weight_bytes)
    return ModelFacts(
        name=served_name(config.model.path, config.model.name),
        directory=str(directory),
        weight_bytes=most.weight_bytes,
        kv_spec=most.kv_spec,
        step_bytes=most.step_bytes,
        state_bytes=most.state_bytes,
        adapter_bytes=most.adapter_bytes,
        max_model_len=model.max_model_len,
        asked_max_model_len=config.model.max_model_len,
        remarks=(*model.spec.remarks, *_gpu_remarks(model)),
        sampling=_sampling(model) if config.model.generation_config == "auto" else "",
        draft_directory="" if draft is None or config.speculation.checkpoint is None else str(draft.directory),
        draft="" if draft is None else draft.told,
        arithmetic=f"{model.dtype}, {_rounding(model)}, {model.kernels} kernels on {kind}",
    )


def _gpu_remarks(model: ResolvedModel) -> list[str]:
    """Notes on quantised weights, which take as much memory on a GPU as floats."""
    if model.device == "cpu":
        return []
    remarks = []
    if model.quantization != "none":
        remarks.append(
            f"model.quantization {model.quantization} saves no memory on a GPU: rounded weights are held in "
            f"{model.dtype} there"
        )
    if _is_quantised(model):
        remarks.append(
            f"the checkpoint's quantised weights are decoded to {model.dtype} on a GPU, where they take "
            f"{model.weight_bytes / 2**20:,.0f} MiB"
        )
    return remarks


def _is_quantised(model: ResolvedModel) -> bool:
    if is_gguf(model.directory):  # of a float file the weights take as much memory
        return 1.5 * model.directory.stat().st_size < model.weight_bytes
    return quantised_plan(model.directory) is not None


def needs_by_ranks(config: Config, most: int) -> dict[int, MemoryNeeds]:
    """Needs of a worker on GPUs, of all its ranks together, for every number of ranks up to `most` that can split it.

    With adapters, of one rank alone: they are served on one.

    Raises:
        CheckpointError, ConfigError: as `model_facts`.
    """
    model = _resolved(config, most)
    sizes = [size for size in group_sizes(model.spec) if size <= (1 if config.model.serves_adapters else most)]
    draft = _draft(config, model)
    return {size: needs_of_ranks(model, config.model, size, draft if size == 1 else None) for size in sizes}


def _resolved(config: Config, num_gpus: int | None) -> ResolvedModel:
    kind = chosen_kind(config.model.device, len(gpu_free_bytes()) if num_gpus is None else num_gpus)
    return resolve(located(config.model.path), config.model, config.cache.codec, kind)


def _draft(config: Config, model: ResolvedModel) -> Guesses | None:
    """What guesses beside `model`. Raises ConfigError: it does not fit; CheckpointError: it cannot be read."""
    speculation = config.speculation
    if not speculation.has_weights:
        return None
    if speculation.checkpoint is not None:
        place = located(speculation.checkpoint, "speculation.model")
        speculation = speculation.model_copy(update={"model": str(place)})
    draft = resolve_guesses(speculation, config.model, config.cache.codec, model)
    if isinstance(draft, ResolvedModel):  # heads have no tokenizer
        check_draft(draft.directory, Tokenizer.load(model.directory))
    return draft


def _rounding(model: ResolvedModel) -> str:
    if model.quantization == "none":
        return "weights as they are"
    return f"weights{' and what they multiply' if model.kernels == 'native' else ''} rounded to {model.quantization}"


def _sampling(model: ResolvedModel) -> str:
    return described(SamplingDefaults.load(model.directory, model.spec.vocab_size))
