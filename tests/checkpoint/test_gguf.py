"""GGUF files against the safetensors that they were made of, the package's own numbers, and transformers."""

import dataclasses
import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file, save_file
from support.checkpoints.gguf_files import BLOCK_SCALES, shards, stored, write_gguf
from support.checkpoints.logits_oracle import assert_same_logits
from support.checkpoints.models import resolved
from support.checkpoints.tiny_families import (
    _LONG,
    _OSS,
    _PHI,
    _YARN,
    VOCAB,
    TinyFamily,
    _mla,
    _moe,
    _rope,
    write_family,
)

from twostroke.checkpoint.config_json import load_spec
from twostroke.checkpoint.gguf.file import GgufFile
from twostroke.checkpoint.locate import located, served_name
from twostroke.core.errors import CheckpointError
from twostroke.model.loader import RunnerOptions, load_runner, numerics_class
from twostroke.model.weights.gguf_source import GgufSource
from twostroke.model.weights.tensors import open_source, weights_fingerprint
from twostroke.model.weights.weights import check_tensors
from twostroke.text.templates.template import ChatTemplate
from twostroke.text.tokenizer import Tokenizer

KINDS = [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.MXFP4, *BLOCK_SCALES]
_SLIDES = {"head_dim": 24, "sliding_window": 20, "query_pre_attn_scalar": 24, "tie_word_embeddings": True}
_GEMMA3 = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
_MSCALES = {"mscale": 0.9, "mscale_all_dim": 0.9}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}

FAMILIES = [
    TinyFamily("llama", "LlamaConfig", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    TinyFamily("llama-linear", "LlamaConfig", {**_rope("linear", factor=4.0), "num_key_value_heads": 1}),
    TinyFamily("llama-yarn", "LlamaConfig", _rope("yarn", **_YARN)),
    TinyFamily("mistral", "MistralConfig", {"sliding_window": 40, "head_dim": 24}, shard_size="60KB"),
    TinyFamily("qwen2", "Qwen2Config"),
    TinyFamily("qwen3", "Qwen3Config", {"head_dim": 24, "attention_bias": True}),
    TinyFamily("gemma2", "Gemma2Config", {**_SLIDES, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 4.0}),
    TinyFamily("gemma3", "Gemma3TextConfig", {**_SLIDES, "layer_types": _LAYERS, "rope_parameters": _GEMMA3}),
    TinyFamily("phi3", "Phi3Config", {"sliding_window": 40}),
    TinyFamily("mixtral", "MixtralConfig", {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": None}),
    TinyFamily(
        "qwen2-moe",
        "Qwen2MoeConfig",
        _moe(shared_expert_intermediate_size=40, norm_topk_prob=False, mlp_only_layers=[1]),
    ),
    TinyFamily("qwen3-moe", "Qwen3MoeConfig", _moe(head_dim=16, norm_topk_prob=True, mlp_only_layers=[1])),
    TinyFamily(
        "deepseek-v2",
        "DeepseekV2Config",
        _mla(
            topk_method="group_limited_greedy",
            n_group=4,
            topk_group=2,
            routed_scaling_factor=1.7,
            n_shared_experts=2,
            **_rope("yarn", **_YARN, **_MSCALES),
        ),
    ),
    TinyFamily("deepseek-v3", "DeepseekV3Config", _mla(q_lora_rank=None, n_group=4, topk_group=2, n_shared_experts=1)),
    TinyFamily("gpt-oss", "GptOssConfig", {**_OSS, "num_local_experts": 5, "num_experts_per_tok": 2}),
]
MORE = {
    "gemma2": {"ARCH.attention.sliding_window": 20},
    "gemma3": {"ARCH.attention.sliding_window_pattern": 2, "ARCH.rope.freq_base_swa": 100.0},
}
BY_NAME = {family.name: family for family in FAMILIES}
IDS = torch.randint(VOCAB, (120,), generator=torch.Generator().manual_seed(3)).tolist()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's checkpoint in Hugging Face's format."""
    made: dict[str, Path] = {}

    def write(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            write_family(BY_NAME[name], made[name])
        return made[name]

    return write


@pytest.mark.parametrize("name", BY_NAME)
def test_every_family_is_what_its_safetensors_are(
    name: str, tiny: Callable[[str], Path], make_hand: Callable[..., Any], tmp_path: Path
) -> None:
    directory, path = tiny(name), tmp_path / "m.gguf"
    write_gguf(directory, path, metadata=MORE.get(name))
    theirs, ours = make_hand(directory), make_hand(path)
    assert dataclasses.replace(ours.spec, architecture="", extra_layers=0) == dataclasses.replace(
        theirs.spec, architecture="", extra_layers=0
    )
    (expected,), (logits,) = theirs.logits([("a", 0, IDS)]), ours.logits([("a", 0, IDS)])
    # Gemma's norms are stored plus one and rounded so; all else is the same number.
    if "gemma" in name:
        assert_same_logits(logits, expected)
    else:
        assert torch.equal(logits, expected)


def test_experts_and_the_way_up_of_older_files(
    tiny: Callable[[str], Path], make_hand: Callable[..., Any], tmp_path: Path
) -> None:
    """One tensor per expert, latent attention's way up in one piece."""
    for name, drop in (("mixtral", "_exps"), ("deepseek-v3", "attn_k_b")):
        directory, path = tiny(name), tmp_path / f"{name}.gguf"
        tensors = {n: t.numpy() for f in shards(directory) for n, t in load_file(f).items()}
        old, dropped = {}, []
        for layer in range(3):
            at = f"model.layers.{layer}."
            if name == "mixtral":
                for theirs, ours in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
                    dropped.append(f"blk.{layer}.ffn_{ours}{drop}.weight")
                    for e in range(5):
                        expert = f"{at}block_sparse_moe.experts.{e}.{theirs}.weight"
                        old[f"blk.{layer}.ffn_{ours}.{e}.weight"] = tensors[expert]
            else:
                dropped += [f"blk.{layer}.attn_k_b.weight", f"blk.{layer}.attn_v_b.weight"]
                old[f"blk.{layer}.attn_kv_b.weight"] = tensors[at + "self_attn.kv_b_proj.weight"]
        write_gguf(directory, path, drop=tuple(dropped), extra=old)
        (expected,) = make_hand(directory).logits([("a", 0, IDS)])
        assert torch.equal(make_hand(path).logits([("a", 0, IDS)])[0], expected)


# ---------------------------------------------------------------- rotary factors that are tensors


def test_llama3_scaling_comes_as_factors(make_hand: Callable[..., Any], tmp_path: Path) -> None:
    write_family(TinyFamily("l3", "LlamaConfig", _rope("llama3", **LLAMA3)), tmp_path)
    frequencies = 10000.0 ** -(np.arange(0, 16, 2) / 16)
    wavelengths = 2 * np.pi / frequencies
    smooth = np.clip((64 / wavelengths - 1) / 3, 0, 1)
    factors = {"rope_freqs.weight": 1 / ((1 - smooth) / 8 + smooth)}
    write_gguf(tmp_path, tmp_path / "m.gguf", extra=factors)
    write_gguf(tmp_path, tmp_path / "without.gguf")
    write_gguf(tmp_path, tmp_path / "ones.gguf", extra={"rope_freqs.weight": np.ones(8)})
    (expected,) = make_hand(tmp_path).logits([("a", 0, IDS)])
    without, ones = (make_hand(tmp_path / f"{n}.gguf").logits([("a", 0, IDS)])[0] for n in ("without", "ones"))
    assert_same_logits(make_hand(tmp_path / "m.gguf").logits([("a", 0, IDS)])[0], expected)
    assert (without - expected).abs().max() > 0.1  # the factors act
    assert torch.equal(without, ones)


@pytest.mark.parametrize("length", [320, 512])
def test_longrope_comes_as_factors(length: int, make_hand: Callable[..., Any], tmp_path: Path) -> None:
    fields = {**_PHI, "original_max_position_embeddings": 320}
    rope = _rope("longrope", partial_rotary_factor=0.75, **_LONG)
    write_family(TinyFamily("phi", "Phi3Config", {**fields, **rope}), tmp_path)
    factors = {f"rope_factors_{n}.weight": np.array(_LONG[n + "_factor"]) for n in ("short", "long")}
    spec = load_spec(tmp_path)
    assert spec.ropes[0].scaling is not None
    metadata = {
        "ARCH.rope.dimension_count": 12,
        "ARCH.rope.scaling.original_context_length": 320,
        "ARCH.rope.scaling.attn_factor": spec.ropes[0].scaling.magnitude,
    }
    write_gguf(tmp_path, tmp_path / "m.gguf", metadata=metadata, extra=factors)
    (expected,) = make_hand(tmp_path, max_model_len=length).logits([("a", 0, IDS)])
    (logits,) = make_hand(tmp_path / "m.gguf", max_model_len=length).logits([("a", 0, IDS)])
    assert_same_logits(logits, expected)
    write_gguf(tmp_path, tmp_path / "half.gguf", metadata=metadata, extra={"rope_factors_long.weight": np.ones(6)})
    with pytest.raises(CheckpointError, match="rope_factors_long and rope_factors_short"):
        load_spec(tmp_path / "half.gguf")


# ---------------------------------------------------------------- quantised numbers


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_quantised_numbers_are_the_packages_own(kind: Kind, make_hand: Callable[..., Any], tmp_path: Path) -> None:
    fields = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "head_dim": 64}
    write_family(TinyFamily("q", "Qwen2Config", fields), tmp_path)
    write_gguf(tmp_path, tmp_path / "m.gguf", kind)
    rounded = tmp_path / "rounded"
    rounded.mkdir()
    shutil.copy(tmp_path / "config.json", rounded)
    tensors = {}
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        values = tensor.numpy()
        if values.ndim > 1:
            values = gguf.quants.dequantize(stored(values, kind), kind)
            assert np.isfinite(values).all()
        tensors[name] = torch.from_numpy(values)
    save_file(tensors, rounded / "model.safetensors")
    (expected,) = make_hand(rounded).logits([("a", 0, IDS)])
    assert torch.equal(make_hand(tmp_path / "m.gguf").logits([("a", 0, IDS)])[0], expected)
    assert load_spec(tmp_path / "m.gguf").dtype == "bfloat16"  # nobody computes quantised numbers in float32 by itself


def test_one_expert_of_a_quantised_stack_and_turned_rows(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    directory, path = tmp_path / "hf", tmp_path / "m.gguf"
    write_family(TinyFamily("m", "MixtralConfig", {"num_local_experts": 3, "intermediate_size": 96}), directory)
    write_gguf(directory, path, Kind.Q8_0)
    source, theirs = open_source(path), load_file(directory / "model.safetensors")
    for name in ("block_sparse_moe.experts.2.w2", "block_sparse_moe.experts.0.w3", "self_attn.k_proj"):
        exact = theirs[f"model.layers.1.{name}.weight"]
        ours = source.take(f"model.layers.1.{name}.weight")
        assert (ours - exact).abs().max() < 0.005
        assert ours.shape == exact.shape


@pytest.mark.parametrize(("name", "kind"), [("qwen2", Kind.Q8_0), ("mistral", Kind.Q4_0)])
def test_agrees_with_transformers_on_the_same_file(
    name: str, kind: Kind, make_hand: Callable[..., Any], tmp_path: Path
) -> None:
    pytest.importorskip("accelerate", reason="transformers reads GGUF with accelerate only")
    from transformers import AutoModelForCausalLM

    family = dataclasses.replace(BY_NAME[name], fields={"intermediate_size": 96, "sliding_window": None})
    write_family(family, tmp_path)
    vocabulary = {"tokenizer.ggml.token_type": [1] * VOCAB, "ARCH.rope.dimension_count": 16, "ARCH.vocab_size": VOCAB}
    write_gguf(tmp_path, tmp_path / "m.gguf", kind, metadata=vocabulary)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", attn_implementation="eager")
    with torch.inference_mode():
        expected = theirs(torch.tensor([IDS])).logits[0]
    assert_same_logits(make_hand(tmp_path / "m.gguf").logits([("a", 0, IDS)])[0], expected.float())


# ---------------------------------------------------------------- a file is a checkpoint everywhere


def test_a_file_is_a_checkpoint_everywhere(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    path = tmp_path / "Tiny-F16.gguf"
    template = {"tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}"}
    write_gguf(tiny("qwen2"), path, Kind.F16, metadata=template)
    assert located(str(path)) == path
    assert served_name(str(path), None) == "Tiny-F16"
    spec = load_spec(path)
    assert (spec.bos_id, spec.eos_ids, spec.vocab_size) == (0, (1,), VOCAB)
    assert Tokenizer.load(path).eos_ids == (1,)
    chat = ChatTemplate.load(path)
    assert chat is not None
    assert chat.render([{"role": "user", "content": "hi"}]) == "t0hi"
    load_runner(resolved(path), RunnerOptions(num_blocks=4)).warm_up()
    with pytest.raises(CheckpointError, match=r"no config.json.*Tiny-F16.gguf"):
        located(str(tmp_path))


def test_fingerprints_follow_numbers_and_description(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    path, same, other = (tmp_path / f"{n}.gguf" for n in "abc")
    write_gguf(tiny("qwen2"), path)
    shutil.copy(path, same)
    write_gguf(tiny("qwen2"), other, metadata={"ARCH.rope.freq_base": 20000.0})
    changed = bytearray(path.read_bytes())
    changed[-5] ^= 1
    (tmp_path / "d.gguf").write_bytes(changed)
    prints = [weights_fingerprint(tmp_path / f"{n}.gguf") for n in "abcd"]
    assert prints[0] == prints[1] == GgufSource(path).fingerprint()
    assert len(set(prints)) == 3
    assert len(prints[0]) == 16
    assert numerics_class(resolved(path)) == numerics_class(resolved(same)) != numerics_class(resolved(other))


# ---------------------------------------------------------------- what is refused


def damaged(raw: bytes, how: str) -> bytes:
    if how == "cut":
        return raw[:-100]
    if how == "cut in the description":
        return raw[:300]
    if how == "magic":
        return b"GGML" + raw[4:]
    if how == "empty":
        return b""
    if how == "version":
        return raw[:4] + struct.pack("<I", 1) + raw[8:]
    if how == "big-endian":
        return raw[:4] + struct.pack(">I", 3) + raw[8:]
    if how == "endless":
        return raw[:16] + struct.pack("<Q", 2**62) + raw[24:]
    return raw[:8] + struct.pack("<Q", 2**62) + raw[16:]


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("cut", "cut short"),
        ("cut in the description", "cut short"),
        ("magic", "no GGUF file"),
        ("empty", "cannot be read"),
        ("version", "version 1; served: 2 and 3"),
        ("big-endian", "big-endian"),
        ("endless", "damaged|cut short"),
        ("tensors without end", "damaged|cut short|twice"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tiny: Callable[[str], Path], tmp_path: Path, how: str, words: str) -> None:
    path, bad = tmp_path / "m.gguf", tmp_path / "bad.gguf"
    write_gguf(tiny("qwen2"), path)
    bad.write_bytes(damaged(path.read_bytes(), how))
    with pytest.raises(CheckpointError, match=words) as caught:
        open_source(bad)
    assert "bad.gguf" in caught.value.message


def test_a_description_with_wrong_bytes_is_served_or_refused(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    path, wrong = tmp_path / "m.gguf", tmp_path / "wrong.gguf"
    write_gguf(tiny("deepseek-v3"), path)
    raw, end = path.read_bytes(), GgufFile(path).data_at
    generator, refused = random.Random(1), 0
    for _ in range(120):
        changed = bytearray(raw)
        for _ in range(generator.choice((1, 1, 4))):
            at = generator.randrange(end)
            new = generator.choice((bytes([generator.randrange(256)]), b"\xff" * 4, b"\0" * 8, b"\xff" * 8))
            changed[at : at + len(new)] = new
        wrong.write_bytes(changed)
        try:
            check_tensors(open_source(wrong), load_spec(wrong))
            Tokenizer.load(wrong)
        except CheckpointError:  # and nothing else
            refused += 1
    assert 40 < refused < 120


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"split.count": 3}, "one of 3 parts.*--merge"),
        ({"ARCH.embedding_scale": 12.0}, r"qwen2.embedding_scale is 12.0, which is not served"),
        ({"ARCH.rope.scaling.type": "ntk"}, "rope.scaling.type is 'ntk'"),
        ({"ARCH.rope.dimension_count": 8}, "rope.dimension_count is 8; served: 16"),
        ({"ARCH.attention.sliding_window": 20}, "sliding_window is 20, which is not served"),
        ({"ARCH.attention.head_count_kv": [2, 4, 2]}, "the same for all layers"),
        ({"ARCH.block_count": None}, "qwen2.block_count is missing"),
        ({"ARCH.block_count": "3"}, "block_count is '3'"),
        ({"general.architecture": "mamba"}, "'mamba' is not served; served: llama"),
        ({"tokenizer.ggml.eos_token_id": 999}, "eos_token_id is 999"),
    ],
)
def test_a_description_that_is_not_served_is_refused_by_name(
    tiny: Callable[[str], Path], tmp_path: Path, metadata: dict[str, Any], words: str
) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(tiny("qwen2"), path, metadata=metadata)
    with pytest.raises(CheckpointError, match=words):
        load_spec(path)


def test_routing_that_is_not_the_families_own_is_refused_by_name(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    for name in ("mixtral", "qwen2-moe", "qwen3-moe"):
        write_gguf(tiny(name), path, metadata={"ARCH.expert_gating_func": 1, "ARCH.expert_weights_scale": 1.0})
        load_spec(path)
        for key, value in (("expert_gating_func", 2), ("expert_weights_scale", 2.5), ("expert_group_count", 4)):
            write_gguf(tiny(name), path, metadata={"ARCH." + key: value})
            with pytest.raises(CheckpointError, match=f"{key} is {value}; served: 1 for this architecture"):
                load_spec(path)


def test_missing_extra_and_wrong_tensors_are_refused_by_name(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    directory, path = tiny("qwen2"), tmp_path / "m.gguf"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"drop": ("blk.1.attn_k.weight",)}, r"lacks model.layers.1.self_attn.k_proj.weight"),
        ({"extra": {"blk.0.ssm_a": np.ones(4)}}, "holds blk.0.ssm_a, which Qwen2ForCausalLM has no place for"),
        ({"metadata": {"ARCH.feed_forward_length": 96}}, r"down_proj.weight has shape \[64, 80\]"),
        ({"drop": ("token_embd.weight",)}, "lacks token_embd.weight"),
    ]
    for arguments, words in cases:
        write_gguf(directory, path, **arguments)
        with pytest.raises(CheckpointError, match=words):
            load_runner(resolved(path), RunnerOptions(num_blocks=1))


@pytest.mark.parametrize(("number", "words"), [(20, "IQ4_NL; served: F32"), (99, "an unknown type 99; served: F32")])
def test_an_unknown_kind_of_number_is_refused_by_name(
    tiny: Callable[[str], Path], tmp_path: Path, number: int, words: str
) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(tiny("qwen2"), path)
    raw = bytearray(path.read_bytes())
    name = b"blk.0.attn_k.weight"
    at = raw.index(name) + len(name) + 4 + 16  # behind the number of dimensions and two of them
    raw[at : at + 4] = struct.pack("<I", number)
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=f"blk.0.attn_k.weight is (of )?{words}"):
        open_source(path)


def test_config_and_vocabulary_of_a_file_without_them_are_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({}))
    with pytest.raises(CheckpointError, match="no GGUF file"):
        located(str(tmp_path / "config.json"))
