"""What this machine and this checkpoint offer, read once before anything is placed."""

from __future__ import annotations

import os
from collections.abc import Callable, Set
from pathlib import Path

from ..checkpoint.config import ModelConfig
from ..checkpoint.config_json import load_spec
from ..checkpoint.layout import EMBEDDING, weight_bytes
from ..checkpoint.locate import resolve, served_name
from ..checkpoint.safetensors_files import stored_dtype
from ..checkpoint.spec import DType, ModelSpec
from ..cluster.config import Config
from ..cluster.placement import MachineFacts, ModelFacts
from ..core.errors import ConfigError
from ..kv.spec import CODEC_NAMES
from ..model.ops.device import Kernels, chosen_kernels, chosen_kind, gpu_free_bytes, refuse_unserved
from ..router.api.defaults import SamplingDefaults, described
from .cgroup import left_bytes, quota_cores


def machine_facts() -> MachineFacts:
    """Cores that we may run on, and memory that is available now (a cgroup's limits count), of each GPU too."""
    in_group = left_bytes()
    memory_bytes = _available_bytes() if in_group is None else min(_available_bytes(), in_group)
    cores, reason = usable_cores(os.sched_getaffinity(0), quota_cores(), _siblings)
    return MachineFacts(cores, memory_bytes, gpu_free_bytes(), reason)


def usable_cores(allowed: Set[int], quota: float | None, siblings: Callable[[int], str]) -> tuple[int, str]:
    """How many threads can compute at once, and why so many.

    `allowed`: logical processors of our affinity mask. `siblings`: which ones share a processor's physical core, as
    Linux lists them; two threads on one core get in each other's way here. `quota`: a cgroup's, in cores.
    """
    physical = len({siblings(processor) or str(processor) for processor in allowed})
    told = f"{physical} physical" + (f" of {len(allowed)} logical" if len(allowed) != physical else "")
    if quota is None or quota >= physical:
        return physical, told
    return max(1, int(quota)), f"a cgroup's quota of {quota:g}, {told}"


def model_facts(config: Config) -> ModelFacts:
    """What the configured checkpoint needs, in the configured dtypes.

    Raises:
        CheckpointError: it cannot be found or is not supported.
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


def held_bytes(path: Path, spec: ModelSpec, model: ModelConfig, kernels: Kernels) -> int:
    """Bytes of memory that a worker's weights take with these kernels, at most.

    Native ones pack every matrix, a tied head too, and leave the embedding in its file where it has the compute dtype.
    That bfloat16 most often takes them twelve bits and not sixteen is known only of weights that have been read.
    The others hold int8 weights as what they were rounded to, in the compute dtype.
    """
    dtype = compute_dtype(spec, model.dtype)
    return weight_bytes(
        spec,
        dtype,
        model.quantization if kernels == "native" else "none",
        packs_head=kernels == "native" or model.quantization != "none",
        maps_table=kernels != "triton" and stored_dtype(path, EMBEDDING) == dtype,
    )


def compute_dtype(spec: ModelSpec, wanted: str) -> DType:
    """`auto` is the checkpoint's own."""
    return spec.dtype if wanted == "auto" else ("float32" if wanted == "float32" else "bfloat16")


def cache_codec(wanted: str) -> str:
    """`auto` is FP8."""
    codec = "fp8" if wanted == "auto" else wanted
    assert codec in CODEC_NAMES
    return codec


def context_length(spec: ModelSpec, wanted: int | None) -> int:
    """The asked-for length, or the checkpoint's."""
    if wanted is not None and wanted > spec.max_model_len:
        raise ConfigError(
            f"model.max_model_len is {wanted}; the checkpoint was made for {spec.max_model_len}: ask for that or less"
        )
    return wanted or spec.max_model_len


def _available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _siblings(processor: int) -> str:
    try:
        return Path(f"/sys/devices/system/cpu/cpu{processor}/topology/thread_siblings_list").read_text()
    except OSError:
        return ""


def _sampling(directory: Path, spec: ModelSpec, model: ModelConfig) -> str:
    return described(SamplingDefaults.load(directory, spec.vocab_size)) if model.generation_config == "auto" else ""
