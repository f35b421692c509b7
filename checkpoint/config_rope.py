"""Reads rotary positions from config.json, in the keys of transformers 4 and of transformers 5. Knows no tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..core.errors import CheckpointError
from .config_fields import Fields
from .spec import RopeScaling, RopeSpec

_SERVED = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")

# Defaults of max_position_embeddings in each family's config class of transformers 5, for a config.json without it.
_LONGEST = {
    "MistralForCausalLM": 131072,
    "MinistralForCausalLM": 131072,
    "Qwen2ForCausalLM": 32768,
    "Qwen3ForCausalLM": 32768,
    "Gemma2ForCausalLM": 8192,
    "Gemma3ForCausalLM": 131072,
    "Phi3ForCausalLM": 4096,
    "MixtralForCausalLM": 131072,
    "Qwen2MoeForCausalLM": 32768,
    "Qwen3MoeForCausalLM": 32768,
    "DeepseekV3ForCausalLM": 4096,
    "GptOssForCausalLM": 131072,
    "Qwen3NextForCausalLM": 32768,
    "Qwen3_5ForCausalLM": 32768,
    "Qwen3_5ForConditionalGeneration": 32768,
    "Qwen3_5MoeForCausalLM": 32768,
    "Qwen3_5MoeForConditionalGeneration": 32768,
}


class Rope(NamedTuple):
    """Result of `read_rope`."""

    spec: RopeSpec
    max_len: int  # context length for which these angles are meant
    mscale_all_dim: float | None = None  # yarn, for DeepSeek's attention scale


def read_rope(config: Fields, head_dim: int, *, theta: float = 10000.0, partial: bool = False) -> Rope:
    """Read the rotary positions of all layers, from `rope_parameters` (5) or `rope_theta` and `rope_scaling` (4).

    `theta`: default if the config has none. `partial`: this family may rotate only a part of a head.
    """
    parameters = shared_parameters(config)
    return rope_of(config, parameters, head_dim, theta=config.number("rope_theta", theta), partial=partial)


def shared_parameters(config: Fields) -> Mapping[str, Any]:
    """Read `rope_parameters` or `rope_scaling`, the same for all layers.

    Raises:
        CheckpointError: both exist and differ (transformers 5 then ignores the first one, including its base), or they
            have separate values for kinds of layers.
    """
    parameters = given_parameters(config)
    kinds = [name for name, value in parameters.items() if isinstance(value, Mapping)]
    if kinds:
        raise CheckpointError(
            f"{config.where}: rope parameters of {kinds[0]} alone are not served for {config.architecture}; give one "
            "set for all layers"
        )
    return parameters


def given_parameters(config: Fields) -> Mapping[str, Any]:
    """Return `rope_parameters` or `rope_scaling`; empty if neither exists.

    Raises:
        CheckpointError: both exist and differ.
    """
    new, old = config.mapping("rope_parameters"), config.mapping("rope_scaling")
    if new and old and new != old:
        raise CheckpointError(
            f"{config.where}: rope_parameters and rope_scaling are both set and differ; keep the one that holds"
        )
    return new or old


def rope_of(
    config: Fields,
    parameters: Mapping[str, Any],
    head_dim: int,
    *,
    theta: float,
    partial: bool = False,
    of_a_kind: bool = False,
) -> Rope:
    """Make the rotary positions of `parameters`. `theta`: default if they have none.

    `of_a_kind`: they belong to one kind of layer, and config.json's own original_max_position_embeddings is ignored.
    """
    inner = Fields(parameters, f"{config.where} (rope)")
    factor = parameters.get("partial_rotary_factor", config.config.get("partial_rotary_factor"))
    width = head_dim
    if factor not in (None, 1, 1.0):
        if not partial:
            raise CheckpointError(
                f"{config.where}: partial_rotary_factor is {factor!r}; {config.architecture} is served with whole "
                "heads rotated only"
            )
        width = int(head_dim * Fields({"partial_rotary_factor": factor}, config.where).number("partial_rotary_factor"))
    if width % 2 or width < 2 or width > head_dim:
        raise CheckpointError(f"{config.where}: {width} of {head_dim} numbers of a head are rotated; must be even")
    max_len = config.count("max_position_embeddings", _LONGEST.get(config.architecture, 2048))
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    base = inner.number("rope_theta", theta)
    if kind == "default":
        return Rope(RopeSpec(base, width), max_len)
    beside = None if of_a_kind else config.optional_count("original_max_position_embeddings")
    original = beside or inner.count("original_max_position_embeddings", max_len)  # outer field first, as for Phi
    scaling, longest = _scaling(kind, inner, width, original, max_len)
    all_dim = inner.optional_number("mscale_all_dim") if parameters.get("mscale_all_dim") else None
    return Rope(RopeSpec(base, width, scaling), longest, all_dim)


def _scaling(kind: object, inner: Fields, width: int, original: int, max_len: int) -> tuple[RopeScaling, int]:
    """Scaling, and the context length that it supports."""
    if kind in ("longrope", "su"):
        return _longrope(inner, width, original, max_len), max_len
    if kind == "linear":
        return RopeScaling("linear", inner.number("factor")), max_len
    if kind == "dynamic":
        factor = inner.number("factor")
        return RopeScaling("dynamic", factor, original_max_len=max_len), int(max_len * factor)
    if kind == "llama3":
        low, high = inner.number("low_freq_factor"), inner.number("high_freq_factor")
        if high <= low:
            raise CheckpointError(f"{inner.where}: high_freq_factor {high} must be above low_freq_factor {low}")
        return RopeScaling("llama3", inner.number("factor"), original, low, high), max_len
    if kind == "yarn":
        scaling = _yarn(inner, original, max_len)
        return scaling, max(max_len, int(original * scaling.factor))
    raise CheckpointError(f"{inner.where}: rope type {kind!r} is not served; served: {', '.join(_SERVED)}")


def _yarn(inner: Fields, original: int, max_len: int) -> RopeScaling:
    factor = inner.number("factor", max_len / original)
    mscale, all_dim = inner.config.get("mscale"), inner.config.get("mscale_all_dim")
    magnitude = yarn_magnitude(factor)
    if mscale and all_dim:
        magnitude = yarn_magnitude(factor, inner.number("mscale")) / yarn_magnitude(
            factor, inner.number("mscale_all_dim")
        )
    return RopeScaling(
        "yarn",
        factor,
        original,
        beta_fast=inner.number("beta_fast") if inner.config.get("beta_fast") else 32.0,
        beta_slow=inner.number("beta_slow") if inner.config.get("beta_slow") else 1.0,
        truncate=inner.flag("truncate", True),
        magnitude=inner.number("attention_factor", magnitude),
    )


def yarn_magnitude(factor: float, weight: float = 1.0) -> float:
    """YaRN's factor on cosines and sines for a scaling factor. Source: Peng et al. 2023, section 3.4."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _longrope(inner: Fields, width: int, original: int, max_len: int) -> RopeScaling:
    factor = inner.number("factor", max_len / original)
    magnitude = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return RopeScaling(
        "longrope",
        factor,
        original,
        short_factors=inner.numbers("short_factor", width // 2),
        long_factors=inner.numbers("long_factor", width // 2),
        magnitude=inner.number("attention_factor", magnitude),
    )
