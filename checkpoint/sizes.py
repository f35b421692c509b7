"""Computes dtypes, memory and context length from a checkpoint's headers and settings. Reads no weights."""

from __future__ import annotations

from pathlib import Path

from ..core.errors import ConfigError
from ..kv.spec import codec_ids, pair_name
from .config import DTypeChoice, Kernels, ModelConfig
from .int4 import int4_matrices
from .layout import EMBEDDING, weight_bytes
from .safetensors_files import stored_dtype
from .spec import DType, ModelSpec


def held_bytes(path: Path, spec: ModelSpec, model: ModelConfig, kernels: Kernels, *, part: bool = False) -> int:
    """Upper bound of the memory of a worker's weights with these kernels, in bytes.

    `spec`: of the model, or of a tensor-parallel rank (`RankSpec.local`), whose own weights are counted then.
    Native kernels pack every matrix, also a tied head, and leave the embedding in its file if it has the compute dtype.
    They usually store bfloat16 in 12 bits instead of 16, but that is known only after the weights were read. Matrices
    of 4-bit groups stay as stored (int4.py), unless `part`: the spec is that of one of several ranks. The other kernels
    store int8 weights, and 4-bit ones, in the compute dtype.
    """
    dtype = compute_dtype(spec, model.dtype)
    stay = kernels == "native" and model.quantization == "none" and not part
    return weight_bytes(
        spec,
        dtype,
        model.quantization if kernels == "native" else "none",
        packs_head=kernels == "native" or model.quantization != "none",
        maps_table=kernels != "triton" and stored_dtype(path, EMBEDDING) == dtype,
        as_stored=int4_matrices(path) if stay else {},
    )


def compute_dtype(spec: ModelSpec, wanted: DTypeChoice) -> DType:
    """Dtype of matrix products. `auto` is the checkpoint's dtype."""
    return spec.dtype if wanted == "auto" else wanted


def cache_codec(wanted: str) -> str:
    """Codec of the KV cache, of keys and values, in `kv.spec.pair_name`. `auto` is FP8."""
    keys, _, values = wanted.partition("/")
    codec = pair_name(keys, values or keys)
    assert codec_ids(codec)
    return codec


def context_length(spec: ModelSpec, wanted: int | None) -> int:
    """Context length to serve: `wanted`, or the checkpoint's. ConfigError: `wanted` exceeds the checkpoint's."""
    if wanted is not None and wanted > spec.max_model_len:
        raise ConfigError(
            f"model.max_model_len is {wanted}; the checkpoint was made for {spec.max_model_len}: ask for that or less"
        )
    return wanted or spec.max_model_len
