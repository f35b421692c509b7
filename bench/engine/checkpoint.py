"""The reference checkpoint: random weights of the reference shape from a fixed seed, in Hugging Face's format.

Written once into `<folder>/hf`; `to_gguf.py` makes the same numbers readable for llama.cpp and OpenVINO. The tokenizer
is a valid byte-level BPE without a meaning: prompts are ids, but every engine wants to load one.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

SEED = 20261120
HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCABULARY = 1024, 16, 16, 8, 64, 2816, 32_000
STD = 0.02
SPECIALS = ("<unk>", "<s>", "</s>")
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "intermediate_size": FFN,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}


def ensure(folder: Path) -> Path:
    """Write the checkpoint where it is not yet whole; returns its folder."""
    target = folder / "hf"
    if (target / "model.safetensors").exists():
        return target
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(json.dumps(CONFIG, indent=1))
    (target / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    (target / "tokenizer.json").write_text(json.dumps(tokenizer()))
    (target / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "unk_token": SPECIALS[0],
                "bos_token": SPECIALS[1],
                "eos_token": SPECIALS[2],
                "model_max_length": CONFIG["max_position_embeddings"],
            }
        )
    )
    part = target / "model.part"
    save_file(tensors(), part, metadata={"format": "pt"})
    part.rename(target / "model.safetensors")  # last: its presence says that all is there
    return target


def tensors() -> dict[str, torch.Tensor]:
    """All weights in bf16; norms are not all one, so that a norm that is skipped shows."""
    generator = torch.Generator().manual_seed(SEED)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * STD).to(torch.bfloat16)

    def norm() -> torch.Tensor:
        return (torch.rand(HIDDEN, generator=generator) + 0.5).to(torch.bfloat16)

    all_of_them = {
        "model.embed_tokens.weight": matrix(VOCABULARY, HIDDEN),
        "model.norm.weight": norm(),
        "lm_head.weight": matrix(VOCABULARY, HIDDEN),
    }
    for layer in range(LAYERS):
        all_of_them |= {
            f"model.layers.{layer}.{name}": value
            for name, value in {
                "input_layernorm.weight": norm(),
                "self_attn.q_proj.weight": matrix(HEADS * HEAD_DIM, HIDDEN),
                "self_attn.k_proj.weight": matrix(KV_HEADS * HEAD_DIM, HIDDEN),
                "self_attn.v_proj.weight": matrix(KV_HEADS * HEAD_DIM, HIDDEN),
                "self_attn.o_proj.weight": matrix(HIDDEN, HEADS * HEAD_DIM),
                "post_attention_layernorm.weight": norm(),
                "mlp.gate_proj.weight": matrix(FFN, HIDDEN),
                "mlp.up_proj.weight": matrix(FFN, HIDDEN),
                "mlp.down_proj.weight": matrix(HIDDEN, FFN),
            }.items()
        }
    return all_of_them


def tokenizer() -> dict[str, Any]:
    """A byte-level BPE: the bytes, then as many pairs of bytes as the vocabulary has room for."""
    letters = byte_letters()
    pairs = list(product(letters, letters))[: VOCABULARY - len(SPECIALS) - len(letters)]
    tokens = [*SPECIALS, *letters, *(left + right for left, right in pairs)]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": place, "content": content, "special": True}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            for place, content in enumerate(SPECIALS)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: place for place, token in enumerate(tokens)},
            "merges": [[left, right] for left, right in pairs],
        },
    }


def byte_letters() -> list[str]:
    """A printable letter for every byte, as byte-level BPE has them: itself, or one from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in printable)
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + place) for place, byte in enumerate(others)}
    return [letters[byte] for byte in range(256)]
