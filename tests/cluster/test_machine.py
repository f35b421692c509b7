"""What a plan says of a checkpoint before anything is loaded: its memory, its arithmetic."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from support.checkpoints.quantised_checkpoints import PLACE

from twostroke.checkpoint.config import ModelConfig
from twostroke.checkpoint.config_json import load_spec
from twostroke.checkpoint.shards import Shard, shard_spec
from twostroke.checkpoint.sizes import held_bytes
from twostroke.cluster.config import load_config
from twostroke.cluster.model_facts import model_facts
from twostroke.core.errors import CheckpointError, ConfigError
from twostroke.kernels.cpu import build
from twostroke.kernels.cpu import library as native
from twostroke.model.loader import make_ops
from twostroke.model.ops.device import chosen_kernels
from twostroke.model.ops.native_ops import PackedLinear
from twostroke.model.ops.torch_ops import TorchLinear
from twostroke.model.weights.rank_source import cut_source
from twostroke.model.weights.tensors import open_source
from twostroke.model.weights.weights import load_weights

BUNDLED = Path(__file__).resolve().parents[2] / "model" / "bundled"  # tied, bfloat16


def storages(held: object) -> dict[int, int]:
    """Address and size of all memory behind a structure of weights."""
    if isinstance(held, torch.Tensor):
        return {held.untyped_storage().data_ptr(): held.nbytes}
    if isinstance(held, PackedLinear):
        return storages([part for part in (held.panels, held.scales, held.bias) if part is not None])
    if isinstance(held, TorchLinear):
        return storages([part for part in (held.matrix, held.bias) if part is not None])
    if dataclasses.is_dataclass(held):
        held = [getattr(held, field.name) for field in dataclasses.fields(held)]
    if isinstance(held, list | tuple):
        return {address: size for part in held for address, size in storages(part).items()}
    return {}


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_memory_of_the_plan_is_what_weights_take_at_most(dtype: str, quantization: str, kernels: str) -> None:
    model = ModelConfig(path=str(BUNDLED), dtype=dtype, quantization=quantization)
    spec = load_spec(BUNDLED)
    weights = load_weights(open_source(BUNDLED), spec, make_ops(getattr(torch, dtype), quantization, kernels=kernels))
    memory = storages(weights)
    found = chosen_kernels(kernels, "cpu", build.built_library)
    if dtype == "bfloat16" and (found == "native" or quantization == "int8"):
        del memory[weights.embedding.untyped_storage().data_ptr()]  # a view of the file, read by single rows
    planned = held_bytes(BUNDLED, spec, model, found)
    if dtype == "bfloat16" and found == "native" and quantization == "none":
        part = 0.76 if native.load().level() != b"plain" else 1.0  # twelve bits each, where the machine decodes them
        assert sum(memory.values()) == pytest.approx(part * planned, rel=0.01)
    else:
        assert sum(memory.values()) == pytest.approx(planned, rel=0.002)  # norms are held in float32


@pytest.mark.parametrize(
    ("kernels", "dtype", "quantization"),
    [("auto", "float32", "none"), ("auto", "bfloat16", "int8"), ("torch", "bfloat16", "none")],
)
@pytest.mark.parametrize("size", [2, 4])
def test_the_memory_of_the_plan_is_what_a_ranks_weights_take(
    size: int, dtype: str, quantization: str, kernels: str
) -> None:
    model = ModelConfig(path=str(BUNDLED), dtype=dtype, quantization=quantization)
    rank = shard_spec(load_spec(BUNDLED), Shard(size - 1, size))
    ops = make_ops(getattr(torch, dtype), quantization, kernels=kernels)
    weights = load_weights(cut_source(open_source(BUNDLED), rank), rank.local, ops)
    memory = sum(storages(dataclasses.replace(weights, embedding=torch.empty(0))).values())
    if dtype == "float32":  # else it is a view of the file
        memory += weights.embedding.nbytes
    planned = held_bytes(BUNDLED, rank.local, model, chosen_kernels(kernels, "cpu", build.built_library))
    assert memory == pytest.approx(planned, rel=0.005)  # norms are held in float32
    assert planned < 0.6 * held_bytes(BUNDLED, rank.whole, model, chosen_kernels(kernels, "cpu", build.built_library))


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["fp8-block32", "compressed-int", "bitsandbytes-nf4"])
def test_the_memory_of_the_plan_is_what_decoded_weights_take(name: str, dtype: str, kernels: str) -> None:
    model, spec = ModelConfig(dtype=dtype), load_spec(PLACE / name)
    weights = load_weights(open_source(PLACE / name), spec, make_ops(getattr(torch, dtype), kernels=kernels))
    memory = storages(weights)
    found = chosen_kernels(kernels, "cpu", build.built_library)
    if dtype == "bfloat16" and found == "native":
        del memory[weights.embedding.untyped_storage().data_ptr()]  # a view of the file
    planned = held_bytes(PLACE / name, spec, model, found)
    assert sum(memory.values()) <= 1.02 * planned  # norms are held in float32
    assert sum(memory.values()) >= 0.7 * planned  # twelve bits of sixteen at least


def test_a_table_that_must_be_copied_counts(tmp_path: Path) -> None:
    spec = load_spec(BUNDLED)
    table = spec.vocab_size * spec.hidden_size * 2
    as_file = held_bytes(BUNDLED, spec, ModelConfig(path=str(BUNDLED)), "native")
    shutil.copytree(BUNDLED, tmp_path / "m")
    assert held_bytes(tmp_path / "m", spec, ModelConfig(dtype="float32"), "native") == 2 * (as_file + table)
    assert held_bytes(tmp_path / "m.gguf", spec, ModelConfig(), "native") == as_file + table
    assert held_bytes(BUNDLED, spec, ModelConfig(), "triton") == as_file  # the head is the table
    untied = json.loads((tmp_path / "m" / "config.json").read_text()) | {"tie_word_embeddings": False}
    (tmp_path / "m" / "config.json").write_text(json.dumps(untied))
    other = load_spec(tmp_path / "m")
    assert held_bytes(BUNDLED, other, ModelConfig(), "native") == as_file
    assert held_bytes(BUNDLED, other, ModelConfig(), "triton") == as_file + table


def test_sampling_defaults_that_cannot_be_served_are_refused_before_anything_starts(
    tmp_path: Path,
) -> None:
    shutil.copytree(BUNDLED, tmp_path / "m")
    flags = {"model.path": str(tmp_path / "m"), "model.device": "cpu"}
    file = tmp_path / "m" / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": 1, "temperature": 0.6}))
    assert model_facts(load_config(flags=flags)).sampling == "temperature 0.6"
    file.write_text(json.dumps({"eos_token_id": 1, "no_repeat_ngram_size": 3}))
    with pytest.raises(CheckpointError, match=r"generation_config.json: no_repeat_ngram_size is 3"):
        model_facts(load_config(flags=flags))
    assert model_facts(load_config(flags=flags | {"model.generation_config": "none"})).sampling == ""


def test_the_plan_says_how_it_will_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = {"model.quantization": "int8", "model.device": "cpu", "model.kernels": "torch"}
    assert model_facts(load_config(flags=flags)).arithmetic == (
        "bfloat16, weights rounded to int8, torch kernels on cpu"
    )
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match=r"model.kernels is 'native', but no C\+\+ compiler"):
        model_facts(load_config(flags=flags | {"model.kernels": "native"}))
    assert "torch kernels" in model_facts(load_config(flags=flags | {"model.kernels": "auto"})).arithmetic
