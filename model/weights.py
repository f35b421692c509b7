"""Weights from safetensors, fused as the decoder wants them. Knows names and shapes; never unpickles anything."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..core.errors import CheckpointError
from .spec import ModelSpec

_STORED_DTYPES = ("F32", "BF16", "F16")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_WHOLE_FILE_BYTES = 64 << 20  # files up to this size are hashed whole
_SAMPLED_PAGES = 256
_PAGE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer; matrices are [out, in]."""

    attention_norm: Tensor  # [hidden]
    qkv: Tensor  # [(heads + 2 * kv_heads) * head_dim, hidden]: queries, then keys, then values
    output: Tensor  # [hidden, heads * head_dim]
    ffn_norm: Tensor  # [hidden]
    gate_up: Tensor  # [2 * ffn, hidden]: gate first
    down: Tensor  # [hidden, ffn]


@dataclass(frozen=True, slots=True)
class Weights:
    """All of a model's numbers in the compute dtype."""

    embedding: Tensor  # [vocab, hidden]
    layers: tuple[LayerWeights, ...]
    norm: Tensor  # [hidden]
    head: Tensor  # [vocab, hidden]; the embedding itself when tied
    fingerprint: bytes


def load_weights(directory: Path, spec: ModelSpec, dtype: torch.dtype) -> Weights:
    """Load a checkpoint's safetensors (one file, or shards with an index) through mmap, cast to `dtype`.

    Raises:
        CheckpointError: names the file or tensor that is missing, extra, wrongly shaped or cut short.
    """
    files = checkpoint_files(directory)
    where = _locate(directory, files, spec)
    handles: dict[Path, Any] = {}

    def take(name: str) -> Tensor:
        path = where[name]
        try:
            if path not in handles:
                handles[path] = safe_open(path, framework="pt", device="cpu")
            tensor: Tensor = handles[path].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: {name} cannot be read ({error}); fetch the file again") from None
        return tensor.to(dtype).contiguous()

    def layer(index: int) -> LayerWeights:
        at = f"model.layers.{index}."
        return LayerWeights(
            attention_norm=take(at + "input_layernorm.weight"),
            qkv=torch.cat([take(f"{at}self_attn.{part}_proj.weight") for part in "qkv"]),
            output=take(at + "self_attn.o_proj.weight"),
            ffn_norm=take(at + "post_attention_layernorm.weight"),
            gate_up=torch.cat([take(f"{at}mlp.{part}_proj.weight") for part in ("gate", "up")]),
            down=take(at + "mlp.down_proj.weight"),
        )

    embedding = take("model.embed_tokens.weight")
    return Weights(
        embedding=embedding,
        layers=tuple(layer(index) for index in range(spec.num_layers)),
        norm=take("model.norm.weight"),
        head=embedding if spec.tied_embeddings else take("lm_head.weight"),
        fingerprint=weights_fingerprint(directory),
    )


def expected_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint of this spec, by Hugging Face's names."""
    hidden, ffn = spec.hidden_size, spec.intermediate_size
    q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (spec.vocab_size, hidden)}
    for index in range(spec.num_layers):
        at = f"model.layers.{index}."
        shapes |= {
            at + "input_layernorm.weight": (hidden,),
            at + "self_attn.q_proj.weight": (q_size, hidden),
            at + "self_attn.k_proj.weight": (kv_size, hidden),
            at + "self_attn.v_proj.weight": (kv_size, hidden),
            at + "self_attn.o_proj.weight": (hidden, q_size),
            at + "post_attention_layernorm.weight": (hidden,),
            at + "mlp.gate_proj.weight": (ffn, hidden),
            at + "mlp.up_proj.weight": (ffn, hidden),
            at + "mlp.down_proj.weight": (hidden, ffn),
        }
    shapes["model.norm.weight"] = (hidden,)
    if not spec.tied_embeddings:
        shapes["lm_head.weight"] = (spec.vocab_size, hidden)
    return shapes


def checkpoint_files(directory: Path) -> tuple[Path, ...]:
    """The safetensors files of a checkpoint, sorted by name.

    Raises:
        CheckpointError: there are none (pickled weights are refused with the remedy), or the index names a file that
            is missing or lies elsewhere.
    """
    index_file = directory / "model.safetensors.index.json"
    single = directory / "model.safetensors"
    if index_file.exists():
        return _indexed_files(index_file)
    if single.exists():
        return (single,)
    if directory.is_dir():
        pickled = sorted(path.name for path in directory.iterdir() if path.suffix in _PICKLED)
        if pickled:
            raise CheckpointError(
                f"{directory / pickled[0]} is a pickle, which can run code when it is read; "
                "convert it: AutoModelForCausalLM.from_pretrained(...).save_pretrained(..., safe_serialization=True)"
            )
    raise CheckpointError(f"{single} is missing; give a directory with model.safetensors or its shards and index")


def _indexed_files(index_file: Path) -> tuple[Path, ...]:
    try:
        names = set(json.loads(index_file.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index_file} is no index of shards ({error!r}); fetch it again") from None
    files = []
    for name in sorted(str(name) for name in names):
        path = index_file.parent / name
        if Path(name).name != name or path.suffix != ".safetensors":
            raise CheckpointError(f"{index_file} names {name!r}; shards are .safetensors files beside it")
        if not path.exists():
            raise CheckpointError(f"{path} is named by the index but missing; fetch it")
        files.append(path)
    return tuple(files)


def read_header(path: Path) -> tuple[bytes, dict[str, Any]]:
    """The header of a safetensors file, raw and parsed, after checking that the file is as long as it says.

    Raises:
        CheckpointError: the file is cut short or no safetensors.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise CheckpointError(f"{path} is cut short or no safetensors ({size} bytes); fetch it again")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{path} has a damaged header ({error!r}); fetch it again") from None
    if size != 8 + length + end:
        raise CheckpointError(f"{path} has {size} bytes where its header asks for {8 + length + end}; fetch it again")
    return raw, header


def _locate(directory: Path, files: tuple[Path, ...], spec: ModelSpec) -> dict[str, Path]:
    """Which file holds each tensor, once names, shapes and dtypes are found right."""
    expected = expected_shapes(spec)
    where: dict[str, Path] = {}
    for path in files:
        for name, entry in read_header(path)[1].items():
            if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and spec.tied_embeddings):
                continue  # old exports carry these beside what they follow from
            if name not in expected:
                raise CheckpointError(f"{path} holds {name}, which {spec.architecture} has no place for")
            if tuple(entry["shape"]) != expected[name]:
                raise CheckpointError(f"{path}: {name} has shape {entry['shape']}; config.json says {expected[name]}")
            if entry["dtype"] not in _STORED_DTYPES:
                raise CheckpointError(f"{path}: {name} is {entry['dtype']}; served: {', '.join(_STORED_DTYPES)}")
            where[name] = path
    missing = [name for name in expected if name not in where]
    if missing:
        raise CheckpointError(f"{directory} lacks {missing[0]} ({len(missing)} of {len(expected)} tensors missing)")
    return where


def weights_fingerprint(directory: Path) -> bytes:
    """16 bytes that name a checkpoint's numbers: config.json, and of every file name, size, header and content.

    Files above 64 MiB count by 256 evenly spaced pages, so that 16 GB take milliseconds: a checkpoint that was trained
    on differs in nearly every page, a hand-edited number may go unseen.
    """
    hasher = hashlib.blake2b((directory / "config.json").read_bytes(), digest_size=16)
    for path in checkpoint_files(directory):
        raw, _ = read_header(path)
        size = path.stat().st_size
        hasher.update(f"{path.name}:{size}:{len(raw)}".encode() + raw)
        with path.open("rb") as file:
            if size <= _WHOLE_FILE_BYTES:
                while chunk := file.read(1 << 20):
                    hasher.update(chunk)
                continue
            for page in range(_SAMPLED_PAGES):
                file.seek((size - _PAGE_BYTES) * page // (_SAMPLED_PAGES - 1))
                hasher.update(file.read(_PAGE_BYTES))
    return hasher.digest()
