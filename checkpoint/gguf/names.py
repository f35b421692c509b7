"""Maps Hugging Face's tensor names to GGUF's tensors, with the converter's changes to them. Knows no number.

`Piece` is the place of a Hugging Face tensor inside a GGUF tensor. The converter stacks experts, reorders ("turns") the
rows of queries and keys so that rotary pairs are neighbours (the "llama" architecture), and adds one to Gemma's norms.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from .file import StoredTensor

_BLOCK = re.compile(r"blk\.(\d+)\.(.+)\.(weight|bias)")
_WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
# The config's reader reads these tensors, the weights' loader does not.
FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
}
_FFN = {
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
}
_EXPERTS = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
_SHARED = {"ffn_gate_shexp": "gate_proj", "ffn_up_shexp": "up_proj", "ffn_down_shexp": "down_proj"}
_MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
_SANDWICH = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GPT_OSS = {"post_attention_norm": "post_attention_layernorm", "ffn_gate_inp": "mlp.router"}
_GEMMA = ("gemma2", "gemma3")


@dataclass(frozen=True, slots=True)
class Piece:
    """Place of one Hugging Face tensor in a GGUF file. `shape` is Hugging Face's."""

    stored: str  # name of the GGUF tensor
    shape: tuple[int, ...]
    expert: int | None = None  # index in the first dimension
    turned_heads: int = 0  # number of heads whose rows were reordered; 0: none
    offset: float = 0.0  # number that the converter added
    value_part: str | None = None  # second tensor: latent attention's up-projection is stored in two parts


@dataclass(frozen=True, slots=True)
class Heads:
    """Number of heads in the rows of queries and keys."""

    queries: int
    keys: int


def pieces(architecture: str, tensors: Mapping[str, StoredTensor], heads: Heads) -> dict[str, Piece]:
    """Map Hugging Face's names to pieces. A tensor without such a name keeps its own and counts as unexpected."""
    found: dict[str, Piece] = {}
    for name, tensor in tensors.items():
        if name not in FACTORS:
            found.update(_pieces_of(architecture, name, tensor.shape, heads, tensors))
    return found


def _pieces_of(
    architecture: str, name: str, shape: tuple[int, ...], heads: Heads, tensors: Mapping[str, StoredTensor]
) -> Iterator[tuple[str, Piece]]:
    offset = 1.0 if architecture in _GEMMA and name.endswith("norm.weight") else 0.0
    if name in _WHOLE:
        yield _WHOLE[name], Piece(name, shape, offset=offset)
        return
    match = _BLOCK.fullmatch(name)
    if match is None:
        yield name, Piece(name, shape)
        return
    layer, part, end = match.groups()
    at = f"model.layers.{layer}."
    if part in _EXPERTS and len(shape) == (2 if end == "bias" else 3):
        inside = _expert_name(architecture, part)
        for expert in range(shape[0]):
            yield at + inside.format(expert) + f".{end}", Piece(name, shape[1:], expert)
    elif part == "attn_k_b" and len(shape) == 3:
        value = f"blk.{layer}.attn_v_b.weight"
        beside = tensors[value].shape if value in tensors else ()
        rows = shape[0] * (shape[2] + (beside[1] if len(beside) == 3 else 0))
        yield at + "self_attn.kv_b_proj.weight", Piece(name, (rows, shape[1]), value_part=value)
    elif part == "attn_v_b" and f"blk.{layer}.attn_k_b.weight" in tensors:
        return  # part of the piece of attn_k_b
    elif part == "attn_sinks":
        yield at + "self_attn.sinks", Piece(name, shape)
    elif part == "exp_probs_b":
        yield at + "mlp.gate.e_score_correction_bias", Piece(name, shape)
    elif (theirs := _plain_name(architecture, part)) is None:
        yield name, Piece(name, shape)
    else:
        turned = {"attn_q": heads.queries, "attn_k": heads.keys}.get(part, 0) if architecture == "llama" else 0
        whole = (1, *shape) if part == "ffn_gate_inp_shexp" and len(shape) == 1 else shape
        yield f"{at}{theirs}.{end}", Piece(name, whole, turned_heads=turned, offset=offset)


def _plain_name(architecture: str, part: str) -> str | None:
    if architecture == "gpt-oss" and part in _GPT_OSS:
        return _GPT_OSS[part]
    if architecture in _GEMMA and part in _SANDWICH:
        return _SANDWICH[part]
    if architecture == "phi3" and part == "ffn_up":
        return "mlp.gate_up_proj"
    if architecture == "llama" and part == "attn_qkv":
        return None  # refused: it is unknown which rows were reordered
    if architecture == "llama" and part == "ffn_gate_inp":
        return "block_sparse_moe.gate"
    if part in _SHARED:
        return f"mlp.{'shared_experts' if architecture == 'deepseek2' else 'shared_expert'}.{_SHARED[part]}"
    old = re.fullmatch(r"(ffn_gate|ffn_up|ffn_down)\.(\d+)", part)  # one tensor per expert, in files of 2023
    if old and architecture == "llama":
        return _expert_name(architecture, old[1] + "_exps").format(old[2])
    return _ATTENTION.get(part) or _FFN.get(part)


def _expert_name(architecture: str, part: str) -> str:
    """Format string of an expert's tensor name, with a field for the expert's number."""
    inside = _EXPERTS[part]
    if architecture == "llama":
        return f"block_sparse_moe.experts.{{}}.{_MIXTRAL[inside]}"
    return f"mlp.experts.{{}}.{inside}"
