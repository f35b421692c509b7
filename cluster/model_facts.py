"""Requirements of the configured checkpoint, read from its headers before workers are placed."""

from __future__ import annotations

from pathlib import Path

from ..checkpoint.config import Kernels, ModelConfig
from ..checkpoint.config_json import load_spec
from ..checkpoint.locate import resolve, served_name
from ..checkpoint.sizes import cache_codec, compute_dtype, context_length, held_bytes
from ..checkpoint.spec import ModelSpec
from ..model.ops.device import chosen_kernels, chosen_kind, gpu_free_bytes, refuse_unserved
from ..router.api.defaults import SamplingDefaults, described
from .config import Config
from .placement import ModelFacts


def model_facts(config: Config) -> ModelFacts:
    """Requirements of the configured checkpoint, in the configured dtypes.

    Raises:
        CheckpointError: the checkpoint cannot be found or is not supported.
        ConfigError: the asked-for context is longer than the checkpoint's, or the device cannot serve it.
    """
    directory = resolve(config.model.path)
    spec = load_spec(directory)
    kind = chosen_kind(config.model.device, len(gpu_free_bytes()))
    kernels = chosen_kernels(config.model.kernels, kind)
    if kind == "cuda":
        refuse_unserved(spec, cache_codec(config.cache.dtype))
    return ModelFacts(
        name=served_name(config.model.path, config.model.name),
        directory=str(directory),
        weight_bytes=held_bytes(directory, spec, config.model, kernels),
        kv_spec=spec.kv_spec(cache_codec(config.cache.dtype)),
        max_model_len=context_length(spec, config.model.max_model_len),
        asked_max_model_len=config.model.max_model_len,
        remarks=spec.remarks,
        sampling=_sampling(directory, spec, config.model),
        arithmetic=(
            f"{compute_dtype(spec, config.model.dtype)}, {_rounding(config.model.quantization, kernels)}, "
            f"{kernels} kernels on {kind}"
        ),
    )


def _rounding(quantization: str, kernels: Kernels) -> str:
    if quantization == "none":
        return "weights as they are"
    return f"weights{' and what they multiply' if kernels == 'native' else ''} rounded to {quantization}"


def _sampling(directory: Path, spec: ModelSpec, model: ModelConfig) -> str:
    return described(SamplingDefaults.load(directory, spec.vocab_size)) if model.generation_config == "auto" else ""
