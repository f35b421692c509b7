"""Heads beside a model: whether they fit it, and what they need. Reads headers only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ...checkpoint.activations import StepBytes
from ...checkpoint.config import ModelConfig
from ...checkpoint.heads.eagle3 import NUM_TAPS, Eagle3Spec, load_eagle3
from ...checkpoint.heads.medusa import MedusaSpec, load_medusa
from ...checkpoint.heads.mtp import MtpSpec, find_mtp
from ...checkpoint.spec import DTYPE_BYTES, ModelSpec
from ...core.errors import ConfigError
from ...engine.config import SpeculationConfig
from ...kernels.cpu.build import find_compiler
from ...kv.spec import KvSpec
from ..resolved import Beside, ResolvedModel, resolve_draft

_LOGIT_BYTES = 4 * 3  # of a row: float32 logits, those of the whole vocabulary, and what drawing sorts


@dataclass(frozen=True, slots=True)
class ResolvedMedusa:
    """Medusa heads that fit the model they were resolved for."""

    spec: MedusaSpec
    weight_bytes: int  # upper bound

    @property
    def directory(self) -> Path:
        """The heads' checkpoint."""
        return self.spec.directory

    @property
    def beside(self) -> Beside:
        """What they need beside the model. They have no keys and values."""
        return Beside(self.weight_bytes, None, StepBytes(0, self.spec.num_rows * _LOGIT_BYTES))

    @property
    def told(self) -> str:
        """Their part of the plan, as text."""
        return (
            f"{len(self.spec.heads)} Medusa heads of {self.directory}: weights {self.weight_bytes / 2**20:,.1f} MiB "
            "per worker, no KV"
        )


def resolve_medusa(directory: Path, model: ResolvedModel) -> ResolvedMedusa:
    """Read Medusa heads for a model. Their dtype and quantization are the model's.

    Raises:
        CheckpointError: as `load_medusa`.
        ConfigError: they were made for a model of another width or vocabulary.
    """
    spec = load_medusa(directory)
    wanted = model.spec.hidden_size, model.spec.vocab_size
    given = spec.hidden_size, wanted[1] if spec.token_map is not None else spec.num_rows
    if given != wanted:
        raise ConfigError(
            f"speculation.model is {directory}, whose heads take hidden states of {given[0]} numbers and give "
            f"{given[1]:,} tokens; {model.directory} has {wanted[0]} and {wanted[1]:,}: name heads made for this model"
        )
    return ResolvedMedusa(spec, spec.num_parameters * DTYPE_BYTES[model.dtype])


@dataclass(frozen=True, slots=True)
class ResolvedEagle3:
    """An EAGLE-3 head that fits the model it was resolved for."""

    spec: Eagle3Spec
    weight_bytes: int  # upper bound
    kv_spec: KvSpec  # of its layer
    tap_bytes: int  # of a token's hidden states, which are kept from step to step

    @property
    def directory(self) -> Path:
        """The head's checkpoint."""
        return self.spec.directory

    @property
    def beside(self) -> Beside:
        """What it needs beside the model: its layer's keys and values are a group of the cache."""
        steps = StepBytes(2 * self.tap_bytes, self.spec.layer.vocab_size * _LOGIT_BYTES)
        return Beside(self.weight_bytes, replace(self.kv_spec.main, name="draft"), steps)

    @property
    def layer(self) -> ModelSpec:
        """Its layer."""
        return self.spec.layer

    @property
    def taps(self) -> tuple[int, ...]:
        """The model's layers before which it reads the residual stream."""
        return self.spec.layers_tapped

    @property
    def told(self) -> str:
        """Its part of the plan, as text."""
        layers = ", ".join(map(str, self.spec.layers_tapped))
        return (
            f"EAGLE-3 head {self.directory}: reads the model before its layers {layers}; weights "
            f"{self.weight_bytes / 2**20:,.1f} MiB per worker, KV {self.kv_spec.bytes_per_token:,} bytes/token"
        )


def resolve_eagle3(directory: Path, model: ResolvedModel) -> ResolvedEagle3:
    """Read an EAGLE-3 head for a model. Its dtype, quantization and codec are the model's.

    Raises:
        CheckpointError: as `load_eagle3`.
        ConfigError: it was made for a model of another width or vocabulary.
    """
    spec = load_eagle3(directory, model.spec.num_layers)
    hidden, vocab = model.spec.hidden_size, model.spec.vocab_size
    given = spec.layer.hidden_size, spec.fc_width, spec.layer.vocab_size
    if given != (hidden, NUM_TAPS * hidden, vocab):
        raise ConfigError(
            f"speculation.model is {directory}, a head of {given[0]} numbers over {given[1]} of hidden states and "
            f"{given[2]:,} tokens; {model.directory} has {hidden}, {NUM_TAPS * hidden} and {vocab:,}: name a head made "
            "for this model"
        )
    width = DTYPE_BYTES[model.dtype]
    kv_spec = spec.layer.kv_spec(model.codec)
    return ResolvedEagle3(spec, spec.num_parameters * width, kv_spec, NUM_TAPS * hidden * width)


@dataclass(frozen=True, slots=True)
class ResolvedMtp:
    """The layer for multi-token prediction of the model itself."""

    directory: Path  # of the model
    spec: MtpSpec
    weight_bytes: int  # upper bound
    kv_spec: KvSpec  # of its layer
    tap_bytes: int  # of a token's hidden state, which is kept from step to step

    @property
    def beside(self) -> Beside:
        """What it needs beside the model's other layers: its keys and values are a group of the cache."""
        steps = StepBytes(2 * self.tap_bytes, self.spec.whole.vocab_size * _LOGIT_BYTES)
        return Beside(self.weight_bytes, replace(self.kv_spec.main, name="draft"), steps)

    @property
    def layer(self) -> ModelSpec:
        """Its layer."""
        return self.spec.layer

    @property
    def taps(self) -> tuple[int, ...]:
        """It reads the model's residual stream after the last layer."""
        return (self.spec.index,)

    @property
    def told(self) -> str:
        """Its part of the plan, as text."""
        return (
            f"layer {self.spec.index} for multi-token prediction: weights {self.weight_bytes / 2**20:,.1f} MiB per "
            f"worker, KV {self.kv_spec.bytes_per_token:,} bytes/token"
        )


def resolve_mtp(model: ResolvedModel) -> ResolvedMtp:
    """Find a model's own layer for multi-token prediction.

    Raises:
        CheckpointError, ConfigError: as `find_mtp`.
    """
    from ..weights.tensors import open_source  # needs torch, which supervisors do without

    spec = find_mtp(model.spec, open_source(model.directory).shapes(), str(model.directory))
    width = DTYPE_BYTES[model.dtype]
    kv_spec = spec.layer.kv_spec(model.codec)
    return ResolvedMtp(model.directory, spec, spec.num_parameters * width, kv_spec, model.spec.hidden_size * width)


Drafts = ResolvedModel | ResolvedMedusa | ResolvedEagle3 | ResolvedMtp
"""What guesses beside a model."""


def with_codec(draft: Drafts, codec: str) -> Drafts:
    """What guesses when the model's cache has another codec: a head's layer takes it, a draft model keeps its own."""
    if isinstance(draft, ResolvedEagle3 | ResolvedMtp):
        return replace(draft, kv_spec=draft.layer.kv_spec(codec))
    return draft


def resolve_guesses(
    config: SpeculationConfig,
    beside: ModelConfig,
    codec: str,
    model: ResolvedModel,
    find: Callable[[], object] = find_compiler,
) -> Drafts:
    """What guesses beside `model`, whose settings are `beside`. The setting's checkpoint is a local directory.

    Raises:
        CheckpointError, ConfigError: as `resolve_draft`, `resolve_medusa`, `resolve_eagle3` and `resolve_mtp`.
    """
    if config.method == "mtp":
        return resolve_mtp(model)
    assert config.checkpoint is not None, "no checkpoint guesses"
    directory = Path(config.checkpoint)
    if config.method == "medusa":
        return resolve_medusa(directory, model)
    if config.method == "eagle3":
        return resolve_eagle3(directory, model)
    return resolve_draft(directory, beside, codec, model.device, find)
