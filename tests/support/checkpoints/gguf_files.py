"""Tiny GGUF files out of Hugging Face checkpoints, as the format's converter makes them; names by the gguf package."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file

ARCHITECTURES = {
    "llama": "LLAMA",
    "mistral": "LLAMA",
    "mixtral": "LLAMA",
    "qwen2": "QWEN2",
    "qwen3": "QWEN3",
    "qwen2_moe": "QWEN2MOE",
    "qwen3_moe": "QWEN3MOE",
    "gemma2": "GEMMA2",
    "gemma3_text": "GEMMA3",
    "phi3": "PHI3",
    "deepseek_v2": "DEEPSEEK2",
    "deepseek_v3": "DEEPSEEK2",
    "gpt_oss": "GPT_OSS",
}
# K-quants are quantised nowhere in Python: random blocks, with the offsets of their float16 scales.
BLOCK_SCALES = {Kind.Q2_K: (80, 82), Kind.Q3_K: (108,), Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2), Kind.Q6_K: (208,)}
Store = Callable[[np.ndarray], tuple[np.ndarray, Kind]]


def write_gguf(
    directory: Path,
    path: Path,
    kind: Kind = Kind.F32,
    *,
    metadata: Mapping[str, Any] | None = None,
    drop: tuple[str, ...] = (),
    extra: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write a checkpoint's tensors, matrices in `kind`, with `metadata` beside what its config says (None removes)."""
    config = json.loads((directory / "config.json").read_text())
    arch = gguf.MODEL_ARCH[ARCHITECTURES[config["model_type"]]]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    described = {**_described(config, gguf.MODEL_ARCH_NAMES[arch]), **_vocabulary(config["vocab_size"])}
    described |= {key.replace("ARCH", gguf.MODEL_ARCH_NAMES[arch]): value for key, value in (metadata or {}).items()}
    for key, value in described.items():
        if value is not None:
            add(writer, key, value)
    tensors = _converted(config, {n: t.float().numpy() for f in shards(directory) for n, t in load_file(f).items()})
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    for name, values in {**tensors, **(extra or {})}.items():
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias")) or name
        if theirs in drop:
            continue
        if kind is Kind.F32 or values.ndim == 1:
            writer.add_tensor(theirs, np.ascontiguousarray(values, np.float32))
        else:
            writer.add_tensor(theirs, stored(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def stored(values: np.ndarray, kind: Kind) -> np.ndarray:
    """A matrix's bytes in that type; for K-quants some random ones."""
    if kind not in BLOCK_SCALES:
        return gguf.quants.quantize(np.ascontiguousarray(values, np.float32), kind)
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(values.size)
    blocks = generator.integers(0, 256, (values.size // elements, size), dtype=np.uint8)
    for at in BLOCK_SCALES[kind]:
        scales = generator.uniform(-2e-3, 2e-3, len(blocks)).astype(np.float16)
        blocks[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(*values.shape[:-1], -1)


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _vocabulary(size: int) -> dict[str, Any]:
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["t0", "t1", "t", "1", *(f"t{i}" for i in range(4, size))],
        "tokenizer.ggml.merges": ["t 1"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }


def _described(c: Mapping[str, Any], arch: str) -> dict[str, Any]:
    """A config's fields in GGUF's keys; what only one family has, it has under keys of its own."""
    rope = c["rope_parameters"]
    rope = rope.get("full_attention", rope)
    keys = {
        "block_count": c["num_hidden_layers"],
        "context_length": c["max_position_embeddings"],
        "embedding_length": c["hidden_size"],
        "feed_forward_length": c["intermediate_size"],
        "attention.head_count": c["num_attention_heads"],
        "attention.head_count_kv": c["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": c["rms_norm_eps"],
        "attention.key_length": c.get("head_dim"),
        "attention.value_length": c.get("head_dim"),
        "attention.sliding_window": c.get("sliding_window") or None,
        "attn_logit_softcapping": c.get("attn_logit_softcapping"),
        "final_logit_softcapping": c.get("final_logit_softcapping"),
        "rope.freq_base": float(rope["rope_theta"]),
        "expert_count": c.get("num_local_experts") or c.get("num_experts") or c.get("n_routed_experts"),
        "expert_used_count": c.get("num_experts_per_tok"),
        "expert_feed_forward_length": c.get("moe_intermediate_size"),
        "expert_shared_feed_forward_length": c.get("shared_expert_intermediate_size"),
    }
    if rope["rope_type"] in ("linear", "yarn"):
        keys |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": rope["factor"]}
    if rope["rope_type"] == "yarn":
        keys["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
        for ours in ("beta_fast", "beta_slow"):
            keys["rope.scaling.yarn_" + ours] = float(rope[ours])
        if rope.get("mscale_all_dim"):
            keys["rope.scaling.yarn_log_multiplier"] = 0.1 * rope["mscale_all_dim"]
    if arch == "deepseek2":
        keys |= {
            "attention.q_lora_rank": c.get("q_lora_rank"),
            "attention.kv_lora_rank": c["kv_lora_rank"],
            "attention.head_count_kv": 1,
            "attention.key_length": c["kv_lora_rank"] + c["qk_rope_head_dim"],
            "attention.value_length": c["kv_lora_rank"],
            "attention.key_length_mla": c["qk_nope_head_dim"] + c["qk_rope_head_dim"],
            "attention.value_length_mla": c["v_head_dim"],
            "rope.dimension_count": c["qk_rope_head_dim"],
            "leading_dense_block_count": c["first_k_dense_replace"],
            "expert_shared_count": c["n_shared_experts"],
            "expert_weights_scale": float(c["routed_scaling_factor"]),
            "expert_weights_norm": bool(c.get("norm_topk_prob")),
            "expert_group_count": c.get("n_group"),
            "expert_group_used_count": c.get("topk_group"),
            "expert_gating_func": 2 if c["model_type"] == "deepseek_v3" else 1,
        }
    return {f"{arch}.{key}": value for key, value in keys.items()}


def _converted(c: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the converter does to numbers: rows turned, experts stacked, Gemma's norms plus one, MLA's way up split."""
    found: dict[str, np.ndarray] = {}
    stacks: dict[str, dict[int, np.ndarray]] = {}
    for name, values in tensors.items():
        if c["model_type"] == "gpt_oss":
            found.update(_of_gpt_oss(name, values))
        elif ".experts." in name:
            before, after = name.split(".experts.")
            number, _, part = after.partition(".")
            stacks.setdefault(f"{before}.experts.{part}", {})[int(number)] = values
        elif name.endswith("kv_b_proj.weight"):
            ups = values.reshape(c["num_attention_heads"], -1, c["kv_lora_rank"])
            keys, rest = np.split(ups, [c["qk_nope_head_dim"]], axis=1)
            found[name.replace("kv_b_proj", "k_b_proj")] = keys.swapaxes(1, 2)
            found[name.replace("kv_b_proj", "v_b_proj")] = rest
        else:
            found[name] = _turned(c, name, values)
    for name, stack in stacks.items():
        stacked = np.stack([stack[i] for i in range(len(stack))])
        mixtral = name.removeprefix("model.").replace("block_sparse_moe", "feed_forward")
        found[mixtral if "block_sparse_moe" in name else name] = stacked
    return {name.replace("correction_bias", "correction.bias"): values for name, values in found.items()}


def _of_gpt_oss(name: str, values: np.ndarray) -> dict[str, np.ndarray]:
    """Stacks with rows of outputs, gate and up apart; sinks with the ending of a matrix."""
    if name.endswith("sinks"):
        return {name + ".weight": values}
    before, _, stack = name.partition(".experts.")
    if not stack:
        return {name: values}
    stack, end = (stack.removesuffix("_bias"), ".bias") if stack.endswith("_bias") else (stack, ".weight")
    values = values if end == ".bias" else values.swapaxes(1, 2)
    parts = {stack: values} if stack == "down_proj" else {"gate_proj": values[:, ::2], "up_proj": values[:, 1::2]}
    return {f"{before}.experts.{part}{end}": np.ascontiguousarray(numbers) for part, numbers in parts.items()}


def _turned(c: Mapping[str, Any], name: str, values: np.ndarray) -> np.ndarray:
    if "gemma" in c["model_type"] and name.endswith("norm.weight"):
        return values + 1
    if name.endswith("shared_expert_gate.weight"):
        return values.reshape(-1)
    for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
        if c["model_type"] in ("llama", "mistral", "mixtral") and f".{part}." in name:
            rows = values.reshape(c[heads], 2, len(values) // c[heads] // 2, *values.shape[1:])
            return rows.swapaxes(1, 2).reshape(values.shape)
    return values
