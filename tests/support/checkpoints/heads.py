"""Checkpoints of heads in their published layouts, random or always right, and a model that counts in a circle."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from twostroke.engine.config import SpeculationConfig

VOCAB, HIDDEN = 160, 64


def write_circle(source: Path, directory: Path) -> Path:
    """A Llama whose token t is followed by t + 1, and the last one by 3: its layers add nothing."""
    tensors = load_file(source / "model.safetensors")
    for name in tensors:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name].zero_()
    tensors["model.norm.weight"].fill_(1.0)
    tensors["lm_head.weight"] = after(tensors["model.embed_tokens.weight"], 1)
    save_file(tensors, directory / "model.safetensors")
    config = json.loads((source / "config.json").read_text()) | {"tie_word_embeddings": False}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def after(embedding: torch.Tensor, distance: int) -> torch.Tensor:
    """A matrix to the vocabulary [VOCAB, HIDDEN] whose largest logit of token t's embedding is `distance` after it."""
    unit = torch.nn.functional.normalize(embedding, dim=1)
    rows = torch.zeros_like(unit)
    for token in range(VOCAB):
        rows[followed(token, distance)] = unit[token] * 20
    return rows


def followed(token: int, distance: int) -> int:
    """The token that is `distance` after `token` in the circle of 3 … VOCAB - 1; 0, 1 and 2 lead into it."""
    return 3 + (token - 3 + distance) % (VOCAB - 3)


def write_medusa(directory: Path, style: str = "faster", heads: int = 3, blocks: int = 2, **more: object) -> Path:
    """Random Medusa heads. `style`: "faster", "prefixed" or "vllm". `more`: outputs, token_map, seed, vocab."""
    vocab = int(more.get("vocab", VOCAB))  # type: ignore[call-overload]
    draw = torch.Generator().manual_seed(int(more.get("seed", 1)))  # type: ignore[call-overload]
    outputs, token_map = more.get("outputs"), more.get("token_map")
    rows = vocab if token_map is None else len(token_map)  # type: ignore[arg-type]
    tensors: dict[str, torch.Tensor] = {}
    for head in range(heads):
        for block in range(blocks):
            name = f"blocks.{head}.layers.{block}" if style == "vllm" else f"{head}.{block}.linear"
            scale = 0.0 if outputs is not None else 0.1
            tensors[f"{name}.weight"] = scale * torch.randn(HIDDEN, HIDDEN, generator=draw)
            if style != "vllm":
                tensors[f"{name}.bias"] = scale * torch.randn(HIDDEN, generator=draw)
        name = f"lm_heads.{head}.weight" if style == "vllm" else f"{head}.{blocks}.weight"
        tensors[name] = torch.randn(rows, HIDDEN, generator=draw) if outputs is None else outputs[head]  # type: ignore[index]
    if token_map is not None:
        tensors["token_map"] = torch.tensor(token_map)
    if style == "prefixed":
        tensors = {f"medusa_heads.{name}": tensor for name, tensor in tensors.items()}
    if style == "vllm":
        config = {"model_type": "medusa", "num_heads": heads, "num_hidden_layers": blocks, "vocab_size": vocab}
        config |= {"architectures": ["MedusaModel"], "hidden_size": HIDDEN, "truncated_vocab_size": rows}
    else:
        config = {"medusa_num_heads": heads, "medusa_num_layers": blocks, "base_model_name_or_path": "tiny"}
    save_file(tensors, directory / ("model.safetensors" if style == "vllm" else "medusa_lm_head.safetensors"))
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def write_eagle3(directory: Path, style: str = "authors", *, knows: bool = False, **more: object) -> Path:
    """An EAGLE-3 head for a tiny Llama of 4 layers. `style`: "authors" or "speculators".

    Random; or `knows`: always right for the model of `write_circle`, from the embedding of the token behind each row.
    `more`: outputs (the head's matrix), token_map (tokens of a draft vocabulary), embedding, vocab, seed, and fields of
    its config.json.
    """
    draw = torch.Generator().manual_seed(int(more.pop("seed", 3)))  # type: ignore[call-overload]
    outputs, token_map, embedding = more.pop("outputs", None), more.pop("token_map", None), more.pop("embedding", None)
    vocab = int(more.pop("vocab", VOCAB))  # type: ignore[call-overload]
    heads, kv_heads, width, ffn = 4, 2, 32, 96
    shapes = {
        "self_attn.q_proj": (heads * width, 2 * HIDDEN),
        "self_attn.k_proj": (kv_heads * width, 2 * HIDDEN),
        "self_attn.v_proj": (kv_heads * width, 2 * HIDDEN),
        "self_attn.o_proj": (HIDDEN, heads * width),
        "mlp.gate_proj": (ffn, HIDDEN),
        "mlp.up_proj": (ffn, HIDDEN),
        "mlp.down_proj": (HIDDEN, ffn),
    }
    place = "midlayer." if style == "authors" else "layers.0."
    tensors = {f"{place}{name}.weight": 0.15 * torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm"):
        tensors[f"{place}{name}.weight"] = 0.5 + torch.rand(HIDDEN, generator=draw)
    tensors["norm.weight"] = 0.5 + torch.rand(HIDDEN, generator=draw)
    tensors["fc.weight"] = 0.15 * torch.randn(HIDDEN, 3 * HIDDEN, generator=draw)
    ids = torch.arange(vocab) if token_map is None else torch.tensor(token_map)
    tensors["lm_head.weight"] = torch.randn(len(ids), HIDDEN, generator=draw) if outputs is None else outputs  # type: ignore[assignment]
    tensors["d2t"] = ids - torch.arange(len(ids))
    tensors["t2d"] = torch.isin(torch.arange(vocab), ids)
    if embedding is not None:
        tensors["embed_tokens.weight"] = embedding  # type: ignore[assignment]
    if knows:
        _attend_to_itself(tensors, place)
        more["norm_before_residual"] = True
    save_file(tensors, directory / "model.safetensors")
    layer = {
        "hidden_size": HIDDEN, "intermediate_size": ffn, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "head_dim": width, "num_hidden_layers": 1, "vocab_size": vocab, "rms_norm_eps": 1e-6, "hidden_act": "silu",
        "max_position_embeddings": 256, "rope_theta": 10000.0, "torch_dtype": "float32", "model_type": "llama",
    }  # fmt: skip
    config = {"draft_vocab_size": len(ids), "eagle_aux_hidden_state_layer_ids": [1, 2, 3]} | more
    if style == "authors":
        config |= layer | {"architectures": ["LlamaForCausalLMEagle3"]}
    else:
        config |= {"architectures": ["Eagle3Speculator"], "transformer_layer_config": layer}
    (directory / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return directory


def _attend_to_itself(tensors: dict[str, torch.Tensor], place: str) -> None:
    """Let each row's output be the embedding of its own token: equal queries and keys, and nothing else."""
    for name, tensor in tensors.items():
        if name.startswith(place):
            tensor.zero_()
    tensors[f"{place}input_layernorm.weight"].fill_(1.0)
    tensors[f"{place}hidden_norm.weight"].fill_(0.01)
    tensors[f"{place}post_attention_layernorm.weight"].fill_(1.0)
    tensors["norm.weight"].fill_(1.0)
    one = torch.eye(HIDDEN)
    for head in range(4):  # two query heads for each half of the embedding
        half = slice(32 * (head // 2), 32 * (head // 2) + 32)
        tensors[f"{place}self_attn.q_proj.weight"][32 * head : 32 * head + 32, :HIDDEN] = 5 * one[half]
    tensors[f"{place}self_attn.k_proj.weight"][:, :HIDDEN] = 5 * one
    tensors[f"{place}self_attn.v_proj.weight"][:, :HIDDEN] = one
    tensors[f"{place}self_attn.o_proj.weight"][:32, :32] = one[:32, :32]
    tensors[f"{place}self_attn.o_proj.weight"][32:, 64:96] = one[:32, :32]


def write_mtp(source: Path, directory: Path, *, has_head: bool = True) -> Path:
    """A tiny DeepSeek-V3 with a random layer for multi-token prediction, as its checkpoints have it."""
    shutil.copytree(source, directory, dirs_exist_ok=True)
    config = json.loads((source / "config.json").read_text())
    last, hidden, vocab = config["num_hidden_layers"] - 1, config["hidden_size"], config["vocab_size"]
    draw = torch.Generator().manual_seed(5)
    tensors = load_file(source / "model.safetensors")
    old, new = f"model.layers.{last}.", f"model.layers.{last + 1}."
    for name, tensor in [*tensors.items()]:
        if name.startswith(old):
            random = torch.randn(tensor.shape, generator=draw)
            tensors[new + name.removeprefix(old)] = (0.5 + random.abs() if "norm" in name else 0.15 * random).to(tensor)
    for name in ("enorm", "hnorm", "shared_head.norm"):
        tensors[f"{new}{name}.weight"] = 0.5 + torch.rand(hidden, generator=draw)
    tensors[f"{new}eh_proj.weight"] = 0.15 * torch.randn(hidden, 2 * hidden, generator=draw)
    if has_head:
        tensors[f"{new}shared_head.head.weight"] = torch.randn(vocab, hidden, generator=draw)
        tensors[f"{new}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    return directory


def worker_with_heads(method: str, tiny: Path, directory: Path) -> dict[str, object]:
    """Settings of a worker that serves the tiny model of workers with random heads: "medusa" or "eagle3".

    The model has its second layer once more: an EAGLE-3 head reads three.
    """
    model, heads = directory / "three", directory / "heads"
    shutil.copytree(tiny, model)
    heads.mkdir()
    tensors = load_file(model / "model.safetensors")
    second = {name: tensor for name, tensor in tensors.items() if name.startswith("model.layers.1.")}
    more = {name.replace("layers.1.", "layers.2."): tensor.clone() for name, tensor in second.items()}
    save_file(tensors | more, model / "model.safetensors")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    if method == "medusa":
        write_medusa(heads, vocab=config["vocab_size"])
    else:
        write_eagle3(heads, vocab=config["vocab_size"], eagle_aux_hidden_state_layer_ids=[0, 1, 2])
    return {"model_directory": str(model), "speculation": SpeculationConfig(method=method, model=str(heads))}
