"""Converts GGUF's rotary positions to Hugging Face's keys: from metadata, and from factors stored as tensors."""

from __future__ import annotations

import struct
from typing import Any

from ...core.errors import CheckpointError
from .file import GgufFile
from .keys import Keys

_NO_MAGNITUDE = {"factor": 1.0, "attention_factor": 1.0}


def read_rope(keys: Keys, width: int) -> dict[str, Any]:
    """Read rotary positions in Hugging Face's keys. `width`: number of rotated numbers per head."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base", 10000.0)}
    kind = keys.text("rope.scaling.type", "none")
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 0.0)) or None
    factors = [_factors(keys.file, name, width) for name in ("rope_freqs", "rope_factors_short", "rope_factors_long")]
    original = keys.optional("rope.scaling.original_context_length")
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise keys.wrong("rope.scaling.type", kind, "none, linear, yarn, longrope")
    if any(factors) and kind in ("linear", "yarn"):
        raise keys.wrong("rope.scaling.type", kind, "none beside rotary factors (rope_freqs, rope_factors)")
    if factors[0]:  # Llama 3's scaling, converted to one divisor per frequency
        return {**rope, "rope_type": "longrope", "short_factor": factors[0], "long_factor": factors[0], **_NO_MAGNITUDE}
    if factors[1] and factors[2]:
        magnitude = keys.number("rope.scaling.attn_factor", 1.0)
        rope |= {"rope_type": "longrope", "short_factor": factors[1], "long_factor": factors[2]}
        return {**rope, "original_max_position_embeddings": original, "attention_factor": magnitude}
    if kind == "longrope" or factors[1] or factors[2]:
        raise keys.wrong("rope.scaling.type", kind, "longrope with rope_factors_long and rope_factors_short")
    if kind == "linear" or (factor not in (None, 1.0) and kind == "none"):
        return rope if factor in (None, 1.0) else {**rope, "rope_type": "linear", "factor": factor}
    return {**rope, **_yarn(keys, factor, original)} if kind == "yarn" else rope


def _yarn(keys: Keys, factor: float | None, original: int | None) -> dict[str, Any]:
    if keys.number("rope.scaling.yarn_ext_factor", 1.0) not in (1.0, -1.0):  # -1: the default
        raise keys.wrong("rope.scaling.yarn_ext_factor", keys.number("rope.scaling.yarn_ext_factor"), "1.0")
    yarn: dict[str, Any] = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    for name in ("beta_fast", "beta_slow"):
        if keys.has(f"rope.scaling.yarn_{name}"):
            yarn[name] = float(keys.number(f"rope.scaling.yarn_{name}"))
    if keys.has("rope.scaling.yarn_attn_factor"):
        yarn["attention_factor"] = keys.number("rope.scaling.yarn_attn_factor")
    if keys.has("rope.scaling.yarn_log_multiplier"):  # DeepSeek's mscale / 10; both weights are equal
        yarn["mscale"] = yarn["mscale_all_dim"] = round(keys.number("rope.scaling.yarn_log_multiplier") * 10.0, 7)
    return yarn


def _factors(file: GgufFile, name: str, width: int) -> list[float]:
    """Read divisors of the rotary frequencies; empty if there are none, or if all of rope_freqs are 1."""
    tensor = file.tensors.get(name + ".weight")
    if tensor is None:
        return []
    end = tensor.at + 4 * width // 2
    if tensor.kind != 0 or tensor.shape != (width // 2,) or end > file.size_bytes:
        raise CheckpointError(
            f"{file.path}: {name}.weight has shape {list(tensor.shape)}; must be {width // 2} float32 numbers"
        )
    with file.path.open("rb") as content:
        content.seek(tensor.at)
        found = list(struct.unpack(f"<{width // 2}f", content.read(4 * (width // 2))))
    return [] if name == "rope_freqs" and set(found) == {1.0} else found
