"""Common parts of several families' config readers. Knows no single model, no tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..core.errors import CheckpointError
from .config_fields import Fields
from .config_rope import Rope, read_rope, rope_of, shared_parameters, yarn_magnitude
from .spec import (
    Activation,
    DenseFfn,
    ExpertsFfn,
    LatentAttention,
    LayerSpec,
    PlainAttention,
    Routing,
)

_ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


@dataclass(frozen=True, slots=True)
class Family:
    """Result of a family's reader; `config_json.py` adds the fields that all families have."""

    attention: PlainAttention | LatentAttention
    layers: tuple[LayerSpec, ...]
    rope: Rope
    activation: Activation = "silu"
    rms_eps: float = 1e-6  # default if the config has none
    local_rope: Rope | None = None  # for layers with rope = 1
    gemma: dict[str, Any] | None = None  # fields of ModelSpec that only Gemma sets
    hybrid: dict[str, Any] | None = None  # those that only models with recurrent layers set
    extra_layers: int = 0


def act(config: Fields, name: str = "hidden_act", default: str = "silu") -> Activation:
    """Read the activation of feed-forward layers."""
    value = config.config.get(name) or default
    if value not in _ACTIVATIONS:
        raise CheckpointError(f"{config.where}: {name} is {value!r}; served: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[value]


def plain_attention(
    config: Fields,
    *,
    head_dim: int | None = None,
    qkv_bias: bool = False,
    output_bias: bool = False,
    head_norms: bool = False,
    output_gate: bool = False,
) -> PlainAttention:
    """Read grouped-query attention. `head_dim`: default if the config has none; else hidden_size / heads."""
    num_heads = config.count("num_attention_heads")
    num_kv_heads = config.count("num_key_value_heads", num_heads)
    head_dim = config.count("head_dim", head_dim or config.count("hidden_size") // num_heads)
    if num_heads % num_kv_heads or head_dim % 2:
        raise CheckpointError(
            f"{config.where}: {num_heads} heads, {num_kv_heads} KV heads, head_dim {head_dim}: "
            "heads must be a multiple of KV heads, head_dim even; config.json is damaged"
        )
    return PlainAttention(
        num_heads,
        num_kv_heads,
        head_dim,
        scale=head_dim**-0.5,
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        head_norms=head_norms,
        output_gate=output_gate,
    )


def plain_layers(
    config: Fields, ffn: DenseFfn | ExpertsFfn, windows: Sequence[int | None] | None = None
) -> tuple[LayerSpec, ...]:
    """Make layers that differ only in their windows."""
    return tuple(LayerSpec(ffn, window) for window in windows or [None] * config.count("num_hidden_layers"))


def sliding_flags(config: Fields, default: Sequence[bool]) -> list[bool]:
    """Flags of the windowed layers: from `layer_types`, else `default`."""
    kinds = config.config.get("layer_types")
    if kinds is None:
        return list(default)
    if not isinstance(kinds, list) or len(kinds) != len(default):
        raise config.wrong("layer_types", kinds, f"a list of {len(default)} kinds, one per layer")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise CheckpointError(
                f"{config.where}: layer_types names {kind!r}; served: full_attention, sliding_attention"
            )
    return [kind == "sliding_attention" for kind in kinds]


def windows_of(config: Fields, window: int | None, default: Sequence[int | None]) -> list[int | None]:
    """Window of each layer: from `layer_types`, else `default`."""
    if config.config.get("layer_types") is None:
        return list(default)
    flags = sliding_flags(config, [False] * len(default))
    if window is None and any(flags):
        raise CheckpointError(
            f"{config.where}: layer_types names sliding_attention, and no sliding_window is set or in use; set it, "
            "or make them full_attention"
        )
    return [window if sliding else None for sliding in flags]


def qwen_windows(config: Fields) -> list[int | None]:
    """Windows of Qwen: none unless `use_sliding_window`, then in all layers from `max_window_layers` on."""
    window = config.optional_count("sliding_window", 4096) if config.flag("use_sliding_window") else None
    first = config.whole("max_window_layers", 28)
    count = config.count("num_hidden_layers")
    return windows_of(config, window, [window if i >= first else None for i in range(count)])


# ------------------------------------------------------------------ experts

EXPERT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts")


def num_experts(config: Fields, default: int) -> int:
    """Read the number of experts in a layer, under any name that releases use."""
    named = {n: config.count(n) for n in EXPERT_FIELDS if config.config.get(n) is not None}
    if len(set(named.values())) > 1:
        raise CheckpointError(f"{config.where}: config.json counts experts as {named}; keep the one that holds")
    return next(iter(named.values()), default)


def checked(config: Fields, routing: Routing) -> Routing:
    """Return the routing if it is consistent.

    Raises:
        CheckpointError: a token would need more experts or groups than exist.
    """
    per_group, rest = divmod(routing.num_experts, routing.num_groups)
    chosen_from = routing.groups_per_token * per_group
    if rest or routing.groups_per_token > routing.num_groups or routing.per_token > chosen_from:
        raise CheckpointError(
            f"{config.where}: {routing.per_token} experts per token of {routing.num_experts} in {routing.num_groups} "
            f"groups of which {routing.groups_per_token} count; config.json is damaged"
        )
    if routing.correction and per_group < 2:
        raise CheckpointError(f"{config.where}: groups of {per_group} experts; must have 2 at least")
    return routing


def sparse_layers(
    config: Fields, windows: Sequence[int | None], *, shared_width: int | None = None, shared_gate: bool = False
) -> tuple[LayerSpec, ...]:
    """Make Qwen's layers: experts in every `decoder_sparse_step`-th layer that is not in `mlp_only_layers`."""
    step, only = config.whole("decoder_sparse_step", 1), config.ids("mlp_only_layers")
    routing = Routing(
        num_experts(config, 60 if shared_gate else 128),
        config.count("num_experts_per_tok", 4 if shared_gate else 8),
        normalised=config.flag("norm_topk_prob"),
    )
    width = config.count("moe_intermediate_size", 1408 if shared_gate else 768)
    experts = ExpertsFfn(width, checked(config, routing), shared_width, shared_gate)
    dense = DenseFfn(config.count("intermediate_size"))
    return tuple(
        LayerSpec(experts if step and i not in only and (i + 1) % step == 0 else dense, window)
        for i, window in enumerate(windows)
    )


# ------------------------------------------------------------------ Gemma


def gemma_attention(config: Fields, *, cap: float | None, head_norms: bool = False) -> PlainAttention:
    """Read attention of Gemma 2 and 3, with its own scale and perhaps a softcap."""
    bias = config.flag("attention_bias")
    plain = plain_attention(config, head_dim=256, qkv_bias=bias, output_bias=bias, head_norms=head_norms)
    return PlainAttention(
        plain.num_heads,
        plain.num_kv_heads,
        plain.head_dim,
        scale=config.number("query_pre_attn_scalar", 256.0) ** -0.5,
        softcap=config.optional_number("attn_logit_softcapping", cap),
        qkv_bias=bias,
        output_bias=bias,
        head_norms=head_norms,
    )


def gemma(
    config: Fields,
    attention: PlainAttention,
    layers: tuple[LayerSpec, ...],
    ropes: tuple[Rope, ...],
    *,
    final_cap: float | None,
) -> Family:
    """Common reader of Gemma 2 and 3: norms minus one, before and after; scaled embeddings; softcapped logits."""
    config.refuse("use_bidirectional_attention", "num_local_experts", "num_experts")
    fields = {
        "norm_offset": 1.0,
        "sandwich_norms": True,
        "embedding_scale": math.sqrt(config.count("hidden_size")),
        "final_softcap": config.optional_number("final_logit_softcapping", final_cap),
    }
    activation = act(config, "hidden_activation", "gelu_pytorch_tanh")
    local = ropes[1] if len(ropes) > 1 else None
    return Family(attention, layers, ropes[0], activation, local_rope=local, gemma=fields)


# ------------------------------------------------------------------ gpt-oss

_GPT_OSS_ROPE = {  # of its releases, for a config without any
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def gpt_oss_rope(config: Fields, head_dim: int) -> Rope:
    """Read the rotary positions of gpt-oss: YaRN, with the releases' values if the config has none."""
    parameters = shared_parameters(config) or _GPT_OSS_ROPE
    return rope_of(config, parameters, head_dim, theta=config.number("rope_theta", 150000.0))


# ------------------------------------------------------------------ DeepSeek


def deepseek(
    config: Fields, routing: Routing, *, dense_layers: int, shared: int, moe_width: int, mlp_bias: bool
) -> Family:
    """Common reader of DeepSeek-V2 and V3: latent attention, dense layers, then experts. Arguments are defaults."""
    if config.config.get("moe_layer_freq", 1) != 1:
        raise config.wrong("moe_layer_freq", config.config["moe_layer_freq"], "1: experts in every later layer")
    rope_width = config.count("qk_rope_head_dim", 64)
    rope, key_width = read_rope(config, rope_width), config.count("qk_nope_head_dim", 128)
    scale = (key_width + rope_width) ** -0.5
    if rope.mscale_all_dim is not None and rope.spec.scaling is not None:
        scale *= yarn_magnitude(rope.spec.scaling.factor, rope.mscale_all_dim) ** 2
    attention = LatentAttention(
        num_heads=config.count("num_attention_heads"),
        query_rank=config.optional_count("q_lora_rank", 1536),
        latent_width=config.count("kv_lora_rank", 512),
        rope_width=rope_width,
        key_width=key_width,
        value_width=config.count("v_head_dim", 128),
        scale=scale,
        interleaved=config.flag("rope_interleave", True),
        bias=config.flag("attention_bias"),
    )
    width = config.count("moe_intermediate_size", moe_width)
    shared_width = width * config.whole("n_shared_experts", shared) or None
    experts = ExpertsFfn(width, checked(config, routing), shared_width, shared_bias=mlp_bias)
    first, dense = (
        config.whole("first_k_dense_replace", dense_layers),
        DenseFfn(config.count("intermediate_size"), mlp_bias),
    )
    count = config.count("num_hidden_layers")
    layers = tuple(LayerSpec(dense if i < first else experts) for i in range(count))
    extra = config.whole("num_nextn_predict_layers", 0)
    return Family(attention, layers, rope, act(config), extra_layers=extra)
