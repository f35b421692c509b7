"""Checkpoints of families with recurrent layers: what their configs say, and the forms in which they are stored."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints.logits_oracle import assert_same_logits
from support.checkpoints.quantised_checkpoints import as_fp8
from support.checkpoints.tiny_families import VOCAB

from twostroke.checkpoint.config_json import load_spec, spec_from_config
from twostroke.checkpoint.shards import Shard, shard_spec
from twostroke.checkpoint.spec import DeltaNet, DenseFfn, ExpertsFfn, ModelSpec, PlainAttention
from twostroke.core.errors import CheckpointError, ConfigError
from twostroke.model.ops.device import refuse_unserved

# The fields of Qwen/Qwen3.5-27B's config.json that describe its text model.
DENSE: dict[str, Any] = {
    "attention_bias": False,
    "attn_output_gate": True,
    "dtype": "bfloat16",
    "eos_token_id": 248044,
    "full_attention_interval": 4,
    "head_dim": 256,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "intermediate_size": 17408,
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 16,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 48,
    "linear_value_head_dim": 128,
    "mamba_ssm_dtype": "float32",
    "max_position_embeddings": 262144,
    "mlp_only_layers": [],
    "model_type": "qwen3_5_text",
    "mtp_num_hidden_layers": 1,
    "num_attention_heads": 24,
    "num_hidden_layers": 64,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {
        "mrope_interleaved": True,
        "mrope_section": [11, 11, 10],
        "partial_rotary_factor": 0.25,
        "rope_theta": 10000000,
        "rope_type": "default",
    },
    "vocab_size": 248320,
}
NESTED: dict[str, Any] = {
    "architectures": ["Qwen3_5ForConditionalGeneration"],
    "image_token_id": 248056,
    "model_type": "qwen3_5",
    "text_config": DENSE,
    "tie_word_embeddings": False,
    "vision_config": {"depth": 27, "hidden_size": 1152},
}


def nested(**changes: Any) -> ModelSpec:
    return spec_from_config({**NESTED, "text_config": {**DENSE, **changes}}, {}, "ckpt")


def test_reads_the_text_model_of_a_checkpoint_with_a_vision_part() -> None:
    found = nested()
    assert [layer.mixer for layer in found.layers] == (["delta"] * 3 + ["attention"]) * 16
    assert found.delta == DeltaNet(16, 48, 128, 128, 4)
    assert isinstance(found.attention, PlainAttention)
    assert (found.attention.output_gate, found.attention.head_norms, found.attention.head_dim) == (True, True, 256)
    assert (found.ropes[0].width, found.ropes[0].theta) == (64, 1e7)
    assert (found.norm_offset, found.max_model_len, found.eos_ids) == (1.0, 262144, (248044,))
    assert found.dtype == "bfloat16"
    assert any("vision" in remark for remark in found.remarks)


def test_only_layers_that_attend_have_a_cache_and_the_others_a_state_of_constant_size() -> None:
    found = nested()
    assert found.kv_spec("fp8").bytes_per_token == 16 * 2 * 4 * (256 + 1)
    assert found.cache_layers[:8] == (None, None, None, 0, None, None, None, 1)
    assert found.state_layers[:8] == (0, 1, 2, None, 3, 4, 5, None)
    assert found.state_spec is not None
    assert found.state_spec.num_bytes == 48 * 4 * (3 * (2 * 2048 + 6144) + 48 * 128 * 128)


def test_an_interval_stands_for_absent_layer_types_and_a_quarter_for_an_absent_rotary_part() -> None:
    found = nested(layer_types=None, rope_parameters={"rope_type": "default", "rope_theta": 1e7})
    assert found.layers == nested().layers
    assert found.ropes[0].width == 64
    assert [layer.mixer for layer in nested(layer_types=None, full_attention_interval=2).layers[:2]] == [
        "delta",
        "attention",
    ]


def test_experts_of_qwen3_next_stand_where_the_config_says_and_those_of_qwen3_5_in_every_layer() -> None:
    sizes = {"num_hidden_layers": 4, "layer_types": None}
    moe = {**DENSE, **sizes, "num_experts": 8, "num_experts_per_tok": 2, "mlp_only_layers": [2]}
    next_ = spec_from_config({**moe, "architectures": ["Qwen3NextForCausalLM"]}, {}, "ckpt")
    assert [type(layer.ffn) for layer in next_.layers] == [ExpertsFfn, ExpertsFfn, DenseFfn, ExpertsFfn]
    del moe["intermediate_size"]
    later = spec_from_config({**moe, "architectures": ["Qwen3_5MoeForCausalLM"]}, {}, "ckpt")
    for layer in (next_.layers[0], *later.layers):
        assert isinstance(layer.ffn, ExpertsFfn)
        assert (layer.ffn.width, layer.ffn.shared_width, layer.ffn.shared_gate) == (512, 512, True)
        assert layer.ffn.routing.normalised


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"layer_types": ["linear_attention"] * 64}, "of both kinds"),
        ({"layer_types": ["full_attention"] * 64}, "of both kinds"),
        ({"layer_types": ["full_attention"]}, "64 kinds, one per layer"),
        ({"layer_types": ["sliding_attention"] * 64}, "linear_attention, full_attention"),
        ({"attn_output_gate": False}, "attn_output_gate is false"),
        ({"linear_num_key_heads": 5}, "48 value heads for 5 key heads"),
        ({"linear_conv_kernel_dim": 1}, "1 taps"),
        ({"sliding_window": 64}, "sliding_window"),
    ],
)
def test_refuses_by_name_what_it_does_not_serve(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        nested(**changes)


def test_refuses_a_nested_config_without_its_text() -> None:
    with pytest.raises(CheckpointError, match="no text_config"):
        spec_from_config({**NESTED, "text_config": None}, {}, "ckpt")


def test_several_ranks_and_a_gpu_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"recurrent layers.*tensor_parallel_size 1"):
        shard_spec(nested(), Shard(0, 2))
    assert shard_spec(nested(), Shard(0, 1)).local == nested()
    with pytest.raises(ConfigError, match=r"recurrent layers.*model\.device: cpu"):
        refuse_unserved(nested(), "fp8")


# ------------------------------------------------------------------ stored forms


@pytest.fixture(scope="module")
def with_vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of text and vision, saved by transformers."""
    import transformers

    text = {
        "vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8, "moe_intermediate_size": 24, "num_experts": 6,
        "num_experts_per_tok": 2, "shared_expert_intermediate_size": 40, "max_position_embeddings": 512,
        "layer_types": ["linear_attention", "full_attention"], "initializer_range": 0.15, "eos_token_id": 1,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1],
        },
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 64,
        "num_position_embeddings": 16,
    }  # fmt: skip
    ids = {"image_token_id": 150, "video_token_id": 151, "vision_start_token_id": 152, "vision_end_token_id": 153}
    torch.manual_seed(3)
    config = transformers.Qwen3_5MoeConfig(text_config=text, vision_config=vision, dtype="float32", **ids)
    directory = tmp_path_factory.mktemp("with-vision")
    transformers.Qwen3_5MoeForConditionalGeneration(config).save_pretrained(directory)
    return directory


IDS = torch.randint(150, (70,), generator=torch.Generator().manual_seed(3)).tolist()


def test_answers_texts_as_transformers_does_with_its_vision_part_left_alone(
    with_vision: Path, make_hand: Callable[..., Any]
) -> None:
    from transformers import AutoModelForImageTextToText

    assert any(name.startswith("model.visual.") for name in load_file(with_vision / "model.safetensors"))
    model = AutoModelForImageTextToText.from_pretrained(with_vision, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        expected = model(torch.tensor([IDS])).logits[0]
    (ours,) = make_hand(with_vision).logits([("a", 0, IDS)])
    assert_same_logits(ours, expected)


def _stacked(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Experts of each layer in one tensor, gate before up, as the hub's checkpoints have them."""
    found, stacks = {}, {}
    for name, tensor in tensors.items():
        before, experts, after = name.partition(".experts.")
        if experts:
            number, part, _ = after.split(".")
            stacks.setdefault(f"{before}.experts.{part}", {})[int(number)] = tensor
        else:
            found[name] = tensor
    whole = {name: torch.stack([stack[i] for i in range(len(stack))]) for name, stack in stacks.items()}
    for name, stack in whole.items():
        if name.endswith("gate_proj"):
            found[name.replace("gate_proj", "gate_up_proj")] = torch.cat((stack, whole[name.replace("gate", "up")]), 1)
        elif name.endswith("down_proj"):
            found[name] = stack
    return found


def test_stacked_experts_prediction_layers_and_nested_names_are_the_same_model(
    family_directory: Callable[[str], Path], make_hand: Callable[..., Any], tmp_path: Path
) -> None:
    plain = family_directory("qwen3.5-moe")
    tensors = load_file(plain / "model.safetensors")
    assert any(".experts.0.up_proj" in name for name in tensors)
    other = Path(shutil.copytree(plain, tmp_path / "nested"))
    config = json.loads((other / "config.json").read_text())
    outer = {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "text_config": config,
        "vision_config": {"depth": 1},
    }
    (other / "config.json").write_text(json.dumps(outer))
    renamed = {name.replace("model.", "model.language_model.", 1): t for name, t in _stacked(tensors).items()}
    more = {"model.visual.pos_embed.weight": torch.zeros(2, 2), "mtp.fc.weight": torch.zeros(3, 3)}
    save_file({**{n: t.contiguous() for n, t in renamed.items()}, **more}, other / "model.safetensors")
    (expected,), (ours,) = make_hand(plain).logits([("a", 0, IDS)]), make_hand(other).logits([("a", 0, IDS)])
    assert torch.equal(ours, expected)
    assert load_spec(other).delta == load_spec(plain).delta


def test_an_fp8_export_with_nested_names_is_its_own_dequantised_model(
    family_directory: Callable[[str], Path], make_hand: Callable[..., Any], tmp_path: Path
) -> None:
    quantised, floats = tmp_path / "fp8", tmp_path / "floats"
    as_fp8(family_directory("qwen3.5"), quantised, floats)
    config = json.loads((quantised / "config.json").read_text())
    outer = {"architectures": ["Qwen3_5ForConditionalGeneration"], "quantization_config": config["quantization_config"]}
    (quantised / "config.json").write_text(json.dumps({**outer, "text_config": config, "vision_config": {"depth": 1}}))
    tensors = load_file(quantised / "model.safetensors")
    nested_names = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in tensors.items()}
    save_file(nested_names, quantised / "model.safetensors")
    (expected,), (ours,) = (make_hand(place).logits([("a", 0, IDS)]) for place in (floats, quantised))
    assert torch.equal(ours, expected)


def test_names_a_missing_tensor_of_a_recurrent_layer(
    family_directory: Callable[[str], Path], make_hand: Callable[..., Any], tmp_path: Path
) -> None:
    damaged = Path(shutil.copytree(family_directory("qwen3.5"), tmp_path / "damaged"))
    tensors = load_file(damaged / "model.safetensors")
    del tensors["model.layers.0.linear_attn.conv1d.weight"]
    save_file(tensors, damaged / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.0\.linear_attn\.conv1d\.weight"):
        make_hand(damaged)
