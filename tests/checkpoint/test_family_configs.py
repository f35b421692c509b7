"""config.json of every family: what hub releases say, defaults that count, and refusals by name."""

import json
import math
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from twostroke.checkpoint.config_json import load_spec, spec_from_config
from twostroke.checkpoint.layout import num_parameters, weight_bytes
from twostroke.checkpoint.spec import DenseFfn, ExpertsFfn, LatentAttention, ModelSpec, PlainAttention
from twostroke.core.errors import CheckpointError
from twostroke.model.ops.torch_ops import TorchOps
from twostroke.model.weights.tensors import open_source
from twostroke.model.weights.weights import Weights, load_weights

BASE: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
}


def spec(architecture: str, **changes: Any) -> ModelSpec:
    return spec_from_config({**BASE, "architectures": [architecture], **changes}, {}, "ckpt")


def windows(found: ModelSpec) -> list[int | None]:
    return [layer.window for layer in found.layers]


def test_mistrals_window_is_none_where_it_is_null_and_4096_where_it_is_absent() -> None:
    assert windows(spec("MistralForCausalLM", sliding_window=None)) == [None] * 4
    assert windows(spec("MistralForCausalLM")) == [4096] * 4
    kinds = ["sliding_attention", "full_attention"] * 2
    assert windows(spec("MistralForCausalLM", sliding_window=32, layer_types=kinds)) == [32, None] * 2


def test_qwens_windows_count_only_where_they_are_asked_for() -> None:
    asked = {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 3}
    assert windows(spec("Qwen2ForCausalLM", **{**asked, "use_sliding_window": False})) == [None] * 4
    assert windows(spec("Qwen2ForCausalLM", **asked)) == [None, None, None, 32]
    assert windows(spec("Qwen3ForCausalLM", **asked)) == [None, None, None, 32]
    moe = {**asked, "num_experts": 8, "moe_intermediate_size": 16}
    assert windows(spec("Qwen2MoeForCausalLM", **moe)) == [32, None, 32, None]
    assert windows(spec("Qwen3MoeForCausalLM", **moe)) == [32] * 4


def test_gemma_2_as_the_hub_has_it_leaves_much_unsaid() -> None:
    found = spec("Gemma2ForCausalLM", head_dim=32, sliding_window=64, hidden_act="gelu_pytorch_tanh")
    assert windows(found) == [64, None, 64, None]
    assert isinstance(found.attention, PlainAttention)
    assert (found.attention.softcap, found.final_softcap, found.attention.scale) == (50.0, 30.0, 256**-0.5)
    assert (found.tied_embeddings, found.norm_offset, found.sandwich_norms) == (True, 1.0, True)
    assert found.embedding_scale == 8.0
    assert found.activation == "gelu_tanh"


def test_gemma_3_in_the_old_keys_and_in_the_new() -> None:
    old = spec(
        "Gemma3ForCausalLM",
        head_dim=32,
        sliding_window=64,
        sliding_window_pattern=2,
        rope_theta=1e6,
        rope_local_base_freq=5000.0,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    )
    new = spec(
        "Gemma3ForCausalLM",
        head_dim=32,
        sliding_window=64,
        layer_types=["sliding_attention", "full_attention"] * 2,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
        },
    )
    assert old == new
    assert [layer.rope for layer in old.layers] == [1, 0, 1, 0]
    assert [rope.theta for rope in old.ropes] == [1e6, 5000.0]
    assert windows(spec("Gemma3ForCausalLM", head_dim=32, num_hidden_layers=12)) == ([4096] * 5 + [None]) * 2


@pytest.mark.parametrize("kind", ["longrope", "su", "yarn"])
def test_phis_first_names_for_longrope(kind: str) -> None:
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    found = spec("Phi3ForCausalLM", original_max_position_embeddings=256, rope_scaling={"type": kind, **factors})
    scaling = found.ropes[0].scaling
    assert scaling is not None
    assert (scaling.kind, scaling.original_max_len, scaling.factor) == ("longrope", 256, 4.0)
    assert scaling.magnitude == pytest.approx(math.sqrt(1 + math.log(4) / math.log(256)))
    assert found.length_matters


def test_yarn_serves_what_it_was_stretched_to() -> None:
    rope = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    assert spec("Qwen2ForCausalLM", rope_scaling=rope).max_model_len == 4096


def test_experts_stand_where_the_config_says() -> None:
    moe = {"num_experts": 8, "moe_intermediate_size": 16}
    found = spec("Qwen3MoeForCausalLM", **moe, decoder_sparse_step=2, mlp_only_layers=[3])
    assert [type(layer.ffn) for layer in found.layers] == [DenseFfn, ExpertsFfn, DenseFfn, DenseFfn]
    found = spec("DeepseekV3ForCausalLM", **MLA, first_k_dense_replace=3)
    assert [type(layer.ffn) for layer in found.layers] == [DenseFfn] * 3 + [ExpertsFfn]
    assert isinstance(found.attention, LatentAttention)
    assert found.kv_spec("fp8").bytes_per_token == 4 * (16 + 1 + 8 + 1)


GPT_OSS_20B: dict[str, Any] = {  # as the hub has it, without what nobody reads
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "pad_token_id": 199999,
    "quantization_config": {
        "modules_to_not_convert": [
            *("model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"),
        ],
        "quant_method": "mxfp4",
    },
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        **{"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096},
        **{"rope_type": "yarn", "truncate": False},
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "vocab_size": 201088,
}


def test_gpt_oss_as_the_hub_has_it() -> None:
    found = spec_from_config(GPT_OSS_20B, {"eos_token_id": [200002, 199999, 200012]}, "ckpt")
    attention, ffn, scaling = found.attention, found.layers[0].ffn, found.ropes[0].scaling
    assert isinstance(attention, PlainAttention)
    assert (attention.sinks, attention.qkv_bias, attention.output_bias, attention.softcap) == (True, True, True, None)
    assert windows(found) == [128, None] * 12
    assert isinstance(ffn, ExpertsFfn)
    assert (ffn.width, ffn.bias, ffn.routing.per_token, ffn.routing.bias) == (2880, True, 4, True)
    assert (found.activation, ffn.routing.scores) == ("clamped_swiglu", "softmax_of_chosen")
    assert scaling is not None
    assert (scaling.kind, scaling.truncate, scaling.magnitude) == ("yarn", False, pytest.approx(1.3465736))
    assert (found.max_model_len, found.eos_ids, found.rms_eps) == (131072, (200002, 199999, 200012), 1e-5)
    assert num_parameters(found) == 20_914_757_184  # the model card's 21 B
    unsaid = ("rope_scaling", "rope_theta", "layer_types", "swiglu_limit", "sliding_window")
    told = {name: value for name, value in GPT_OSS_20B.items() if name not in unsaid}
    assert spec_from_config(told, {"eos_token_id": [200002, 199999, 200012]}, "ckpt") == found


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("LlamaForCausalLM", {"num_local_experts": 4}, "num_local_experts"),
    ("LlamaForCausalLM", {"sliding_window": 64}, "sliding_window"),
    ("LlamaForCausalLM", {"attn_logit_softcapping": 30.0}, "attn_logit_softcapping"),
    ("LlamaForCausalLM", {"attention_sinks": 4}, "attention_sinks"),
    ("LlamaForCausalLM", {"alibi": True}, "alibi"),
    ("LlamaForCausalLM", {"vision_config": {"depth": 2}}, "vision.*text-only"),
    ("LlamaForCausalLM", {"quantization_config": {"quant_method": "hqq"}}, "hqq.*int8"),
    ("LlamaForCausalLM", {"rope_scaling": {"rope_type": "linear"}}, "factor"),
    ("LlamaForCausalLM", {"attention_bias": "yes"}, "attention_bias"),
    ("LlamaForCausalLM", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("MistralForCausalLM", {"layer_types": ["chunked_attention"] * 4}, "chunked_attention"),
    ("MistralForCausalLM", {"layer_types": ["full_attention"]}, "one per layer"),
    ("Qwen2ForCausalLM", {"hidden_act": "relu"}, "relu"),
    ("Qwen3ForCausalLM", {"num_key_value_heads": 3}, "KV heads"),
    ("Gemma2ForCausalLM", {"hidden_activation": "gelu"}, "gelu"),
    ("Gemma3ForCausalLM", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("Gemma3ForCausalLM", {"attn_logit_softcapping": 30.0}, "attn_logit_softcapping"),
    ("Gemma3ForConditionalGeneration", {"vision_config": {"depth": 2}}, "text-only"),
    ("Phi3ForCausalLM", {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": []}}, "short_fac"),
    ("MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 5}, "5 experts per token"),
    ("DeepseekV2ForCausalLM", {**MLA, "topk_method": "noaux_tc"}, "noaux_tc"),
    ("DeepseekV2ForCausalLM", {**MLA, "norm_topk_prob": True}, "norm_topk_prob"),
    ("DeepseekV2ForCausalLM", {**MLA, "scoring_func": "sigmoid"}, "scoring_func"),
    ("DeepseekV3ForCausalLM", {**MLA, "scoring_func": "softmax"}, "scoring_func"),
    ("DeepseekV3ForCausalLM", {**MLA, "moe_layer_freq": 2}, "moe_layer_freq"),
    ("DeepseekV3ForCausalLM", {**MLA, "n_group": 3}, "3 groups"),
    ("GptOssForCausalLM", {"swiglu_limit": 5.0}, "swiglu_limit is 5.0; must be 7.0"),
    ("GptOssForCausalLM", {"swiglu_alpha": 1.0}, "swiglu_alpha"),
    ("GptOssForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 5}, "5 experts per token"),
    ("FalconForCausalLM", {}, "FalconForCausalLM.*served: LlamaForCausalLM"),
]


@pytest.mark.parametrize(("architecture", "changes", "named"), REFUSED, ids=lambda v: v if isinstance(v, str) else "")
def test_refuses_by_name_what_it_does_not_serve(architecture: str, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        spec(architecture, **changes)


# ------------------------------------------------------------------ tensors


def load(directory: Path, ops: TorchOps | None = None) -> Weights:
    return load_weights(open_source(directory), load_spec(directory), ops or TorchOps(torch.float32))


@pytest.fixture
def copied(family_directory: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A family's checkpoint to be changed."""
    return lambda name: Path(shutil.copytree(family_directory(name), tmp_path / name))


def _rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("llama-biases", "model.layers.1.mlp.down_proj.bias"),
        ("qwen2", "model.layers.2.self_attn.k_proj.bias"),
        ("qwen3", "model.layers.0.self_attn.q_norm.weight"),
        ("gemma2", "model.layers.0.post_feedforward_layernorm.weight"),
        ("phi3", "model.layers.1.self_attn.qkv_proj.weight"),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.3.w2.weight"),
        ("qwen2-moe-windows", "model.layers.1.mlp.shared_expert_gate.weight"),
        ("deepseek-v2", "model.layers.2.self_attn.q_a_layernorm.weight"),
        ("deepseek-v3", "model.layers.1.mlp.gate.e_score_correction_bias"),
        ("gpt-oss", "model.layers.1.self_attn.sinks"),
        ("gpt-oss", "model.layers.1.mlp.router.bias"),
    ],
)
def test_names_the_tensor_that_is_missing_or_wrongly_shaped(name: str, tensor: str, copied: Callable) -> None:
    directory = copied(name)
    kept = load_file(directory / "model.safetensors")[tensor]
    _rewrite(directory, lambda tensors: tensors.update({tensor: torch.zeros(3, 5)}))
    with pytest.raises(CheckpointError, match=rf"{tensor}.*\[3, 5\]"):
        load(directory)
    _rewrite(directory, lambda tensors: tensors.pop(tensor))
    lacked = tensor.replace("qkv_proj", "q_proj")  # without the fused one, the others are asked for
    with pytest.raises(CheckpointError, match=f"lacks {lacked}"):
        load(directory)
    _rewrite(directory, lambda tensors: tensors.update({tensor: kept, tensor + "_extra": torch.zeros(2)}))
    with pytest.raises(CheckpointError, match=f"{tensor}_extra"):
        load(directory)


def test_fused_and_unfused_projections_are_the_same_model(copied: Callable, make_hand: Callable) -> None:
    fused, ids = copied("phi3"), list(range(40))
    (expected,) = make_hand(fused).logits([("a", 0, ids)])

    def split(tensors: dict[str, torch.Tensor]) -> None:
        for index in range(3):
            at = f"model.layers.{index}."
            qkv = tensors.pop(at + "self_attn.qkv_proj.weight").split([64, 32, 32])
            gate_up = tensors.pop(at + "mlp.gate_up_proj.weight").chunk(2)
            tensors |= {f"{at}self_attn.{n}_proj.weight": t.clone() for n, t in zip("qkv", qkv, strict=True)}
            tensors |= {f"{at}mlp.{n}_proj.weight": t.clone() for n, t in zip(("gate", "up"), gate_up, strict=True)}

    unfused = Path(shutil.copytree(fused, fused.parent / "unfused"))
    _rewrite(unfused, split)
    (ours,) = make_hand(unfused).logits([("a", 0, ids)])
    assert torch.equal(ours, expected)


def test_stacks_of_experts_that_do_not_fit_are_named(copied: Callable) -> None:
    directory, at = copied("gpt-oss"), "model.layers.1.mlp.experts."
    kept = load_file(directory / "model.safetensors")

    def refused(named: str, **changes: torch.Tensor | None) -> None:
        tensors = {**kept, **{at + name: tensor for name, tensor in changes.items()}}
        save_file({n: t for n, t in tensors.items() if t is not None}, directory / "model.safetensors")
        with pytest.raises(CheckpointError, match=named):
            load(directory)

    refused(r"experts.6.down_proj.weight, which", down_proj=torch.zeros(7, 32, 64))
    refused(r"experts.0.down_proj.weight has shape \[63, 32\]", down_proj=torch.zeros(6, 32, 63))
    refused(r"experts.0.gate_proj.weight has shape \[31, 64\]", gate_up_proj=torch.zeros(6, 64, 62))
    refused("experts.gate_up_proj, which", gate_up_proj=torch.zeros(6, 64, 63))
    refused("experts.down_proj_bias, which", down_proj_bias=torch.zeros(6))
    refused("lacks model.layers.1.mlp.experts.0.gate_proj.weight", gate_up_proj=None)
    # Without the biases of its gates it is no gpt-oss: other families' stacks have another order.
    refused("experts.(down|gate_up)_proj(_bias)?, which", gate_up_proj_bias=None)


def test_layers_behind_the_decoders_are_left_alone_where_the_config_knows_of_them(copied: Callable) -> None:
    directory = copied("deepseek-v3")
    _rewrite(directory, lambda tensors: tensors.update({"model.layers.3.eh_proj.weight": torch.zeros(2, 2)}))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    load(directory)
    (directory / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 0}))
    with pytest.raises(CheckpointError, match="eh_proj"):
        load(directory)


def test_what_needs_no_change_is_a_view_of_the_file(copied: Callable) -> None:
    directory = copied("llama-linear")
    weights = load(directory)
    source = open_source(directory)
    stored = source.take("model.embed_tokens.weight")
    assert torch.equal(weights.embedding, stored)
    maps = Path("/proc/self/maps").read_text().splitlines()
    spans = [line.split()[0].split("-") for line in maps if str(directory) in line]
    for tensor in (weights.embedding, weights.layers[0].attention.output.matrix, weights.head.matrix):
        address = tensor.data_ptr()
        assert any(int(start, 16) <= address < int(end, 16) for start, end in spans)


class Watched:
    """A source that knows how many of the matrices that it gave are still held."""

    def __init__(self, directory: Path) -> None:
        self._source = open_source(directory)
        self.where, self.shapes, self.fingerprint = directory.name, self._source.shapes, self._source.fingerprint
        self._given: list[weakref.ref[torch.Tensor]] = []
        self.most = 0

    def take(self, name: str) -> torch.Tensor:
        tensor = self._source.take(name).clone()
        if tensor.ndim == 2 and not name.endswith(("gate.weight", "router.weight")):  # a float32 router is kept
            self._given.append(weakref.ref(tensor))
        self.most = max(self.most, sum(ref() is not None for ref in self._given))
        return tensor


@pytest.mark.parametrize("name", ["llama-biases", "qwen2-moe-windows", "deepseek-v2", "gpt-oss"])
def test_tensors_are_packed_as_they_come(name: str, family_directory: Callable[[str], Path]) -> None:
    directory = family_directory(name)
    source = Watched(directory)
    load_weights(source, load_spec(directory), TorchOps(torch.bfloat16, quantization="int8"))
    assert source.most <= 3  # queries, keys and values


@pytest.mark.parametrize("name", ["llama-biases", "gemma2", "mixtral", "deepseek-v3", "gpt-oss"])
def test_counts_bytes_of_weights_of_8_bits(name: str, family_directory: Callable[[str], Path]) -> None:
    found = load_spec(family_directory(name))
    whole, small = weight_bytes(found, "bfloat16"), weight_bytes(found, "bfloat16", "int8")
    assert whole == 2 * num_parameters(found)
    assert weight_bytes(found, "float32", "int8") > small
    table = 2 * found.vocab_size * found.hidden_size
    assert table + (whole - table) / 2 < small < (whole + table if found.tied_embeddings else whole)
    # One row's worth of layers: what a layer of one more adds.
    more = replace(found, layers=(*found.layers, found.layers[-1]))
    added = weight_bytes(more, "bfloat16", "int8") - small
    assert (num_parameters(more) - num_parameters(found)) < added < weight_bytes(more, "bfloat16") - whole
