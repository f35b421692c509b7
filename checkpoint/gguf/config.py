"""Converts GGUF metadata to the config.json that Hugging Face has for the same model. Knows no tensor's numbers.

Values of a family that GGUF does not store (Gemma's attention scale, DeepSeek's groups) are here. Every key of the
architecture is read, known to have no effect, or refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...core.errors import CheckpointError
from .file import GgufFile
from .keys import Keys, heads_of
from .rope import read_rope
from .special_ids import beginning_id, end_ids

_GATING_SOFTMAX, _GATING_SIGMOID, _GATING_SOFTMAX_OF_CHOSEN = 1, 2, 3
_PLAIN_ROUTING = {
    "expert_gating_func": _GATING_SOFTMAX,
    "expert_weights_scale": 1.0,
    "expert_group_count": 1,
    "expert_group_used_count": 1,
}


def read_config(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the contents of config.json and generation_config.json for a file.

    Raises:
        CheckpointError: the file is damaged, or its model is not supported; names key and remedy.
    """
    file = GgufFile(path)
    if file.architecture not in _BUILDERS:
        raise CheckpointError(
            f"{path}: general.architecture {file.architecture!r} is not served; served: {', '.join(_BUILDERS)} "
            "(Mistral and Mixtral are 'llama' there)"
        )
    keys = Keys(file)
    config = _BUILDERS[file.architecture](keys)
    keys.check_all_read()
    return config, {"eos_token_id": list(end_ids(file))}


# ------------------------------------------------------------------ what all have


def _base(keys: Keys, name: str, *, head_dim: bool = True) -> dict[str, Any]:
    tensors = keys.file.tensors
    if "token_embd.weight" not in tensors:
        raise CheckpointError(f"{keys.file.path} lacks token_embd.weight; a file of a vocabulary alone is no model")
    heads = heads_of(keys.file)
    keys.number("attention.head_count"), keys.number("attention.head_count_kv", 0)
    config = {
        "architectures": [name],
        "hidden_size": keys.number("embedding_length"),
        "num_hidden_layers": keys.number("block_count"),
        "intermediate_size": keys.number("feed_forward_length"),
        "num_attention_heads": heads.queries,
        "num_key_value_heads": heads.keys,
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": keys.number("context_length"),
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": beginning_id(keys.file),
        # float32 only if all matrices are; quantised and half types count as bfloat16, like float16 in safetensors.
        "torch_dtype": "bfloat16" if any(t.kind for t in tensors.values() if len(t.shape) > 1) else "float32",
    }
    if head_dim:
        config["head_dim"] = _head_dim(keys, config["hidden_size"] // heads.queries)
    return config


def _head_dim(keys: Keys, default: int) -> int:
    width: int = keys.number("attention.key_length", default)
    if keys.number("attention.value_length", width) != width:
        raise keys.wrong("attention.value_length", keys.number("attention.value_length"), f"{width}, as keys have")
    return width


def _whole_rope(keys: Keys, head_dim: int) -> None:
    """Refuse heads that are only partly rotated."""
    if keys.number("rope.dimension_count", head_dim) != head_dim:
        raise keys.wrong("rope.dimension_count", keys.number("rope.dimension_count"), f"{head_dim}, the whole head")


# ------------------------------------------------------------------ families


def _llama(keys: Keys) -> dict[str, Any]:
    """Convert Llama, Mistral (a file with windows) and Mixtral (a file with experts)."""
    config, tensors = _base(keys, "LlamaForCausalLM"), keys.file.tensors
    _whole_rope(keys, config["head_dim"])
    config["rope_scaling"] = read_rope(keys, config["head_dim"])
    window, experts = keys.optional("attention.sliding_window"), keys.optional("expert_count")
    if experts:
        keys.neutral(**_PLAIN_ROUTING)
        config |= {
            "architectures": ["MixtralForCausalLM"],
            "num_local_experts": experts,
            "num_experts_per_tok": keys.number("expert_used_count"),
            "sliding_window": window,
        }
    elif window:
        config |= {"architectures": ["MistralForCausalLM"], "sliding_window": window}
    else:
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in tensors
    return config


def _qwen2(keys: Keys) -> dict[str, Any]:
    config = _base(keys, "Qwen2ForCausalLM")
    _whole_rope(keys, config["head_dim"])
    return {**config, "rope_scaling": read_rope(keys, config["head_dim"])}


def _qwen3(keys: Keys) -> dict[str, Any]:
    config = {**_qwen2(keys), "architectures": ["Qwen3ForCausalLM"]}
    return {**config, "attention_bias": "blk.0.attn_q.bias" in keys.file.tensors}


def _qwen_experts(keys: Keys) -> dict[str, Any]:
    """Common part of both Qwen families with experts."""
    config, tensors = _qwen2(keys), keys.file.tensors
    keys.neutral(**_PLAIN_ROUTING)
    experts = tensors.get("blk.0.ffn_gate_exps.weight")
    width = keys.optional("expert_feed_forward_length") or (experts.shape[-2] if experts else None)
    dense = [i for i in range(config["num_hidden_layers"]) if f"blk.{i}.ffn_gate_inp.weight" not in tensors]
    return {
        **config,
        "num_experts": keys.number("expert_count"),
        "num_experts_per_tok": keys.number("expert_used_count"),
        "moe_intermediate_size": width,
        "mlp_only_layers": dense,
        "decoder_sparse_step": 1,
    }


def _qwen2_moe(keys: Keys) -> dict[str, Any]:
    shared = keys.file.tensors.get("blk.0.ffn_up_shexp.weight")
    width = keys.optional("expert_shared_feed_forward_length") or (shared.shape[0] if shared else None)
    return {
        **_qwen_experts(keys),
        "architectures": ["Qwen2MoeForCausalLM"],
        "shared_expert_intermediate_size": width,
        "norm_topk_prob": keys.flag("expert_weights_norm", False),
        "qkv_bias": "blk.0.attn_q.bias" in keys.file.tensors,
    }


def _qwen3_moe(keys: Keys) -> dict[str, Any]:
    return {
        **_qwen_experts(keys),
        "architectures": ["Qwen3MoeForCausalLM"],
        "norm_topk_prob": keys.flag("expert_weights_norm", True),
        "attention_bias": "blk.0.attn_q.bias" in keys.file.tensors,
    }


def _gemma(keys: Keys, name: str, *, largest: int) -> dict[str, Any]:
    """Common part of Gemma 2 and 3. `largest`: layers of the 27B model, which scales queries by hidden_size / heads."""
    config = _base(keys, name)
    heads, width = config["num_attention_heads"], config["head_dim"]
    _whole_rope(keys, width)
    scaled_by = config["hidden_size"] // heads if config["num_hidden_layers"] == largest else width
    if keys.has("attention.scale"):
        scaled_by = keys.number("attention.scale") ** -2.0
    return {
        **config,
        "query_pre_attn_scalar": scaled_by,
        "attention_bias": "blk.0.attn_q.bias" in keys.file.tensors,
        "attn_logit_softcapping": keys.optional("attn_logit_softcapping"),
        "final_logit_softcapping": keys.optional("final_logit_softcapping"),
    }


def _gemma2(keys: Keys) -> dict[str, Any]:
    config = _gemma(keys, "Gemma2ForCausalLM", largest=46)
    config["sliding_window"] = keys.number("attention.sliding_window", 4096)
    _pattern(keys, 2)
    return {**config, "rope_scaling": read_rope(keys, config["head_dim"])}


def _gemma3(keys: Keys) -> dict[str, Any]:
    config, window = _gemma(keys, "Gemma3ForCausalLM", largest=62), keys.optional("attention.sliding_window")
    local = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base_swa", 10000.0)}
    rope = {**read_rope(keys, config["head_dim"]), "rope_theta": keys.number("rope.freq_base", 1e6)}
    return {
        **config,
        "sliding_window": window,
        "sliding_window_pattern": _pattern(keys, 6) if window else 1,
        "rope_parameters": {"full_attention": rope, "sliding_attention": local},
    }


def _pattern(keys: Keys, served: int) -> int:
    """Distance between layers with full attention, in layers."""
    found: int = keys.number("attention.sliding_window_pattern", served)
    if served == 2 and found != served:
        raise keys.wrong("attention.sliding_window_pattern", found, str(served))
    return found


def _phi3(keys: Keys) -> dict[str, Any]:
    config = _base(keys, "Phi3ForCausalLM")
    head_dim = config["head_dim"]
    width = keys.number("rope.dimension_count", head_dim)
    rope = read_rope(keys, width)
    if width != head_dim:
        rope["partial_rotary_factor"] = math.nextafter(width / head_dim, 1.0)  # int(factor * head_dim) == width
    original = rope.pop("original_max_position_embeddings", None)
    config |= {"original_max_position_embeddings": original} if original else {}
    return {**config, "rope_scaling": rope, "sliding_window": keys.optional("attention.sliding_window")}


def _deepseek2(keys: Keys) -> dict[str, Any]:
    """Convert DeepSeek-V2, or V3 and R1 if experts have sigmoid scores."""
    config = _base(keys, "DeepseekV2ForCausalLM", head_dim=False)
    rope_width = keys.number("rope.dimension_count")
    keys.number("attention.key_length"), keys.number("attention.value_length")  # in newer files: sizes in the cache
    key_length = keys.number("attention.key_length_mla", keys.number("attention.key_length"))
    corrected = any(name.endswith("exp_probs_b.bias") for name in keys.file.tensors)  # only in V3
    gating = keys.optional("expert_gating_func") or (_GATING_SIGMOID if corrected else _GATING_SOFTMAX)
    if gating not in (_GATING_SOFTMAX, _GATING_SIGMOID):
        raise keys.wrong("expert_gating_func", gating, "1 (softmax), 2 (sigmoid)")
    experts = keys.number("expert_count")
    groups, chosen = _groups(keys, experts, gating)
    config |= {
        "num_key_value_heads": config["num_attention_heads"],
        "q_lora_rank": keys.optional("attention.q_lora_rank"),
        "kv_lora_rank": keys.number("attention.kv_lora_rank"),
        "qk_rope_head_dim": rope_width,
        "qk_nope_head_dim": key_length - rope_width,
        "v_head_dim": keys.number("attention.value_length_mla", keys.number("attention.value_length")),
        "n_routed_experts": experts,
        "num_experts_per_tok": keys.number("expert_used_count"),
        "n_shared_experts": keys.number("expert_shared_count", 0),
        "moe_intermediate_size": keys.number("expert_feed_forward_length"),
        "first_k_dense_replace": keys.number("leading_dense_block_count", 0),
        "routed_scaling_factor": keys.optional("expert_weights_scale") or 1.0,
        "norm_topk_prob": keys.flag("expert_weights_norm", False),
        "n_group": groups,
        "topk_group": chosen,
        "topk_method": "group_limited_greedy" if groups > 1 else "greedy",
        "attention_bias": "blk.0.attn_kv_a_mqa.bias" in keys.file.tensors,
        "rope_scaling": read_rope(keys, rope_width),
    }
    if gating == _GATING_SIGMOID:
        config |= {"architectures": ["DeepseekV3ForCausalLM"], "topk_method": "noaux_tc"}
    return config


def _gpt_oss(keys: Keys) -> dict[str, Any]:
    """Convert gpt-oss. Its corners of YaRN are not rounded, which files do not say."""
    config = _base(keys, "GptOssForCausalLM")
    _whole_rope(keys, config["head_dim"])
    gating = keys.number("expert_gating_func", _GATING_SOFTMAX_OF_CHOSEN)
    if gating not in (0, _GATING_SOFTMAX_OF_CHOSEN):
        raise keys.wrong("expert_gating_func", gating, f"{_GATING_SOFTMAX_OF_CHOSEN} (softmax of the chosen)")
    keys.neutral(**{name: value for name, value in _PLAIN_ROUTING.items() if name != "expert_gating_func"})
    _pattern(keys, 2)
    rope = read_rope(keys, config["head_dim"])
    return {
        **config,
        "intermediate_size": keys.number("expert_feed_forward_length", config["intermediate_size"]),
        "num_local_experts": keys.number("expert_count"),
        "num_experts_per_tok": keys.number("expert_used_count"),
        "sliding_window": keys.number("attention.sliding_window"),
        "attention_bias": "blk.0.attn_q.bias" in keys.file.tensors,
        "rope_scaling": {**rope, "truncate": False} if rope["rope_type"] == "yarn" else rope,
    }


def _groups(keys: Keys, experts: int, gating: int) -> tuple[int, int]:
    """Number of expert groups, and groups per token. For files before 2025, which lack them: the releases' values."""
    left_out = {(160, _GATING_SOFTMAX): (8, 3), (256, _GATING_SIGMOID): (8, 4)}.get((experts, gating), (1, 1))
    groups = keys.optional("expert_group_count") or left_out[0]
    return groups, keys.optional("expert_group_used_count") or (left_out[1] if groups == left_out[0] else groups)


_BUILDERS: dict[str, Callable[[Keys], dict[str, Any]]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "qwen2moe": _qwen2_moe,
    "qwen3moe": _qwen3_moe,
    "deepseek2": _deepseek2,
    "gpt-oss": _gpt_oss,
}
