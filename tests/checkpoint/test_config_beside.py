"""Fields of config.json beside the ones that a family usually has: read as transformers does, or refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints.logits_oracle import assert_same_logits, oracle
from support.checkpoints.tiny_families import VOCAB

from twostroke.checkpoint.config_json import load_spec, spec_from_config
from twostroke.checkpoint.layout import EMBEDDING, HEAD
from twostroke.checkpoint.safetensors_files import differ
from twostroke.core.errors import CheckpointError

IDS = torch.randint(VOCAB, (150,), generator=torch.Generator().manual_seed(5)).tolist()
YARN = {"rope_type": "yarn", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
OLD = {"rope_parameters": None, "rope_theta": 10000.0}  # the keys of transformers 4
BESIDE = {**OLD, "original_max_position_embeddings": 64}


@pytest.fixture
def changed(family_directory: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """A family's checkpoint with other fields in config.json; None takes one away."""

    def change(name: str, fields: dict[str, Any]) -> Path:
        directory = Path(shutil.copytree(family_directory(name), tmp_path / name, dirs_exist_ok=True))
        config = json.loads((directory / "config.json").read_text())
        kept = {k: v for k, v in config.items() if k not in fields}
        given = {k: v for k, v in fields.items() if v is not None}
        (directory / "config.json").write_text(json.dumps(kept | given))
        return directory

    return change


def linear(factor: float, **more: Any) -> dict[str, Any]:
    return {"rope_type": "linear", "factor": factor, **more}


READ: list[tuple[str, str, dict[str, Any]]] = [
    ("original-beside-yarn", "llama-linear", {**BESIDE, "rope_scaling": YARN}),
    ("original-beside-llama3", "qwen2", {**BESIDE, "rope_scaling": LLAMA3}),
    (
        "original-beside-wins",
        "llama-linear",
        {**BESIDE, "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 300}},
    ),
    (
        "original-beside-new-keys",
        "mistral",
        {"original_max_position_embeddings": 64, "rope_parameters": {**YARN, "rope_theta": 5e3}},
    ),
    ("original-beside-linear", "qwen3", {**BESIDE, "rope_scaling": linear(4.0)}),
    ("original-beside-deepseek", "deepseek-v3-plain", {**BESIDE, "rope_scaling": LLAMA3}),
    (
        "original-beside-gemma3",
        "gemma3",
        {**BESIDE, "rope_local_base_freq": 100.0, "rope_scaling": {**YARN, "original_max_position_embeddings": 128}},
    ),
    ("type-beside-rope-type", "llama-linear", {**OLD, "rope_scaling": linear(4.0, type="yarn")}),
    ("theta-in-scaling", "llama-linear", {**OLD, "rope_scaling": linear(2.0, rope_theta=500.0)}),
    ("theta-beside-new-keys", "qwen2", {"rope_theta": 500.0, "rope_parameters": {"rope_type": "default"}}),
    ("theta-of-the-family", "mixtral", {"rope_parameters": None}),
    ("betas-of-zero", "qwen2", {**BESIDE, "rope_scaling": {**YARN, "beta_fast": 0, "beta_slow": 0}}),
    ("mscale-alone", "deepseek-v2", {**BESIDE, "rope_scaling": {**YARN, "mscale": 0.7}}),
    ("mscale-all-dim-alone", "deepseek-v2", {**BESIDE, "rope_scaling": {**YARN, "mscale_all_dim": 0.7}}),
    ("mscale-all-dim-of-linear", "deepseek-v3-plain", {**OLD, "rope_scaling": linear(4.0, mscale_all_dim=0.7)}),
    (
        "attention-factor-wins",
        "deepseek-v2",
        {**BESIDE, "rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.9, "attention_factor": 1.3}},
    ),
    ("pairs-of-v2", "deepseek-v2", {"rope_interleave": False}),
    ("length-of-the-family", "qwen2", {**OLD, "max_position_embeddings": None, "rope_scaling": YARN}),
    (
        "windows-by-layer-types",
        "qwen3-windows",
        {"max_window_layers": 1, "layer_types": ["full_attention"] * 2 + ["sliding_attention"]},
    ),
    ("windows-not-in-use", "qwen2-windows", {"use_sliding_window": False, "layer_types": None}),
    ("two-dtypes", "llama-linear", {"dtype": "float32", "torch_dtype": "bfloat16"}),
]


@pytest.mark.parametrize(("name", "fields"), [case[1:] for case in READ], ids=[case[0] for case in READ])
def test_reads_as_transformers_does(name: str, fields: dict[str, Any], changed: Callable, make_hand: Callable) -> None:
    directory = changed(name, fields)
    assert_same_logits(make_hand(directory).logits([("a", 0, IDS)])[0], oracle(directory)(IDS))


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (
        "LlamaForCausalLM",
        {"rope_parameters": linear(2.0, rope_theta=5e2), "rope_scaling": linear(4.0)},
        "rope_parameters and rope_scaling.*differ",
    ),
    ("Qwen2ForCausalLM", {"rope_parameters": {"full_attention": linear(2.0)}}, "full_attention alone"),
    ("Gemma3ForCausalLM", {"rope_parameters": linear(2.0)}, "full_attention and sliding_attention"),
    ("Gemma3ForCausalLM", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type"),
    ("Gemma3ForCausalLM", {"rope_scaling": {**YARN, "truncate": False}}, "truncate"),
    ("MistralForCausalLM", {"sliding_window": None, "layer_types": ["sliding_attention"] * 2}, "no sliding_window"),
    ("Qwen2ForCausalLM", {"sliding_window": 20, "layer_types": ["sliding_attention"] * 2}, "no sliding_window"),
    ("MixtralForCausalLM", {"num_experts": 4, "num_local_experts": 8}, "counts experts"),
    ("LlamaForCausalLM", {"text_config": {"rope_theta": 5.0}}, "text_config"),
    ("LlamaForCausalLM", {"eos_token_id": 160}, "eos_token_id is 160.*160 tokens"),
]


def spec(architecture: str, **changes: Any) -> Any:
    shape = {"vocab_size": 160, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config = {**shape, "num_attention_heads": 4, "architectures": [architecture], **changes}
    return spec_from_config(config, {}, "ckpt")


@pytest.mark.parametrize(("architecture", "changes", "named"), REFUSED, ids=lambda v: v if isinstance(v, str) else "")
def test_refuses_what_would_be_read_in_two_ways(architecture: str, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        spec(architecture, **changes)


def test_an_end_that_the_model_cannot_say_is_left_out_and_told() -> None:
    found = spec("LlamaForCausalLM", eos_token_id=[2, 160, 4000])
    assert found.eos_ids == (2,)
    assert found.remarks == ("eos_token_id 160, 4000 is outside the vocabulary of 160, and ignored",)


def test_halves_are_told_to_become_bfloat16() -> None:
    found = spec("LlamaForCausalLM", torch_dtype="float16")
    assert found.dtype == "bfloat16"
    assert "float16 weights count as bfloat16" in found.remarks[0]
    assert spec("LlamaForCausalLM", torch_dtype="bfloat16").remarks == ()


# ------------------------------------------------------------------ a head beside the tie


@pytest.mark.parametrize(
    ("name", "fields"),
    [("llama-biases", {"tie_word_embeddings": True}), ("gemma2", {"tie_word_embeddings": None})],
    ids=["said", "by-family"],
)
def test_another_head_beside_the_tie_is_used_as_transformers_uses_it(
    name: str, fields: dict[str, Any], changed: Callable, make_hand: Callable
) -> None:
    directory = changed(name, fields)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, HEAD: tensors[EMBEDDING].clone()}, file, {"format": "pt"})
    assert load_spec(directory).tied_embeddings
    other = torch.randn(tensors[EMBEDDING].shape, generator=torch.Generator().manual_seed(3)) * 0.2
    save_file({**tensors, HEAD: other}, file, {"format": "pt"})
    found = load_spec(directory)
    assert not found.tied_embeddings
    assert any(HEAD in remark for remark in found.remarks)
    assert_same_logits(make_hand(directory).logits([("a", 0, IDS)])[0], oracle(directory)(IDS))


def test_tensors_are_compared_to_their_last_byte(tmp_path: Path) -> None:
    tensor = torch.zeros(3 << 20, dtype=torch.float32)
    last = tensor.clone()
    last[-1] = 1.0
    for name, other, differs in (("same", tensor.clone(), False), ("last", last, True), ("half", tensor.half(), True)):
        (tmp_path / name).mkdir()
        save_file({"a": tensor, "b": other}, tmp_path / name / "model.safetensors")
        assert differ(tmp_path / name, "a", "b") is differs, name
        assert not differ(tmp_path / name, "a", "c")
    assert not differ(tmp_path, "a", "b")
