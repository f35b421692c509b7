"""Converts the trained network's weights and sizes to Hugging Face's names. Knows no file."""

import torch
from torch import Tensor

from .network import Block, Network, Shape


def hugging_face_weights(network: Network) -> dict[str, Tensor]:
    """Weights under Hugging Face's names, with separate projections and without the tied output matrix."""
    weights = {"model.embed_tokens.weight": network.embedding.weight, "model.norm.weight": network.norm.weight}
    for index, block in enumerate(network.blocks):
        assert isinstance(block, Block)
        prefix = f"model.layers.{index}"
        q, k, v = torch.split(block.qkv.weight, list(block.sizes))
        gate, up = block.gate_up.weight.chunk(2)
        weights |= {
            f"{prefix}.input_layernorm.weight": block.attention_norm.weight,
            f"{prefix}.post_attention_layernorm.weight": block.ffn_norm.weight,
            f"{prefix}.self_attn.q_proj.weight": q,
            f"{prefix}.self_attn.k_proj.weight": k,
            f"{prefix}.self_attn.v_proj.weight": v,
            f"{prefix}.self_attn.o_proj.weight": block.out.weight,
            f"{prefix}.mlp.gate_proj.weight": gate,
            f"{prefix}.mlp.up_proj.weight": up,
            f"{prefix}.mlp.down_proj.weight": block.down.weight,
        }
    return {name: weight.detach().clone().contiguous() for name, weight in weights.items()}


def from_hugging_face(weights: dict[str, Tensor], shape: Shape) -> dict[str, Tensor]:
    """State of a `Network` from weights under Hugging Face's names; the inverse of `hugging_face_weights`."""
    state = {"embedding.weight": weights["model.embed_tokens.weight"], "norm.weight": weights["model.norm.weight"]}
    for index in range(shape.num_layers):
        theirs, ours = f"model.layers.{index}", f"blocks.{index}"
        attention = [weights[f"{theirs}.self_attn.{name}_proj.weight"] for name in "qkv"]
        state |= {
            f"{ours}.attention_norm.weight": weights[f"{theirs}.input_layernorm.weight"],
            f"{ours}.ffn_norm.weight": weights[f"{theirs}.post_attention_layernorm.weight"],
            f"{ours}.qkv.weight": torch.cat(attention),
            f"{ours}.out.weight": weights[f"{theirs}.self_attn.o_proj.weight"],
            f"{ours}.gate_up.weight": torch.cat(
                [weights[f"{theirs}.mlp.{name}_proj.weight"] for name in ("gate", "up")]
            ),
            f"{ours}.down.weight": weights[f"{theirs}.mlp.down_proj.weight"],
        }
    return state


def hugging_face_config(shape: Shape, *, context_tokens: int, bos: int, eos: int, pad: int) -> dict[str, object]:
    """Contents of config.json of the exported model."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "max_position_embeddings": context_tokens,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": pad,
    }
