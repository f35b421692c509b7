"""A tiny random checkpoint of every family and feature that we serve, saved by transformers."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

VOCAB = 160


@dataclass(frozen=True)
class TinyFamily:
    """A config class of transformers, what it is asked for, and how."""

    name: str
    config: str
    fields: dict[str, Any] = field(default_factory=dict)
    shard_size: str = "1GB"
    served_len: int | None = None  # max_model_len, where angles depend on it


def _moe(**more: Any) -> dict[str, Any]:
    return {"moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2, **more}


def _mla(**more: Any) -> dict[str, Any]:
    return {
        "num_key_value_heads": 4,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 12,
        "qk_rope_head_dim": 8,
        "v_head_dim": 20,
        "moe_intermediate_size": 24,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "first_k_dense_replace": 1,
        **more,
    }


def _hybrid(**more: Any) -> dict[str, Any]:
    """Unlike numbers of key and value heads, unlike widths, and two layers of each kind."""
    return {
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 6,
        "linear_key_head_dim": 12,
        "linear_value_head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        **more,
    }


def _rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


_SHARED = {"shared_expert_intermediate_size": 40}
_SLIDES = ["sliding_attention", "full_attention", "sliding_attention"]
_LONG = {"short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5], "long_factor": [1.5, 2.0, 3.0, 4.0, 6.0, 8.0]}
_PHI = {"head_dim": 16, "partial_rotary_factor": 0.75, "max_position_embeddings": 512}
_YARN = {"factor": 8.0, "original_max_position_embeddings": 64, "beta_fast": 16.0, "beta_slow": 2.0}

_OSS = {
    "head_dim": 16,
    "intermediate_size": 32,
    "sliding_window": 20,
    "rope_parameters": {
        **{"rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0},
        **{"truncate": False, "original_max_position_embeddings": 16},
    },
}

FAMILIES = [
    TinyFamily("llama-biases", "LlamaConfig", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    TinyFamily(
        "llama-llama3",
        "LlamaConfig",
        _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
        shard_size="40KB",
    ),
    TinyFamily("llama-linear", "LlamaConfig", {**_rope("linear", factor=4.0), "num_key_value_heads": 1}),
    TinyFamily("llama-dynamic-short", "LlamaConfig", _rope("dynamic", factor=4.0), served_len=400),
    TinyFamily("llama-yarn", "LlamaConfig", _rope("yarn", **_YARN)),
    TinyFamily("llama-yarn-factor", "LlamaConfig", _rope("yarn", **_YARN, attention_factor=1.3, truncate=False)),
    TinyFamily("mistral", "MistralConfig", {"sliding_window": 40}),
    TinyFamily("mistral-null", "MistralConfig", {"sliding_window": None, "head_dim": 24}),
    TinyFamily("ministral", "MinistralConfig", {"sliding_window": 20, "layer_types": _SLIDES, "head_dim": 16}),
    TinyFamily("qwen2", "Qwen2Config", {"sliding_window": 20}),
    TinyFamily(
        "qwen2-windows", "Qwen2Config", {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}
    ),
    TinyFamily("qwen3", "Qwen3Config", {"head_dim": 24, "attention_bias": True}),
    TinyFamily(
        "qwen3-windows",
        "Qwen3Config",
        {"head_dim": 16, "use_sliding_window": True, "sliding_window": 20, "layer_types": _SLIDES},
    ),
    TinyFamily(
        "gemma2",
        "Gemma2Config",
        {
            "head_dim": 24,
            "sliding_window": 20,
            "query_pre_attn_scalar": 10,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 4.0,
        },
    ),
    TinyFamily("gemma2-biases", "Gemma2Config", {"head_dim": 16, "attention_bias": True, "layer_types": _SLIDES}),
    TinyFamily(
        "gemma3",
        "Gemma3TextConfig",
        {
            "head_dim": 24,
            "sliding_window": 20,
            "query_pre_attn_scalar": 10,
            "layer_types": _SLIDES,
            "final_logit_softcapping": 4.0,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
    TinyFamily("phi3", "Phi3Config", {"sliding_window": 40}),
    TinyFamily(
        "phi3-longrope-short",
        "Phi3Config",
        {**_PHI, "original_max_position_embeddings": 320, **_rope("longrope", partial_rotary_factor=0.75, **_LONG)},
        served_len=320,
    ),
    TinyFamily("mixtral", "MixtralConfig", {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 40}),
    TinyFamily(
        "qwen2-moe",
        "Qwen2MoeConfig",
        _moe(shared_expert_intermediate_size=40, norm_topk_prob=False, decoder_sparse_step=2),
    ),
    TinyFamily(
        "qwen2-moe-windows",
        "Qwen2MoeConfig",
        _moe(
            shared_expert_intermediate_size=40,
            norm_topk_prob=True,
            qkv_bias=False,
            use_sliding_window=True,
            sliding_window=20,
            max_window_layers=2,
        ),
    ),
    TinyFamily(
        "qwen3-moe", "Qwen3MoeConfig", _moe(head_dim=16, norm_topk_prob=True, mlp_only_layers=[1], attention_bias=True)
    ),
    TinyFamily("qwen3-moe-windows", "Qwen3MoeConfig", _moe(head_dim=16, use_sliding_window=True, sliding_window=20)),
    TinyFamily(
        "deepseek-v2",
        "DeepseekV2Config",
        _mla(
            topk_method="group_limited_greedy",
            n_group=4,
            topk_group=2,
            routed_scaling_factor=1.7,
            n_shared_experts=2,
            attention_bias=True,
            **_rope("yarn", **_YARN, mscale=0.7, mscale_all_dim=0.9),
        ),
    ),
    TinyFamily("deepseek-v2-lite", "DeepseekV2Config", _mla(q_lora_rank=None, topk_method="greedy", mlp_bias=True)),
    TinyFamily(
        "deepseek-v3",
        "DeepseekV3Config",
        _mla(
            n_group=4,
            topk_group=2,
            n_shared_experts=1,
            **_rope("yarn", **_YARN, mscale=1.0, mscale_all_dim=1.0),
        ),
    ),
    TinyFamily(
        "deepseek-v3-plain",
        "DeepseekV3Config",
        _mla(q_lora_rank=None, n_group=2, topk_group=1, norm_topk_prob=False, rope_interleave=False),
    ),
    TinyFamily("gpt-oss", "GptOssConfig", {**_OSS, "num_local_experts": 6, "num_experts_per_tok": 3}),
    TinyFamily(
        "gpt-oss-plain",
        "GptOssConfig",
        {
            **_OSS,
            **_rope("default"),
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "attention_bias": False,
            "layer_types": ["full_attention", "full_attention", "sliding_attention"],
        },
    ),
    TinyFamily("qwen3-next", "Qwen3NextConfig", _hybrid(**_moe(**_SHARED), mlp_only_layers=[1])),
    TinyFamily("qwen3.5", "Qwen3_5TextConfig", _hybrid(attention_bias=True, linear_conv_kernel_dim=3)),
    TinyFamily("qwen3.5-moe", "Qwen3_5MoeTextConfig", _hybrid(**_moe(**_SHARED), linear_key_head_dim=16)),
]


def write_family(family: TinyFamily, directory: Path) -> None:
    """Save a random model: norms away from one, biases and sinks away from zero, scores of experts far apart."""
    import transformers

    fields = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.15,
        "tie_word_embeddings": False,
        "eos_token_id": 1,
        "bos_token_id": 0,
        "pad_token_id": None,
        "dtype": "float32",
    }
    config = getattr(transformers, family.config)(**{**fields, **family.fields})
    torch.manual_seed(11)
    model = transformers.AutoModelForCausalLM.from_config(config)
    centre = 0.0 if family.config.startswith(("Gemma", "Qwen3Next", "Qwen3_5")) else 1.0
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in name:
                tensor.uniform_(centre - 0.5, centre + 0.5)
            elif name.endswith("e_score_correction_bias"):
                tensor.uniform_(-0.3, 0.3)
            elif name.endswith("bias"):
                tensor.uniform_(-0.5, 0.5)
            elif name.endswith("sinks"):
                tensor.uniform_(-2.0, 3.0)
            elif name.endswith("experts.gate_up_proj") and family.config == "GptOssConfig":
                tensor.mul_(2.5)  # so that some gates are clamped
            elif name.endswith(("mlp.gate.weight", "mlp.router.weight", "shared_expert_gate.weight")):
                tensor.normal_(0.0, 0.4)
            elif name.endswith("A_log"):
                tensor.uniform_(-4.0, 1.0)  # from slow to fast forgetting
            elif name.endswith("conv1d.weight"):
                tensor.normal_(0.0, 0.5)
    model.save_pretrained(directory, max_shard_size=family.shard_size)
