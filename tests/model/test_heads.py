"""Files of heads: what fits a model and what it needs of memory, and errors that name what does not fit."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints.heads import HIDDEN, VOCAB, write_eagle3, write_medusa, write_mtp
from support.checkpoints.models import resolved

from twostroke.checkpoint.config import ModelConfig
from twostroke.checkpoint.heads.eagle3 import load_eagle3
from twostroke.checkpoint.heads.medusa import load_medusa
from twostroke.cluster.config import Config
from twostroke.cluster.model_facts import model_facts
from twostroke.core.errors import CheckpointError, ConfigError
from twostroke.core.request import Role
from twostroke.engine.config import SpeculationConfig
from twostroke.model.heads.eagle3 import load_eagle3_head
from twostroke.model.heads.layered import LayerDrafter
from twostroke.model.heads.medusa import load_medusa_weights
from twostroke.model.heads.resolved import resolve_eagle3, resolve_medusa, resolve_mtp
from twostroke.model.loader import RunnerOptions, load_runner, make_ops
from twostroke.model.resolved import needs_of_ranks
from twostroke.worker.settings import WorkerSettings
from twostroke.worker.speculation import load_guessing, resolved_draft

STYLES = {"faster": "medusa_lm_head.safetensors", "prefixed": "medusa_lm_head.safetensors", "vllm": "model.safetensors"}


def changed(directory: Path, style: str = "faster", config: dict[str, object] | None = None, **tensors: object) -> Path:
    """The heads with other fields of config.json and other tensors; None takes one away."""
    file = directory / STYLES[style]
    held = {name.replace(".", "_"): name for name in load_file(file)}
    kept = dict(load_file(file))
    for name, tensor in tensors.items():
        kept.pop(held[name])
        if tensor is not None:
            kept[held[name]] = tensor
    save_file(kept, file)
    fields = json.loads((directory / "config.json").read_text()) | (config or {})
    (directory / "config.json").write_text(json.dumps(fields))
    return directory


@pytest.mark.parametrize("style", STYLES)
def test_both_published_layouts_have_the_same_shape(tmp_path, style):
    spec = load_medusa(write_medusa(tmp_path, style, heads=3, blocks=2))
    assert (spec.hidden_size, spec.num_rows, len(spec.heads), spec.token_map) == (HIDDEN, VOCAB, 3, None)
    assert [len(head.blocks) for head in spec.heads] == [2, 2, 2]
    has_bias = style != "vllm"
    assert {bias is not None for head in spec.heads for _, bias in head.blocks} == {has_bias}


def test_config_says_how_many_of_the_heads_guess_and_one_output_may_serve_all(tmp_path):
    directory = changed(write_medusa(tmp_path, "vllm"), "vllm", {"num_heads": 2, "original_lm_head": True})
    spec = load_medusa(changed(directory, "vllm", lm_heads_1_weight=None, lm_heads_2_weight=None))
    assert [head.output for head in spec.heads] == ["lm_heads.0.weight"] * 2


@pytest.mark.parametrize(
    ("style", "config", "tensors", "words"),
    [
        ("faster", {"medusa_num_heads": 4}, {}, ["lacks 3.0.linear.weight", "layout"]),
        ("faster", {"medusa_num_heads": 0}, {}, ["medusa_num_heads is 0", "above 0"]),
        ("faster", {}, {"1_2_weight": None}, ["lacks 1.2.weight"]),
        ("faster", {}, {"1_1_linear_weight": torch.ones(64, 63)}, ["1.1.linear.weight has shape [64, 63]", "[64, 64]"]),
        ("faster", {}, {"1_1_linear_bias": torch.ones(63)}, ["1.1.linear.bias has shape [63]", "[64]"]),
        ("faster", {}, {"2_2_weight": torch.ones(159, 64)}, ["2.2.weight has shape [159, 64]", "[160, 64]"]),
        ("faster", {}, {"0_2_weight": torch.ones(160)}, ["0.2.weight has shape [160]", "[vocabulary, hidden]"]),
        ("vllm", {}, {"lm_heads_1_weight": None}, ["lacks lm_heads.1.weight"]),
        ("vllm", {"truncated_vocab_size": 40}, {}, ["truncated_vocab_size is 40", "token_map"]),
    ],
)
def test_heads_whose_files_do_not_agree_are_refused_by_name(tmp_path, style, config, tensors, words):
    directory = changed(write_medusa(tmp_path, style), style, config, **tensors)
    with pytest.raises(CheckpointError) as told:
        load_medusa(directory)
    assert [word for word in words if word not in str(told.value)] == []


def test_a_pickle_is_refused_with_the_way_to_convert_it(tmp_path):
    write_medusa(tmp_path)
    (tmp_path / "medusa_lm_head.safetensors").rename(tmp_path / "medusa_lm_head.pt")
    with pytest.raises(CheckpointError, match=r"medusa_lm_head.pt is a pickle.*save_file\(torch.load\("):
        load_medusa(tmp_path)


def test_heads_for_another_model_are_refused_with_both_sizes(write_tiny, tmp_path):
    model = resolved(write_tiny({}))
    with pytest.raises(ConfigError, match=r"64 numbers and give 161 tokens; .* has 64 and 160: name heads made for"):
        resolve_medusa(write_medusa(tmp_path, vocab=161), model)
    other = resolved(write_tiny({"hidden": 32}))
    with pytest.raises(ConfigError, match=r"64 numbers and give 160 tokens; .* has 32 and 160"):
        resolve_medusa(write_medusa(tmp_path), other)


def test_a_token_map_may_name_a_part_of_the_vocabulary_and_no_other_token(write_tiny, tmp_path):
    model, ops = resolved(write_tiny({})), make_ops(torch.float32)
    spec = resolve_medusa(write_medusa(tmp_path, "vllm", token_map=[5, 159, 7]), model).spec
    assert spec.num_rows == 3
    assert load_medusa_weights(spec, ops, VOCAB).token_ids.tolist() == [5, 159, 7]
    spec = load_medusa(write_medusa(tmp_path, "vllm", token_map=[5, 160, 7]))
    with pytest.raises(CheckpointError, match="token_map names tokens 5 to 160; the model has 0 to 159"):
        load_medusa_weights(spec, ops, VOCAB)


def test_heads_are_part_of_what_a_worker_needs_and_of_the_plan(write_tiny, tmp_path):
    settings = ModelConfig(path=str(write_tiny({})))
    model, heads = resolved(write_tiny({})), write_medusa(tmp_path, heads=3, blocks=2)
    found = resolve_medusa(heads, model)
    assert found.weight_bytes == 3 * (2 * (HIDDEN + 1) * HIDDEN + VOCAB * HIDDEN) * 4
    alone, both = needs_of_ranks(model, settings, 1), needs_of_ranks(model, settings, 1, found)
    assert both.weight_bytes == alone.weight_bytes + found.weight_bytes
    assert both.kv_spec == alone.kv_spec
    assert both.step_bytes.per_row > alone.step_bytes.per_row
    config = Config(model=settings, speculation=SpeculationConfig(method="medusa", model=str(heads)))
    plain, facts = model_facts(Config(model=settings), 0), model_facts(config, 0)
    assert facts.weight_bytes == plain.weight_bytes + found.weight_bytes
    assert facts.draft.startswith(f"3 Medusa heads of {heads}: weights 0.2 MiB")
    assert facts.draft_directory == str(heads)


EAGLE_CASES = [
    ({"num_hidden_layers": 2}, {}, ["num_hidden_layers is 2", "one layer"]),
    ({"eagle_aux_hidden_state_layer_ids": None}, {}, ["default of tapped layers is [2, 2, 1]", "layers 0 to 3"]),
    ({"eagle_aux_hidden_state_layer_ids": [1, 2, 4]}, {}, ["eagle_aux_hidden_state_layer_ids is [1, 2, 4]"]),
    ({"eagle_config": {"use_aux_hidden_state": False}}, {}, ["use_aux_hidden_state is off"]),
    ({"quantization_config": {"quant_method": "fp8"}}, {}, ["quantization_config is set", "floats"]),
    ({}, {"d2t": None, "lm_head_weight": torch.ones(9, 64)}, ["lm_head.weight has 9 rows", "no d2t"]),
    ({}, {"fc_weight": None}, ["lacks fc.weight"]),
    ({}, {"midlayer_hidden_norm_weight": None}, ["lacks midlayer.hidden_norm.weight"]),
    ({}, {"midlayer_self_attn_k_proj_weight": None}, ["lacks midlayer.self_attn.k_proj.weight"]),
    ({}, {"midlayer_input_layernorm_weight": None}, ["lacks midlayer.input_layernorm.weight", "EAGLE-3 head"]),
    ({}, {"midlayer_self_attn_q_proj_weight": torch.ones(128, 64)}, ["[128, 64]", "must be [128, 128]"]),
    ({}, {"d2t": torch.zeros(3, dtype=torch.int64)}, ["d2t has shape [3]", "[160]"]),
]


@pytest.mark.parametrize(("config", "tensors", "words"), EAGLE_CASES)
def test_an_eagle3_head_that_is_not_served_is_refused_by_name(tmp_path, config, tensors, words):
    directory = changed(write_eagle3(tmp_path), "vllm", config, **tensors)
    with pytest.raises(CheckpointError) as told:
        load_eagle3(directory, 4)
    assert [word for word in words if word not in str(told.value)] == []


def test_both_layouts_of_eagle3_heads_have_the_same_shape(tmp_path):
    authors = load_eagle3(write_eagle3(tmp_path, token_map=[3, 9, 40]), 4)
    assert (authors.layers_tapped, authors.num_rows, authors.norm_first, authors.fc_width) == ((1, 2, 3), 3, False, 192)
    other = load_eagle3(write_eagle3(tmp_path, "speculators", embedding=torch.ones(VOCAB, HIDDEN)), 4)
    assert other.layer == authors.layer
    assert (authors.has_embedding, other.has_embedding) == (False, True)
    defaults = changed(tmp_path, "vllm", {"eagle_aux_hidden_state_layer_ids": None})
    assert load_eagle3(defaults, 32).layers_tapped == (2, 16, 29)


def test_an_eagle3_head_is_part_of_what_a_worker_needs_and_of_the_plan(write_tiny, tmp_path):
    settings = ModelConfig(path=str(write_tiny({"layers": 4})))
    model, directory = resolved(Path(settings.path)), write_eagle3(tmp_path)
    found = resolve_eagle3(directory, model)
    tensors = load_file(directory / "model.safetensors")
    assert found.weight_bytes == 4 * sum(tensor.numel() for name, tensor in tensors.items() if "2" not in name)
    alone, both = needs_of_ranks(model, settings, 1), needs_of_ranks(model, settings, 1, found)
    assert both.weight_bytes == alone.weight_bytes + found.weight_bytes
    assert [group.name for group in both.kv_spec.groups] == ["main", "draft"]
    assert 4 * both.kv_spec.bytes_per_token == 5 * alone.kv_spec.bytes_per_token  # a fifth layer
    assert both.step_bytes.per_token == alone.step_bytes.per_token + 2 * 3 * HIDDEN * 4
    config = Config(model=settings, speculation=SpeculationConfig(method="eagle3", model=str(directory)))
    told = model_facts(config, 0).draft
    assert told.startswith(f"EAGLE-3 head {directory}: reads the model before its layers 1, 2, 3; weights 0.3 MiB")


def test_an_eagle3_head_for_another_model_is_refused(write_tiny, make_runner, tmp_path):
    with pytest.raises(ConfigError, match=r"a head of 64 numbers over 192 .* has 32, 96 and 160"):
        resolve_eagle3(write_eagle3(tmp_path), resolved(write_tiny({"layers": 4, "hidden": 32})))
    wrong = write_eagle3(tmp_path, token_map=[3, 9, 160])
    spec, runner = load_eagle3(wrong, 4), make_runner(write_tiny({"layers": 4}), num_blocks=4)
    with pytest.raises(CheckpointError, match="d2t names tokens 3 to 160; the model has 0 to 159"):
        load_eagle3_head(spec, runner)


def test_a_models_own_layer_guesses_and_is_part_of_the_plan(family_directory, tmp_path):
    directory = write_mtp(family_directory("deepseek-v3"), tmp_path)
    speculation = SpeculationConfig(method="deepseek_mtp")
    model, settings = resolved(directory), ModelConfig(path=str(directory))
    worker = WorkerSettings(
        worker_id="w", role=Role.COMBINED, model_directory=str(directory), model_name="tiny", model=settings,
        speculation=speculation, cluster_key="a key of the tests",
    )  # fmt: skip
    draft, options = resolved_draft(worker, model), RunnerOptions(num_blocks=8)
    guessing = load_guessing(worker, model, draft, load_runner(model, options), options)
    assert isinstance(guessing.drafter, LayerDrafter)
    plain = model_facts(Config(model=settings), 0)
    facts = model_facts(Config(model=settings, speculation=speculation), 0)
    assert facts.draft.startswith("layer 3 for multi-token prediction: weights 0.3 MiB per worker, KV ")
    assert facts.weight_bytes == plain.weight_bytes + draft.weight_bytes
    assert 3 * facts.kv_spec.bytes_per_token == 4 * plain.kv_spec.bytes_per_token
    assert not facts.draft_directory


def test_a_model_without_such_a_layer_is_refused(family_directory):
    config = Config(
        model=ModelConfig(path=str(family_directory("deepseek-v3"))), speculation=SpeculationConfig(method="mtp")
    )
    with pytest.raises(ConfigError, match="has no layer for multi-token prediction; serve a checkpoint that has one"):
        model_facts(config, 0)


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("model_layers_3_hnorm_weight", None, ["lacks model.layers.3.hnorm.weight", "promises"]),
        ("model_layers_3_eh_proj_weight", torch.ones(64, 64), ["eh_proj.weight has shape [64, 64]", "[64, 128]"]),
    ],
)
def test_a_layer_whose_tensors_do_not_agree_is_refused_by_name(family_directory, tmp_path, name, tensor, words):
    directory = changed(write_mtp(family_directory("deepseek-v3"), tmp_path), "vllm", **{name: tensor})
    with pytest.raises(CheckpointError) as told:
        resolve_mtp(resolved(directory))
    assert [word for word in words if word not in str(told.value)] == []
