"""Readers of each family's config.json: only the differences between families. Knows no tensor.

An absent field has the default of the family's releases. Unsupported fields that would change the results are refused
by name; an unsupported part with tensors is found as an unexpected tensor when weights are loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ..core.errors import CheckpointError
from .config_fields import Fields
from .config_rope import Rope, given_parameters, read_rope, rope_of, shared_parameters
from .family_parts import (
    EXPERT_FIELDS,
    Family,
    act,
    checked,
    deepseek,
    gemma,
    gemma_attention,
    gpt_oss_rope,
    num_experts,
    plain_attention,
    plain_layers,
    qwen_windows,
    sliding_flags,
    sparse_layers,
    windows_of,
)
from .hybrid_families import qwen3_5, qwen3_5_moe, qwen3_next
from .spec import DenseFfn, ExpertsFfn, LayerSpec, Routing

_CAPS = ("attn_logit_softcapping", "final_logit_softcapping")


def llama(config: Fields) -> Family:
    """Read Llama 2, 3, 3.1."""
    config.refuse(*EXPERT_FIELDS, *_CAPS, "sliding_window", "layer_types")
    bias = config.flag("attention_bias")
    attention = plain_attention(config, qkv_bias=bias, output_bias=bias)
    ffn = DenseFfn(config.count("intermediate_size"), config.flag("mlp_bias"))
    return Family(attention, plain_layers(config, ffn), read_rope(config, attention.head_dim), activation=act(config))


def mistral(config: Fields) -> Family:
    """Read Mistral and Ministral, whose `layer_types` alternate windows. An absent window is 4,096; null is none."""
    config.refuse(*EXPERT_FIELDS, *_CAPS, "attention_bias", "mlp_bias")
    attention = plain_attention(config)
    window = config.optional_count("sliding_window", 4096)
    windows = windows_of(config, window, [window] * config.count("num_hidden_layers"))
    layers = plain_layers(config, DenseFfn(config.count("intermediate_size")), windows)
    return Family(attention, layers, read_rope(config, attention.head_dim), activation=act(config))


def qwen2(config: Fields) -> Family:
    """Read Qwen 2 and 2.5: biases on queries, keys and values."""
    config.refuse(*EXPERT_FIELDS, *_CAPS, "attention_bias", "mlp_bias")
    attention = plain_attention(config, qkv_bias=True)
    layers = plain_layers(config, DenseFfn(config.count("intermediate_size")), qwen_windows(config))
    return Family(attention, layers, read_rope(config, attention.head_dim), activation=act(config))


def qwen3(config: Fields) -> Family:
    """Read Qwen 3: queries and keys normalised per head."""
    config.refuse(*EXPERT_FIELDS, *_CAPS, "mlp_bias")
    bias = config.flag("attention_bias")
    attention = plain_attention(config, head_dim=128, qkv_bias=bias, output_bias=bias, head_norms=True)
    layers = plain_layers(config, DenseFfn(config.count("intermediate_size")), qwen_windows(config))
    return Family(attention, layers, read_rope(config, attention.head_dim), activation=act(config))


def phi3(config: Fields) -> Family:
    """Read Phi-3 and Phi-4-mini: fused projections, longrope, a part of each head rotated."""
    config.refuse(*EXPERT_FIELDS, *_CAPS, "attention_bias", "mlp_bias")
    attention = plain_attention(config)
    parameters = shared_parameters(config)
    if parameters.get("rope_type", parameters.get("type")) == "yarn":  # the first release's name of longrope
        parameters = {**parameters, "rope_type": "longrope"}
    theta = config.number("rope_theta", 10000.0)
    rope = rope_of(config, parameters, attention.head_dim, theta=theta, partial=True)
    windows = [config.optional_count("sliding_window")] * config.count("num_hidden_layers")
    layers = plain_layers(config, DenseFfn(config.count("intermediate_size")), windows)
    return Family(attention, layers, rope, activation=act(config), rms_eps=1e-5)


def gemma2(config: Fields) -> Family:
    """Read Gemma 2: softcaps, a window in every other layer, norms before and after each part."""
    window = config.optional_count("sliding_window", 4096)
    count = config.count("num_hidden_layers")
    windows = windows_of(config, window, [None if i % 2 else window for i in range(count)])
    attention = gemma_attention(config, cap=50.0)
    layers = plain_layers(config, DenseFfn(config.count("intermediate_size")), windows)
    return gemma(config, attention, layers, (read_rope(config, attention.head_dim),), final_cap=30.0)


def gemma3(config: Fields) -> Family:
    """Read Gemma 3's text model: windowed layers have their own rotary base, queries and keys have norms per head."""
    window, count = config.optional_count("sliding_window", 4096), config.count("num_hidden_layers")
    pattern = config.count("sliding_window_pattern", 6)
    windows = windows_of(config, window, [window if (i + 1) % pattern else None for i in range(count)])
    attention = gemma_attention(config, cap=None, head_norms=True)
    ropes = gemma3_ropes(config, attention.head_dim)
    ffn = DenseFfn(config.count("intermediate_size"))
    sliding = sliding_flags(config, [w is not None for w in windows])
    layers = tuple(LayerSpec(ffn, w, rope=int(s)) for w, s in zip(windows, sliding, strict=True))
    config.refuse("attn_logit_softcapping")
    return gemma(config, attention, layers, ropes, final_cap=None)


def gemma3_ropes(config: Fields, head_dim: int) -> tuple[Rope, Rope]:
    """Read the rotary positions of Gemma 3's full and windowed layers. `rope_scaling` applies to full layers only.

    Raises:
        CheckpointError: the config has values that transformers ignores for this family.
    """
    parameters = given_parameters(config)
    whole: Mapping[str, Any] = parameters
    local: Mapping[str, Any] = {}
    if config.config.get("rope_parameters"):
        inner = Fields(parameters, config.where)
        whole, local = inner.mapping("full_attention"), inner.mapping("sliding_attention")
        unknown = parameters.keys() - {"full_attention", "sliding_attention"}
        if unknown:
            raise CheckpointError(
                f"{config.where}: rope_parameters has {min(unknown)!r}; for {config.architecture} they stand under "
                "full_attention and sliding_attention"
            )
    elif "type" in whole and "rope_type" not in whole:
        raise config.wrong("rope_scaling", dict(whole), f"one with rope_type for {config.architecture}, not type")
    if "truncate" in whole and whole["truncate"] is not True:
        raise config.wrong("truncate", whole["truncate"], f"true for {config.architecture}")
    theta, local_theta = config.number("rope_theta", 1e6), config.number("rope_local_base_freq", 10000.0)
    return (
        rope_of(config, whole, head_dim, theta=theta, of_a_kind=True),
        rope_of(config, local, head_dim, theta=local_theta, of_a_kind=True),
    )


def mixtral(config: Fields) -> Family:
    """Read Mixtral: experts in every layer; the weights of the chosen ones sum to one."""
    config.refuse(*_CAPS, "attention_bias", "mlp_bias")
    attention = plain_attention(config)
    routing = Routing(num_experts(config, 8), config.count("num_experts_per_tok", 2), normalised=True)
    ffn = ExpertsFfn(config.count("intermediate_size"), checked(config, routing))
    windows = [config.optional_count("sliding_window")] * config.count("num_hidden_layers")
    rope = read_rope(config, attention.head_dim, theta=1e6)
    return Family(attention, plain_layers(config, ffn, windows), rope, activation=act(config), rms_eps=1e-5)


def qwen2_moe(config: Fields) -> Family:
    """Read Qwen 1.5 and 2 with experts, including one gated expert that all tokens share."""
    config.refuse(*_CAPS, "attention_bias", "mlp_bias")
    attention = plain_attention(config, qkv_bias=config.flag("qkv_bias", True))
    count = config.count("num_hidden_layers")
    window = config.optional_count("sliding_window", 4096) if config.flag("use_sliding_window") else None
    last = config.whole("max_window_layers", 28)
    windows = windows_of(config, window, [window if i % 2 == 0 and i < last else None for i in range(count)])
    shared = config.count("shared_expert_intermediate_size", 5632)
    layers = sparse_layers(config, windows, shared_width=shared, shared_gate=True)
    return Family(attention, layers, read_rope(config, attention.head_dim), activation=act(config))


def qwen3_moe(config: Fields) -> Family:
    """Read Qwen 3 with experts."""
    config.refuse(*_CAPS, "mlp_bias")
    bias = config.flag("attention_bias")
    attention = plain_attention(config, qkv_bias=bias, output_bias=bias, head_norms=True)
    window = config.optional_count("sliding_window", 4096) if config.flag("use_sliding_window") else None
    layers = sparse_layers(config, [window] * config.count("num_hidden_layers"))
    return Family(attention, layers, read_rope(config, attention.head_dim), activation=act(config))


def deepseek_v2(config: Fields) -> Family:
    """Read DeepSeek-V2: latent attention, experts chosen greedily or within the best groups."""
    config.refuse(*_CAPS, "norm_topk_prob")
    if config.config.get("scoring_func", "softmax") != "softmax":
        raise CheckpointError(f"{config.where}: scoring_func is {config.config['scoring_func']!r}; served: softmax")
    method = config.config.get("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise CheckpointError(f"{config.where}: topk_method is {method!r}; served: greedy, group_limited_greedy")
    grouped = method == "group_limited_greedy"
    routing = Routing(
        num_experts(config, 64),
        config.count("num_experts_per_tok"),
        scale=config.number("routed_scaling_factor", 1.0),
        num_groups=config.count("n_group") if grouped else 1,
        groups_per_token=config.count("topk_group") if grouped else 1,
    )
    # Its rotary pairs are always interleaved; `rope_interleave` is a field of V3 only.
    found = Fields({**config.config, "rope_interleave": True}, config.where)
    return deepseek(found, routing, dense_layers=0, shared=2, moe_width=1407, mlp_bias=config.flag("mlp_bias"))


def deepseek_v3(config: Fields) -> Family:
    """Read DeepSeek-V3 and R1: sigmoid scores with a correction that balances the choice."""
    config.refuse(*_CAPS, "mlp_bias")
    for name, served in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")):
        if config.config.get(name, served) != served:
            raise CheckpointError(f"{config.where}: {name} is {config.config[name]!r}; served: {served}")
    routing = Routing(
        num_experts(config, 256),
        config.count("num_experts_per_tok", 8),
        scores="sigmoid",
        normalised=config.flag("norm_topk_prob", True),
        scale=config.number("routed_scaling_factor", 2.5),
        num_groups=config.count("n_group", 8),
        groups_per_token=config.count("topk_group", 4),
        correction=True,
    )
    return deepseek(config, routing, dense_layers=3, shared=1, moe_width=2048, mlp_bias=False)


def gpt_oss(config: Fields) -> Family:
    """Read gpt-oss: attention sinks, a window in every other layer, biases everywhere, experts with clamped gates."""
    config.refuse(*_CAPS, "mlp_bias")
    for name, served in (("swiglu_alpha", 1.702), ("swiglu_limit", 7.0), ("hidden_act", "silu")):
        if (found := config.config.get(name)) not in (None, served):
            raise config.wrong(name, found, str(served))
    bias, count = config.flag("attention_bias", True), config.count("num_hidden_layers")
    plain = plain_attention(config, head_dim=64, qkv_bias=bias, output_bias=bias)
    window = config.optional_count("sliding_window", 128)
    windows = windows_of(config, window, [None if i % 2 else window for i in range(count)])
    routing = Routing(
        num_experts(config, 128), config.count("num_experts_per_tok", 4), scores="softmax_of_chosen", bias=True
    )
    ffn = ExpertsFfn(config.count("intermediate_size", 2880), checked(config, routing), bias=True)
    rope = gpt_oss_rope(config, plain.head_dim)
    return Family(replace(plain, sinks=True), plain_layers(config, ffn, windows), rope, "clamped_swiglu", rms_eps=1e-5)


FAMILIES: dict[str, Callable[[Fields], Family]] = {
    "LlamaForCausalLM": llama,
    "MistralForCausalLM": mistral,
    "MinistralForCausalLM": mistral,
    "Qwen2ForCausalLM": qwen2,
    "Qwen3ForCausalLM": qwen3,
    "Gemma2ForCausalLM": gemma2,
    "Gemma3ForCausalLM": gemma3,
    "Phi3ForCausalLM": phi3,
    "MixtralForCausalLM": mixtral,
    "Qwen2MoeForCausalLM": qwen2_moe,
    "Qwen3MoeForCausalLM": qwen3_moe,
    "Qwen3NextForCausalLM": qwen3_next,
    "Qwen3_5ForCausalLM": qwen3_5,
    "Qwen3_5ForConditionalGeneration": qwen3_5,
    "Qwen3_5MoeForCausalLM": qwen3_5_moe,
    "Qwen3_5MoeForConditionalGeneration": qwen3_5_moe,
    "DeepseekV2ForCausalLM": deepseek_v2,
    "DeepseekV3ForCausalLM": deepseek_v3,
    "GptOssForCausalLM": gpt_oss,
}
