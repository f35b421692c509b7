"""Checkpoints: what config.json may say, and what is refused by name."""

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints.models import resolved

from twostroke.checkpoint import fingerprint
from twostroke.checkpoint.config_json import load_spec, spec_from_config
from twostroke.checkpoint.layout import num_parameters, weight_bytes
from twostroke.checkpoint.safetensors_files import read_header
from twostroke.checkpoint.spec import ModelSpec, RopeScaling
from twostroke.core.errors import CheckpointError, ConfigError
from twostroke.model.loader import machine_description, make_ops, numerics_class
from twostroke.model.weights.tensors import open_source, weights_fingerprint
from twostroke.model.weights.weights import Weights, load_weights

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 1024,
    "torch_dtype": "bfloat16",
    "eos_token_id": 1,
}


def spec(**changes: Any) -> ModelSpec:
    generation = changes.pop("generation", {})
    return spec_from_config({**BASE, **changes}, generation, "ckpt")


@pytest.fixture
def checkpoint(write_tiny: Callable[[dict[str, object]], Path], tmp_path: Path) -> Path:
    """A checkpoint of its own, to be damaged."""
    return Path(shutil.copytree(write_tiny({}), tmp_path / "model"))


def test_reads_the_keys_of_transformers_4_and_5_alike() -> None:
    old = spec(rope_theta=500000.0, rope_scaling={"type": "linear", "factor": 2.0}, torch_dtype="bfloat16")
    new = spec(
        rope_theta=None,
        rope_parameters={"rope_type": "linear", "rope_theta": 500000.0, "factor": 2.0},
        torch_dtype=None,
        dtype="bfloat16",
    )
    assert old == new
    (rope,) = old.ropes
    assert rope.scaling == RopeScaling("linear", 2.0)
    assert (rope.theta, rope.width, old.dtype) == (500000.0, 16, "bfloat16")


def test_merges_the_end_ids_of_both_files_and_keeps_each_once() -> None:
    merged = spec(eos_token_id=[5, 6], generation={"eos_token_id": [6, 9], "bos_token_id": 3})
    assert merged.eos_ids == (5, 6, 9)
    assert merged.bos_id == 3


def test_counts_parameters_as_the_checkpoint_does(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    loaded = load_spec(checkpoint)
    assert num_parameters(loaded) == sum(tensor.numel() for tensor in tensors.values())
    assert weight_bytes(loaded, "bfloat16") == 2 * num_parameters(loaded)
    assert loaded.kv_spec("fp8").bytes_per_token == 2 * 2 * 2 * (32 + 1)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM"),
        ({"architectures": None, "model_type": "gpt2"}, "gpt2"),
        ({"architectures": ["MistralForCausalLM"], "attention_bias": True}, "attention_bias"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"quantization_config": {"quant_method": "hqq"}}, "quant_method.*hqq"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_scaling": {"rope_type": "proportional", "factor": 4.0}}, "proportional"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "KV heads"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps"),
        ({"torch_dtype": "int8"}, "int8"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses_what_it_does_not_serve_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        spec(**changes)


def test_refuses_a_missing_or_broken_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="missing"):
        load_spec(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="JSON"):
        load_spec(tmp_path)


def load(checkpoint: Path) -> Weights:
    return load_weights(open_source(checkpoint), load_spec(checkpoint), make_ops(torch.float32, kernels="torch"))


def _rewrite(checkpoint: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    change(tensors)
    save_file(tensors, checkpoint / "model.safetensors")


def _shards(checkpoint: Path, weight_map: dict[str, str]) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "model-00001-of-00002.safetensors")
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _cut_short(checkpoint: Path, keep: int) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda c: _rewrite(c, lambda t: t.pop(NORM)), NORM),
        (lambda c: _rewrite(c, lambda t: t.update(extra=torch.zeros(1))), "extra"),
        (lambda c: _rewrite(c, lambda t: t.update({NORM: torch.zeros(63)})), "63"),
        (lambda c: _rewrite(c, lambda t: t.update({NORM: torch.zeros(64, dtype=torch.int8)})), "I8"),
        (lambda c: _cut_short(c, 100_000), "fetch it again"),
        (lambda c: _cut_short(c, 3), "cut short"),
        (lambda c: (c / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda c: (c / "model.safetensors").rename(c / "pytorch_model.bin"), "pickle.*safe_serialization"),
        (lambda c: _shards(c, {"a": "model-00002-of-00002.safetensors"}), "00002-of-00002.*missing"),
        (lambda c: _shards(c, {"a": "../elsewhere.safetensors"}), "elsewhere"),
        (lambda c: _shards(c, {"a": "pytorch_model.bin"}), "pytorch_model.bin"),
        (lambda c: (c / "model.safetensors.index.json").write_text("[]"), "index"),
        (lambda c: (c / "model.safetensors").write_bytes(b"\x05" + b"\0" * 7 + b"nojson"), "damaged header"),
    ],
    ids=[
        "missing",
        "extra",
        "shape",
        "dtype",
        "cut",
        "stump",
        "none",
        "pickle",
        "shard",
        "outside",
        "bin",
        "index",
        "header",
    ],
)
def test_refuses_damaged_weights_by_name(checkpoint: Path, damage: Callable[[Path], None], named: str) -> None:
    load(checkpoint)
    damage(checkpoint)
    with pytest.raises(CheckpointError, match=named):
        load(checkpoint)


def test_loads_shards_and_ignores_old_extras(write_tiny: Callable[[dict[str, object]], Path], checkpoint: Path) -> None:
    sharded = write_tiny({"shard_size": "60KB"})
    assert len(list(sharded.glob("*.safetensors"))) > 1
    whole, parts = load(checkpoint), load(sharded)
    assert torch.equal(whole.layers[1].attention.qkv.matrix, parts.layers[1].attention.qkv.matrix)
    _rewrite(checkpoint, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(16)}))
    load(checkpoint)


def test_the_fingerprint_changes_with_config_and_with_content(checkpoint: Path) -> None:
    first = weights_fingerprint(checkpoint)
    assert len(first) == 16
    assert weights_fingerprint(checkpoint) == first
    _rewrite(checkpoint, lambda t: t[NORM].__setitem__(0, 7.0))
    second = weights_fingerprint(checkpoint)
    (checkpoint / "config.json").write_text((checkpoint / "config.json").read_text() + "\n")
    assert len({first, second, weights_fingerprint(checkpoint)}) == 3


def test_a_change_of_any_tensor_shows_in_a_large_file_too(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "WHOLE_FILE_BYTES", 1000)
    monkeypatch.setattr(fingerprint, "WHOLE_TENSOR_BYTES", 600)
    monkeypatch.setattr(fingerprint, "SPACING_BYTES", 2000)
    monkeypatch.setattr(fingerprint, "PAGE_BYTES", 16)
    (file,) = checkpoint.glob("*.safetensors")
    original, (raw, header) = file.read_bytes(), read_header(file)
    name = weights_fingerprint(checkpoint)
    for entry in header.values():
        start, end = (8 + len(raw) + offset for offset in entry["data_offsets"])
        middle = (start + end) // 2
        for first, last in ((start, start + 1), (end - 1, end), (max(start, middle - 1000), min(middle + 1000, end))):
            changed = bytearray(original)
            changed[first:last] = bytes(byte ^ 1 for byte in changed[first:last])
            file.write_bytes(changed)
            assert weights_fingerprint(checkpoint) != name, (entry, first, last)
    file.write_bytes(original)
    assert weights_fingerprint(checkpoint) == name


def test_what_is_read_of_a_large_checkpoint_is_bounded_and_leaves_no_gap() -> None:
    sizes = [500 << 20, 8 << 20, 8192, 64 << 10, (64 << 10) + 1, 3 << 20, 117, 14_336 * 4096 * 2]
    tensors, at = [], 1234
    for size in sizes:
        tensors.append(range(at, at + size))
        at += size
    pages = list(fingerprint.counted(reversed(tensors)))
    assert sum(map(len, pages)) < 0.0025 * at
    for tensor in tensors:
        inside = [page for page in pages if tensor.start <= page.start and page.stop <= tensor.stop]
        assert (inside[0].start, inside[-1].stop) == (tensor.start, tensor.stop)
        assert all(b.start - a.stop < fingerprint.SPACING_BYTES for a, b in pairwise(inside))


def test_the_numerics_class_names_all_that_bits_depend_on(checkpoint: Path) -> None:
    base = numerics_class(resolved(checkpoint))
    assert base == numerics_class(resolved(checkpoint, "fp8", dtype="float32", max_model_len=64))
    others = [
        numerics_class(resolved(checkpoint, dtype="bfloat16")),
        numerics_class(resolved(checkpoint, "bfloat16")),
        numerics_class(resolved(checkpoint, quantization="int8")),
        numerics_class(resolved(checkpoint), tp=2),
    ]
    assert len({base.digest, *(other.digest for other in others)}) == 5
    assert machine_description() in base.description


def test_refuses_a_longer_context_than_the_checkpoint_has(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match=r"max_model_len is 2048.*1024"):
        resolved(checkpoint, max_model_len=2048)
