"""Writes a trained network as a folder in Hugging Face's format, and reads it back. Knows no training state."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from .network import Network, Shape
from .tokenizer import BOS, CONTEXT_TOKENS, END, EOS, PAD, special_id, write_tokenizer
from .weights import from_hugging_face, hugging_face_config, hugging_face_weights


def export_model(network: Network, tokenizer: Tokenizer, folder: Path) -> None:
    """Write config, generation config, bfloat16 weights and tokenizer into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    bos, eos, pad, end = (special_id(tokenizer, token) for token in (BOS, EOS, PAD, END))
    config = hugging_face_config(network.shape, context_tokens=CONTEXT_TOKENS, bos=bos, eos=eos, pad=pad)
    _write_json(folder / "config.json", config)
    generation = {"bos_token_id": bos, "eos_token_id": [eos, end], "pad_token_id": pad}
    _write_json(folder / "generation_config.json", generation)
    weights = {name: weight.to(torch.bfloat16) for name, weight in hugging_face_weights(network).items()}
    partial = folder / "model.safetensors.partial"
    save_file(weights, partial, metadata={"format": "pt"})
    partial.chmod(0o644)
    partial.replace(folder / "model.safetensors")  # atomic: readers never see a partial file
    write_tokenizer(tokenizer, folder)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def load_network(folder: Path) -> Network:
    """Load the network of an exported folder; its bfloat16 weights become float32."""
    config = json.loads((folder / "config.json").read_text())
    shape = Shape(
        vocab_size=config["vocab_size"],
        hidden=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        ffn=config["intermediate_size"],
        rope_theta=config["rope_theta"],
        norm_eps=config["rms_norm_eps"],
    )
    network = Network(shape)
    weights = {name: weight.float() for name, weight in load_file(folder / "model.safetensors").items()}
    network.load_state_dict(from_hugging_face(weights, shape))
    return network.eval()
