"""A checkpoint with every choice about its numbers made: for the plan of a cluster, and in each worker's process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from ..checkpoint.activations import NO_STEP, StepBytes, step_bytes
from ..checkpoint.config import Kernels, ModelConfig
from ..checkpoint.config_json import load_spec
from ..checkpoint.shards import Shard, shard_spec
from ..checkpoint.sizes import cache_codec, compute_dtype, context_length, held_bytes
from ..checkpoint.spec import DType, LatentAttention, ModelSpec, PlainAttention, Quantization
from ..core.errors import ConfigError
from ..kernels.cpu.build import find_compiler
from ..kv.spec import KEYS_ONLY, KvSpec, LayerGroup, codec_ids
from .ops.device import chosen_kernels, refuse_unserved

MOST_CHANNELS = 1024  # numbers of a head whose keys are rounded per channel: kernels/cpu/cache/cache.h

DeviceKind = Literal["cpu", "cuda"]


class Beside(NamedTuple):
    """Needs of what guesses beside a model, in a worker of one rank."""

    weight_bytes: int
    group: LayerGroup | None  # its layers of the cache; None: it has none
    step_bytes: StepBytes


class Guesses(Protocol):
    """What guesses beside a model, with every choice made: a draft model, or heads."""

    @property
    def directory(self) -> Path:
        """Its checkpoint."""
        ...

    @property
    def beside(self) -> Beside:
        """What it needs."""
        ...

    @property
    def told(self) -> str:
        """Its part of the plan, as text."""
        ...


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A checkpoint's spec, and the settings of a model with no `auto` left. Made of headers; no weights are read."""

    directory: Path  # or the GGUF file
    spec: ModelSpec
    device: DeviceKind
    kernels: Kernels
    dtype: DType  # of matrix products
    quantization: Quantization
    codec: str  # of the KV cache: a name in `kv.spec.pair_name`
    max_model_len: int  # tokens of a prompt with its answer: as configured, or the checkpoint's
    weight_bytes: int  # upper bound of a worker's weights in memory

    @property
    def kv_spec(self) -> KvSpec:
        """Layout of one token in the cache."""
        return self.spec.kv_spec(self.codec)

    @property
    def beside(self) -> Beside:
        """What it needs as a draft model beside another one."""
        group = replace(self.kv_spec.main, name="draft")
        return Beside(self.weight_bytes, group, step_bytes(self.spec, self.dtype))

    @property
    def told(self) -> str:
        """Its part of the plan as a draft model, as text."""
        kv = f"KV {self.kv_spec.bytes_per_token:,} bytes/token"
        return f"draft model {self.directory}: weights {self.weight_bytes / 2**20:,.1f} MiB per worker, {kv}"

    def ends_with(self, end_ids: Sequence[int]) -> ResolvedModel:
        """With further end tokens; ids outside the vocabulary are left out, tokenizers may have more ids."""
        known = (id_ for id_ in end_ids if id_ < self.spec.vocab_size)
        return replace(self, spec=replace(self.spec, eos_ids=tuple(dict.fromkeys((*self.spec.eos_ids, *known)))))


@dataclass(frozen=True, slots=True)
class MemoryNeeds:
    """Needs of all ranks of a worker together."""

    weight_bytes: int
    kv_spec: KvSpec
    max_model_len: int
    step_bytes: StepBytes = NO_STEP
    state_bytes: int = 0  # of a sequence's recurrent state
    adapter_bytes: int = 0  # kept for adapters


def needs_of_ranks(
    model: ResolvedModel, settings: ModelConfig, num_ranks: int, draft: Guesses | None = None
) -> MemoryNeeds:
    """Needs of a worker of `num_ranks` tensor-parallel ranks. `settings`: those that `model` was resolved with.

    `draft`: what guesses beside it, of a worker of one rank. Its KV is another group of the layout: a block of the
    pool stands for one of the model and one of the draft model or head.

    Raises:
        ConfigError: the model's heads cannot be split over so many ranks; names the sizes that work. Or several ranks
            are to serve adapters.
    """
    rank = shard_spec(model.spec, Shard(0, num_ranks))
    if num_ranks == 1:
        steps, states = step_bytes(model.spec, model.dtype), model.spec.state_spec
        state_bytes = 0 if states is None else states.num_bytes
        needs = MemoryNeeds(
            model.weight_bytes, model.kv_spec, model.max_model_len, steps, state_bytes, settings.adapter_bytes
        )
        return needs if draft is None else _with_draft(needs, draft.beside)
    refuse_adapters(settings, num_ranks)
    weight_bytes = num_ranks * held_bytes(model.directory, rank.local, settings, model.kernels, part=True)
    step = step_bytes(rank.local, model.dtype)
    of_all = StepBytes(num_ranks * step.per_token, num_ranks * step.per_row)
    return MemoryNeeds(weight_bytes, model.kv_spec.of_all_ranks(num_ranks), model.max_model_len, of_all)


def _with_draft(needs: MemoryNeeds, draft: Beside) -> MemoryNeeds:
    steps = draft.step_bytes
    per_token, per_row = needs.step_bytes.per_token + steps.per_token, needs.step_bytes.per_row + steps.per_row
    return replace(
        needs,
        weight_bytes=needs.weight_bytes + draft.weight_bytes,
        kv_spec=needs.kv_spec if draft.group is None else KvSpec((*needs.kv_spec.groups, draft.group)),
        step_bytes=StepBytes(per_token, per_row),
    )


def resolve_draft(
    directory: Path,
    beside: ModelConfig,
    cache_dtype: str,
    device: DeviceKind,
    find: Callable[[], object] = find_compiler,
) -> ResolvedModel:
    """Make every choice about a draft model's numbers: dtype, quantization and kernels as for the model `beside` it.

    Raises:
        CheckpointError, ConfigError: as `resolve`, or the draft model has recurrent layers.
    """
    settings = ModelConfig(
        path=str(directory), dtype=beside.dtype, quantization=beside.quantization, kernels=beside.kernels
    )
    draft = resolve(directory, settings, cache_dtype, device, find)
    if draft.spec.delta is not None:
        raise ConfigError(
            f"speculation.model is {directory}, and {draft.spec.architecture} has recurrent layers, whose state cannot "
            "go back behind a wrong guess; name a draft model of attention layers alone"
        )
    return draft


def refuse_adapters(settings: ModelConfig, num_ranks: int) -> None:
    """Raise ConfigError if a worker of several tensor-parallel ranks is to serve adapters."""
    if num_ranks > 1 and settings.serves_adapters:
        raise ConfigError(
            f"adapters are to be served (model.lora_modules or enable_lora) by workers of {num_ranks} tensor-parallel "
            "ranks; they are served on one rank in this release: leave one of the two out"
        )


def resolve(
    directory: Path,
    model: ModelConfig,
    cache_codec_name: str,
    device: DeviceKind,
    find: Callable[[], object] = find_compiler,
) -> ResolvedModel:
    """Make every choice about a checkpoint's numbers. `find`: see `chosen_kernels`.

    Raises:
        CheckpointError: the directory holds no model that is served.
        ConfigError: the configured context is longer than the checkpoint's, native kernels are requested and not
            available, or the device does not serve the model or the cache.
    """
    spec = load_spec(directory)
    kernels, codec = chosen_kernels(model.kernels, device, find), cache_codec(cache_codec_name)
    if device != "cpu":
        refuse_unserved(spec, codec)
    _refuse_unlike(spec, codec)
    return ResolvedModel(
        directory=directory,
        spec=spec,
        device=device,
        kernels=kernels,
        dtype=compute_dtype(spec, model.dtype),
        quantization=model.quantization,
        codec=codec,
        max_model_len=context_length(spec, model.max_model_len),
        weight_bytes=held_bytes(directory, spec, model, kernels),
    )


def _refuse_unlike(spec: ModelSpec, codec: str) -> None:
    """Refuse unlike codecs of keys and values that are one latent vector, and heads that are too wide for one."""
    keys, values = codec_ids(codec)
    if KEYS_ONLY in codec and isinstance(spec.attention, PlainAttention) and spec.attention.head_dim > MOST_CHANNELS:
        raise ConfigError(
            f"the keys' codec is {KEYS_ONLY!r} and heads have {spec.attention.head_dim} numbers; it serves up to "
            f"{MOST_CHANNELS}: use int8"
        )
    if isinstance(spec.attention, LatentAttention) and keys != values:
        raise ConfigError(
            f"the cache's codec is {codec!r}, and {spec.architecture} caches one vector for keys and values; give both "
            "one codec (--kv-cache-dtype int8), and none per channel"
        )
