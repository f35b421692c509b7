"""Plans of quantised checkpoints: what is served, what is refused by name, and damaged tensors found in headers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints.quantised_checkpoints import NAMES, PLACE, as_mxfp4

from twostroke.checkpoint.config_json import load_spec, spec_from_config
from twostroke.checkpoint.layout import EMBEDDING, HEAD, expected_shapes
from twostroke.checkpoint.quantised.matrices import AwqMatrix
from twostroke.checkpoint.quantised.plan import quantised_plan
from twostroke.checkpoint.safetensors_files import safetensors_fingerprint
from twostroke.core.errors import CheckpointError
from twostroke.model.weights.tensors import open_source

Tensors = dict[str, torch.Tensor]
DOWN, Q = "model.layers.0.mlp.down_proj.", "model.layers.0.self_attn.q_proj."


@pytest.fixture
def changed(tmp_path: Path) -> Callable[..., Path]:
    """A copy of a checkpoint with another config (`more` merged into its quantisation) or other tensors."""

    def change(name: str, more: dict[str, Any] | None = None, edit: Callable[[Tensors], object] | None = None) -> Path:
        place = tmp_path / name
        shutil.copytree(PLACE / name, place)
        if more is not None:
            config = json.loads((place / "config.json").read_text())
            config["quantization_config"] |= more
            (place / "config.json").write_text(json.dumps(config))
        if edit is not None:
            tensors = load_file(place / "model.safetensors")
            edit(tensors)
            save_file(tensors, place / "model.safetensors")
        return place

    return change


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_has_exactly_the_models_tensors(name: str) -> None:
    spec, plan = load_spec(PLACE / name), quantised_plan(PLACE / name)
    assert plan is not None
    assert plan.shapes() == expected_shapes(spec, plan.shapes())
    assert any("stored quantised" in remark for remark in spec.remarks)
    for matrix in plan.matrices.values():
        assert set(matrix.tensors) <= set(load_file(PLACE / name / "model.safetensors"))


@pytest.mark.parametrize(
    ("name", "more", "named"),
    [
        ("fp8-block32", {"rotation": "hadamard"}, "rotation = 'hadamard'"),
        ("fp8-block32", {"fmt": "e3m4"}, "fmt.*e3m4"),
        ("fp8-block32", {"weight_block_size": [32]}, "weight_block_size"),
        ("fp8-block32", {"quant_method": "hqq"}, "hqq.*served.*fp8.*int8"),
        ("fp8-block32", {"activation_scheme": "mixed"}, "activation_scheme"),
        ("compressed-w4a16", {"sparsity_config": {"format": "marlin-24"}}, "sparsity_config.*dense"),
        ("compressed-w4a16", {"transform_config": {"config_groups": {"u": {}}}}, "transform_config"),
        ("compressed-w4a16", {"format": "marlin-24", "config_groups": {"g": {"targets": ["Linear"]}}}, "Linear|names"),
        ("compressed-w4a16", {"config_groups": {"g": {"targets": ["re:("], "weights": {}}}}, "regular expression"),
        ("compressed-w4a16", {"config_groups": {}}, "no group"),
        ("gptq-second", {"bits": 5}, "bits is 5"),
        ("gptq-second", {"checkpoint_format": "marlin"}, "marlin.*gptq_v2"),
        ("gptq-second", {"pack_dtype": "int16"}, "pack_dtype"),
        ("gptq-second", {"dynamic": {".*": {"bits": 4, "format": "exotic"}}}, "format = 'exotic'"),
        ("awq", {"version": "gemv"}, "gemv.*gemm"),
        ("awq", {"bits": 8}, "bits is 8"),
        ("awq", {"pre_scale": 2.0}, "pre_scale"),
        ("auto-round-own", {"packing_format": "auto_round:other"}, "packing_format"),
        ("auto-round-own", {"act_bits": 8}, "act_bits"),
        ("bitsandbytes-nf4", {"hadamard": True}, "hadamard"),
    ],
)
def test_refuses_a_key_or_value_that_it_does_not_know(
    name: str, more: dict[str, Any], named: str, changed: Callable[..., Path]
) -> None:
    place = changed(name, more)
    for read in (load_spec, open_source):
        with pytest.raises(CheckpointError, match=named):
            read(place)


def cut(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: tensors[name][:-1].clone()})


def without(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(name)


def retyped(name: str, dtype: torch.dtype) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: tensors[name].to(dtype)})


def added(name: str, tensor: torch.Tensor) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("name", "edit", "named"),
    [
        ("fp8-block32", cut(DOWN + "weight_scale_inv"), "weight_scale_inv has shape"),
        ("fp8-block32", without(DOWN + "weight_scale_inv"), "no file holds .*weight_scale_inv"),
        ("fp8-block32", without(DOWN + "weight"), "no file holds .*down_proj.weight"),
        ("fp8-block32", retyped(DOWN + "weight", torch.bfloat16), "weight is BF16"),
        ("fp8-block32", retyped(DOWN + "weight_scale_inv", torch.int32), "weight_scale_inv is I32"),
        ("fp8-block32", added("model.norm.extra", torch.zeros(2, dtype=torch.int32)), "belongs to no matrix"),
        ("fp8-tensor", added(DOWN + "weight_scale", torch.ones(3)), "weight_scale has shape"),
        ("compressed-w4a16", cut(DOWN + "weight_packed"), "weight_packed has shape"),
        ("compressed-w4a16", without(DOWN + "weight_shape"), "no file holds .*weight_shape"),
        ("compressed-w4a16", added(DOWN + "weight_shape", torch.tensor([-1, 4])), r"is \[-1, 4\]"),
        ("compressed-int", without("model.layers.0.self_attn.k_proj.weight_zero_point"), "weight_zero_point"),
        ("compressed-float", without("model.layers.0.self_attn.o_proj.weight_global_scale"), "weight_global_scale"),
        ("gptq-first", cut(DOWN + "qweight"), "g_idx has shape"),
        ("gptq-first", cut(Q + "g_idx"), "g_idx has shape"),
        ("gptq-first", without(Q + "qzeros"), "qzeros"),
        ("gptq-first", retyped(Q + "scales", torch.int32), "scales is I32"),
        ("awq", cut(Q + "scales"), "scales has shape"),
        ("awq", added(Q + "g_idx", torch.zeros(4, dtype=torch.int32)), "belongs to no matrix"),
        ("modelopt-mixed", without(DOWN + "weight_scale_2"), "weight_scale_2"),
        ("modelopt-mixed", cut(DOWN + "weight_scale"), "weight_scale has shape"),
        ("bitsandbytes-nf4", cut(DOWN + "weight"), "weight has 3071 bytes"),
        ("bitsandbytes-nf4", without(DOWN + "weight.nested_absmax"), "nested_absmax"),
        (
            "bitsandbytes-nf4",
            added(DOWN + "weight.quant_state.bitsandbytes__nf4", torch.tensor([123], dtype=torch.uint8)),
            "describes no matrix",
        ),
        ("bitsandbytes-int8", added(DOWN + "weight_format", torch.tensor(2, dtype=torch.uint8)), "another GPU"),
        ("bitsandbytes-int8", without(DOWN + "SCB"), "no file holds .*SCB"),
    ],
)
def test_names_the_tensor_and_the_file_of_what_does_not_fit(
    name: str, edit: Callable[[Tensors], object], named: str, changed: Callable[..., Path]
) -> None:
    place = changed(name, edit=edit)
    with pytest.raises(CheckpointError, match=named) as raised:
        load_spec(place)
    assert "model.safetensors" in str(raised.value)


BLOCKS = "gate_up_proj_blocks has shape"


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (cut("model.layers.1.mlp.experts.gate_up_proj_scales"), "gate_up_proj_scales has shape"),
        (without("model.layers.1.mlp.experts.down_proj_scales"), "no file holds .*down_proj_scales"),
        (without("model.layers.1.mlp.experts.down_proj_blocks"), "no file holds .*down_proj_blocks"),
        (retyped("model.layers.1.mlp.experts.down_proj_blocks", torch.int32), "down_proj_blocks is I32"),
        (added("model.layers.1.mlp.experts.gate_up_proj_blocks", torch.zeros(6, 63, 2, 16, dtype=torch.uint8)), BLOCKS),
        (added("model.layers.1.mlp.experts.gate_up_proj_blocks", torch.zeros(6, 64, 32, dtype=torch.uint8)), BLOCKS),
    ],
)
def test_names_the_stack_that_does_not_fit(
    edit: Callable[[Tensors], object], named: str, family_directory: Callable[[str], Path], tmp_path: Path
) -> None:
    as_mxfp4(family_directory("gpt-oss"), tmp_path / "mxfp4", tmp_path / "float")
    tensors = load_file(tmp_path / "mxfp4" / "model.safetensors")
    edit(tensors)
    save_file(tensors, tmp_path / "mxfp4" / "model.safetensors")
    with pytest.raises(CheckpointError, match=named) as raised:
        load_spec(tmp_path / "mxfp4")
    assert "model.safetensors" in str(raised.value)


def test_refuses_a_key_of_mxfp4_that_it_does_not_know(family_directory: Callable[[str], Path]) -> None:
    config = json.loads((family_directory("gpt-oss") / "config.json").read_text())
    keys = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"], "dequantize": True}
    spec_from_config(config | {"quantization_config": keys}, {}, "here")
    with pytest.raises(CheckpointError, match="group_size = 16"):
        spec_from_config(config | {"quantization_config": keys | {"group_size": 16}}, {}, "here")


def test_a_file_cut_short_is_refused_by_name(changed: Callable[..., Path]) -> None:
    file = changed("awq") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors has"):
        load_spec(file.parent)


def test_a_config_that_lost_its_quantisation_is_refused_with_a_remedy(changed: Callable[..., Path]) -> None:
    place = changed("fp8-block32")
    config = json.loads((place / "config.json").read_text())
    del config["quantization_config"]
    (place / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"F8_E4M3.*quantization_config"):
        open_source(place)


def test_a_quantised_head_is_used_although_the_config_ties_it(changed: Callable[..., Path]) -> None:
    def own_head(tensors: Tensors) -> None:
        tensors[HEAD] = tensors[EMBEDDING].to(torch.float8_e4m3fn)
        tensors["lm_head.weight_scale_inv"] = torch.ones(2, 2)

    place = changed("fp8-block32", edit=own_head)
    assert load_spec(PLACE / "fp8-block32").tied_embeddings
    assert not load_spec(place).tied_embeddings
    assert open_source(place).shapes()[HEAD] == (64, 64)


def test_a_matrix_of_floats_needs_no_scales_whatever_the_config_ignores(changed: Callable[..., Path]) -> None:
    def as_floats(tensors: Tensors) -> None:
        tensors[DOWN + "weight"] = tensors[DOWN + "weight"].bfloat16()
        del tensors[DOWN + "weight_scale_inv"]

    place = changed("fp8-block32", edit=as_floats)
    plan = quantised_plan(place)
    assert plan is not None
    assert DOWN + "weight" in plan.floats
    assert open_source(place).take(DOWN + "weight").dtype == torch.bfloat16


def test_says_what_it_does_not_round_and_which_scales_it_does_not_use() -> None:
    remarks = load_spec(PLACE / "fp8-tensor").remarks
    assert any("activations to FP8 (static)" in remark for remark in remarks)
    assert any("k_scale" in remark and "cache.dtype" in remark for remark in remarks)
    assert any("kv_cache_quant_algo" in remark for remark in load_spec(PLACE / "modelopt-mixed").remarks)
    assert any("kv_cache_scheme" in remark for remark in load_spec(PLACE / "compressed-float").remarks)
    assert len(load_spec(PLACE / "compressed-w4a16").remarks) == 1


def test_modelopts_file_beside_the_config_counts_for_the_fingerprint(changed: Callable[..., Path]) -> None:
    place = changed("modelopt-mixed")
    before = safetensors_fingerprint(place)
    file = place / "hf_quant_config.json"
    file.write_text(file.read_text() + "\n")
    assert safetensors_fingerprint(place) != before


def test_a_config_alone_is_checked_too() -> None:
    config = json.loads((PLACE / "awq" / "config.json").read_text())
    assert spec_from_config(config, {}, "here").hidden_size == 64
    config["quantization_config"]["version"] = "gemv"
    with pytest.raises(CheckpointError, match="gemv"):
        spec_from_config(config, {}, "here")
    with pytest.raises(CheckpointError, match="must be an object"):
        spec_from_config(config | {"quantization_config": [1]}, {}, "here")


def test_one_group_of_all_columns_is_as_wide_as_its_matrix(changed: Callable[..., Path]) -> None:
    def first_group(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith((".scales", ".qzeros"))]:
            tensors[name] = tensors[name][:1].clone()

    plan = quantised_plan(changed("awq", {"group_size": -1}, first_group))
    assert plan is not None
    grouped = [matrix for matrix in plan.matrices.values() if isinstance(matrix, AwqMatrix)]
    assert grouped
    assert all(matrix.group == matrix.columns for matrix in grouped)
