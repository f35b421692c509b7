"""From a checkpoint and its settings to dtypes, bytes and lengths. Arithmetic over headers: reads no weights."""

from __future__ import annotations

from pathlib import Path

from ..core.errors import ConfigError
from ..kv.spec import CODEC_NAMES
from .config import DTypeChoice, Kernels, ModelConfig
from .layout import EMBEDDING, weight_bytes
from .safetensors_files import stored_dtype
from .spec import DType, ModelSpec


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


def compute_dtype(spec: ModelSpec, wanted: DTypeChoice) -> DType:
    """The dtype of linears: `auto` is the checkpoint's own."""
    return spec.dtype if wanted == "auto" else wanted


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
