"""The reference checkpoint as GGUF: bf16, float16 (for readers without bf16), Q8_0, Q4_0. Runs where `gguf` is.

python to_gguf.py CHECKPOINT_FOLDER
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}


def main() -> None:
    """Write both files beside the checkpoint."""
    folder = Path(sys.argv[1])
    for name, kind in (("bf16", Kind.BF16), ("f16", Kind.F16), ("q8_0", Kind.Q8_0), ("q4_0", Kind.Q4_0)):
        target = folder / f"{name}.gguf"
        if not target.exists():
            part = folder / f"{name}.part"
            write(folder / "hf", part, kind)
            part.rename(target)


def write(checkpoint: Path, target: Path, kind: Kind) -> None:
    """One file: matrices in `kind`, norms in float32."""
    config = json.loads((checkpoint / "config.json").read_text())
    writer = gguf.GGUFWriter(target, "llama")
    _describe(writer, config, kind)
    _add_tokenizer(writer, json.loads((checkpoint / "tokenizer.json").read_text()), config)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, stored in tensors(checkpoint / "model.safetensors"):
        part = name.split(".")[-2]
        bits = interleaved(stored, heads[part]) if part in heads else stored
        if bits.ndim == 1:
            writer.add_tensor(gguf_name(name), widened(bits))
        elif kind is Kind.BF16:
            writer.add_tensor(gguf_name(name), bits.view(np.uint8), raw_dtype=kind)
        elif kind is Kind.F16:
            writer.add_tensor(gguf_name(name), widened(bits).astype(np.float16))
        else:
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(widened(bits), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(writer: gguf.GGUFWriter, config: dict[str, Any], kind: Kind) -> None:
    writer.add_name("reference")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind.name}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: dict[str, Any], config: dict[str, Any]) -> None:
    vocabulary = tokenizer["model"]["vocab"]
    special = {entry["id"] for entry in tokenizer["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(vocabulary, key=vocabulary.__getitem__))
    writer.add_token_types(
        [gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL for i in range(len(vocabulary))]
    )
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_unk_token_id(0)


def tensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Names and bf16 bits (as uint16) of a safetensors file."""
    whole = np.memmap(path, dtype=np.uint8, mode="r")
    length = int(whole[:8].view("<u8")[0])
    header = json.loads(bytes(whole[8 : 8 + length]))
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        assert entry["dtype"] == "BF16", name
        first, end = (8 + length + offset for offset in entry["data_offsets"])
        yield name, np.array(whole[first:end]).view(np.uint16).reshape(entry["shape"])


def gguf_name(name: str) -> str:
    """The tensor's name in a GGUF file."""
    if name in NAMES:
        return NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}"


def interleaved(bits: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a projection reordered per head: GGUF's Llama turns neighbouring dimensions, not the two halves."""
    rows, columns = bits.shape
    return np.ascontiguousarray(bits.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2)).reshape(
        rows, columns
    )


def widened(bits: np.ndarray) -> np.ndarray:
    """bf16 bits as float32 numbers."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


if __name__ == "__main__":
    main()
