"""Adapters as PEFT saves them: what is read, how they are named, and what is refused by name."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.checkpoints.adapters import change_config, save_adapter

from twostroke.checkpoint.adapters.adapter import MAX_HEADER_BYTES, Adapter, AdapterLimits, places, read_adapter
from twostroke.checkpoint.adapters.config import MAX_CONFIG_BYTES
from twostroke.checkpoint.config_json import load_spec
from twostroke.core.errors import CheckpointError
from twostroke.model.weights.tensors import open_source

Read = Callable[..., Adapter]


@pytest.fixture
def base(write_tiny: Callable[[dict[str, object]], Path]) -> Path:
    return write_tiny({})


@pytest.fixture
def read(base: Path) -> Read:
    def read(directory: Path, **limits: int) -> Adapter:
        present = open_source(base).shapes()
        return read_adapter(directory, load_spec(base), present, AdapterLimits(**limits))

    return read


@pytest.fixture
def saved(base: Path, tmp_path: Path) -> Callable[..., Path]:
    def saved(name: str = "one", **config: object) -> Path:
        return save_adapter(base, tmp_path / name, **config)

    return saved


def _edit(directory: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    file = directory / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_finds_the_place_of_every_pair(read: Read, saved: Callable[..., Path]) -> None:
    adapter = read(saved(target_modules=["k_proj", "up_proj", "o_proj"], r=4, lora_alpha=8))
    # 4 heads and 2 KV heads of 32 numbers; hidden 64, ffn 96
    where = [(p.place.layer, p.place.matrix, p.place.first_row, p.place.rows, p.place.columns) for p in adapter.pairs]
    one = [("qkv", 128, 64, 64), ("output", 0, 64, 128), ("gate_up", 96, 96, 64)]
    assert where == [(layer, *place) for layer in (0, 1) for place in one]
    assert {(pair.rank, pair.scale) for pair in adapter.pairs} == {(4, 2.0)}
    assert adapter.rank == 4
    assert adapter.num_parameters == 2 * 4 * (64 + 64 + 64 + 128 + 96 + 64)


def test_ranks_and_scales_may_differ_by_module(read: Read, saved: Callable[..., Path]) -> None:
    patterns = {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 5}, "alpha_pattern": {"v_proj": 3}}
    adapter = read(saved(r=4, lora_alpha=8, **patterns))
    found = {pair.module: (pair.rank, pair.scale) for pair in adapter.pairs}
    assert found["model.layers.0.self_attn.q_proj"] == (2, 4.0)
    assert found["model.layers.1.mlp.down_proj"] == (5, 8 / 5)
    assert found["model.layers.0.mlp.down_proj"] == (4, 2.0)
    assert found["model.layers.1.self_attn.v_proj"] == (4, 0.75)
    rooted = read(saved("rooted", r=4, lora_alpha=8, use_rslora=True))
    assert {pair.scale for pair in rooted.pairs} == {8 / math.sqrt(4)}


def test_a_pattern_names_whole_words_of_a_path_and_the_first_one_counts(read: Read, saved: Callable[..., Path]) -> None:
    directory = saved(r=4, lora_alpha=8, target_modules=["q_proj"])
    whole = {"^model.layers.1.self_attn.q_proj": 2, "_proj": 64, "self_attn.q_proj": 16, "q_proj": 32}
    change_config(directory, alpha_pattern=whole)
    assert [pair.scale for pair in read(directory).pairs] == [4.0, 0.5]


def test_the_digest_names_numbers_and_config_and_not_the_place(read: Read, saved: Callable[..., Path]) -> None:
    first, same, other = (read(saved(name, seed=seed)) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert first.digest == same.digest
    assert first.digest != other.digest
    directory = saved("d", seed=1)
    change_config(directory, lora_alpha=17)
    assert read(directory).digest != first.digest
    change_config(directory, lora_alpha=16)
    assert read(directory).digest == first.digest

    def flip(tensors: dict[str, np.ndarray]) -> None:
        tensors[sorted(tensors)[3]].view(np.uint8)[0, 0] ^= 1

    _edit(directory, flip)
    assert read(directory).digest != first.digest


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"trainable_token_indices": [5]}, "trainable_token_indices"),
        ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights"),
        ({"peft_type": "IA3"}, "peft_type"),
        ({"task_type": "SEQ_CLS"}, "task_type"),
        ({"use_something_new": True}, "use_something_new"),
        ({"r": 0}, "r is 0"),
        ({"lora_alpha": "8"}, "lora_alpha"),
        ({"lora_alpha": float("inf")}, "lora_alpha"),
        ({"alpha_pattern": {"(q|k)_proj": 8}}, "alpha_pattern"),
        ({"rank_pattern": {"q_proj": 1.5}}, "rank_pattern"),
    ],
)
def test_refuses_by_name_what_would_change_the_numbers(
    changes: dict[str, object], named: str, read: Read, saved: Callable[..., Path]
) -> None:
    directory = saved(target_modules=["q_proj"])
    change_config(directory, **changes)
    with pytest.raises(CheckpointError, match=named):
        read(directory)


@pytest.mark.parametrize("keeps", ["gaussian", "eva", "orthogonal", False])
def test_takes_adapters_that_began_in_ways_which_keep_the_model(
    keeps: object, read: Read, saved: Callable[..., Path]
) -> None:
    directory = saved(target_modules=["q_proj"])
    change_config(directory, init_lora_weights=keeps, use_dora=None, modules_to_save=[])
    assert len(read(directory).pairs) == 2


def test_refuses_tensors_that_it_would_not_compute(read: Read, saved: Callable[..., Path]) -> None:
    head = saved("head", target_modules=["lm_head"])
    with pytest.raises(CheckpointError, match=r"lm_head.*; adapters of the embedding and of the head"):
        read(head)
    dora = saved("dora", target_modules=["q_proj"], use_dora=True)
    change_config(dora, use_dora=False)
    with pytest.raises(CheckpointError, match="lora_magnitude_vector"):
        read(dora)
    biased = saved("biased", target_modules=["q_proj"], lora_bias=True)
    change_config(biased, lora_bias=False)
    with pytest.raises(CheckpointError, match=r"lora_B\.bias has shape|lora_B\.bias, which is not served"):
        read(biased)


def test_refuses_an_adapter_of_another_model(
    read: Read, write_tiny: Callable[[dict[str, object]], Path], tmp_path: Path
) -> None:
    deeper = save_adapter(write_tiny({"layers": 3}), tmp_path / "deeper", target_modules=["q_proj"])
    with pytest.raises(CheckpointError, match=r"layers\.2\.self_attn\.q_proj, which this model"):
        read(deeper)
    wider = save_adapter(write_tiny({"hidden": 96}), tmp_path / "wider", target_modules=["q_proj"])
    with pytest.raises(CheckpointError, match=r"shape \[8, 96\].*\[8, 64\]"):
        read(wider)


def test_refuses_damaged_and_pickled_files(read: Read, saved: Callable[..., Path]) -> None:
    directory = saved(target_modules=["q_proj"])
    file = directory / "adapter_model.safetensors"
    good = file.read_bytes()
    file.write_bytes(good[:-1])
    with pytest.raises(CheckpointError, match="header asks for"):
        read(directory)
    file.write_bytes(good)
    _edit(directory, lambda tensors: tensors.pop(sorted(tensors)[0]) is None)
    with pytest.raises(CheckpointError, match="lacks lora_A"):
        read(directory)
    file.unlink()
    (directory / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match="pickle"):
        read(directory)
    (directory / "adapter_model.bin").unlink()
    with pytest.raises(CheckpointError, match="missing"):
        read(directory)
    (directory / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read(directory)


@pytest.mark.parametrize(
    ("header", "named"),
    [
        (b"[" * 200_000, "damaged header"),
        (b'{"a": {"dtype": "F32", "shape": [1, 1], "data_offsets": ["a", "b"]}}', "damaged header"),
        (b'{"a": {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, true]}}', "damaged header"),
        (b'{"a": {"dtype": "F32", "shape": [1, 1], "data_offsets": [0]}}', "damaged header"),
        (b"{" + b" " * MAX_HEADER_BYTES + b"}", "has a header of 1048578 bytes; 1048576 at most"),
    ],
    ids=["deep", "texts", "truth", "one", "large"],
)
def test_refuses_headers_that_are_none(header: bytes, named: str, read: Read, saved: Callable[..., Path]) -> None:
    directory = saved(target_modules=["q_proj"])
    (directory / "adapter_model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match=named):
        read(directory)


def test_a_config_that_is_no_file_is_not_waited_for(read: Read, saved: Callable[..., Path]) -> None:
    directory = saved(target_modules=["q_proj"])
    config = directory / "adapter_config.json"
    config.unlink()
    os.mkfifo(config)
    with pytest.raises(CheckpointError, match="no regular file"):
        read(directory)
    config.unlink()
    config.symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="no regular file"):
        read(directory)
    config.unlink()
    config.write_text(" " * (MAX_CONFIG_BYTES + 1))
    with pytest.raises(CheckpointError, match="more than 1048576 bytes"):
        read(directory)


def test_bounds_rank_and_bytes(read: Read, saved: Callable[..., Path]) -> None:
    directory = saved(target_modules=["q_proj"], rank_pattern={"layers.1.self_attn.q_proj": 24})
    assert read(directory, max_rank=24).rank == 24
    with pytest.raises(CheckpointError, match=r"rank is 24.*max_lora_rank 23"):
        read(directory, max_rank=23)
    size = (directory / "adapter_model.safetensors").stat().st_size
    assert read(directory, max_bytes=size)
    with pytest.raises(CheckpointError, match="max_lora_bytes"):
        read(directory, max_bytes=size - 1)


def test_experts_and_latent_attention_have_no_places(family_directory: Callable[[str], Path]) -> None:
    latent, mixtral = (load_spec(family_directory(name)) for name in ("deepseek-v2", "mixtral"))
    assert {place.matrix for place in places(latent, ()).values()} == {"gate_up", "down"}
    assert {place.matrix for place in places(mixtral, ()).values()} == {"qkv", "output"}


def test_a_config_that_names_no_numbers_of_a_pair_is_refused(read: Read, saved: Callable[..., Path]) -> None:
    directory = saved(target_modules=["q_proj"])
    change_config(directory, r=4)  # the tensors say 8: alpha / r would be another scale
    with pytest.raises(CheckpointError, match=r"shape \[8, 64\].*\[4, 64\]"):
        read(directory)
    assert json.loads((directory / "adapter_config.json").read_text())["r"] == 4
