"""A checkpoint with every choice made: what differs by device and kernels, and what a GPU refuses before it loads."""

from collections.abc import Callable
from pathlib import Path

import pytest

from twostroke.checkpoint.config import ModelConfig
from twostroke.core.errors import ConfigError
from twostroke.kernels.cpu.build import NativeUnavailable
from twostroke.kv.sizing import MemoryFacts, size_pool
from twostroke.model.resolved import ResolvedModel, needs_of_ranks, resolve, resolve_draft

MIB = 1 << 20


def native() -> None:
    """As where native kernels can be had."""


def none() -> None:
    raise NativeUnavailable("nothing builds here")


def test_a_gpu_refuses_by_name_what_its_kernels_do_not_serve(family_directory: Callable[[str], Path]) -> None:
    plain, latent = family_directory("qwen3"), family_directory("deepseek-v2")
    assert resolve(plain, ModelConfig(), "auto", "cuda").kernels == "triton"
    with pytest.raises(ConfigError, match="latent cache"):
        resolve(latent, ModelConfig(), "auto", "cuda")
    with pytest.raises(ConfigError, match=r"cache.dtype is 'float32'"):
        resolve(plain, ModelConfig(), "float32", "cuda")
    for directory in (plain, latent):
        assert resolve(directory, ModelConfig(), "float32", "cpu", native).codec == "float32"


def test_weights_take_what_the_chosen_kernels_hold(family_directory: Callable[[str], Path]) -> None:
    def held(quantization: str, find: Callable[[], None]) -> ResolvedModel:
        model = ModelConfig.model_validate({"quantization": quantization, "dtype": "bfloat16"})
        return resolve(family_directory("qwen3"), model, "auto", "cpu", find)

    packed, rounded_only = held("int8", native), held("int8", none)
    assert (packed.kernels, rounded_only.kernels) == ("native", "torch")
    assert packed.weight_bytes < held("none", native).weight_bytes
    assert packed.weight_bytes < rounded_only.weight_bytes


def test_a_tokenizers_end_tokens_are_added_as_far_as_the_model_has_them(
    family_directory: Callable[[str], Path],
) -> None:
    model = resolve(family_directory("qwen3"), ModelConfig(), "auto", "cpu", native)
    size, known = model.spec.vocab_size, model.spec.eos_ids
    found = model.ends_with([*known, size - 1, size, size + 1, size - 1]).spec.eos_ids
    assert found == (*dict.fromkeys((*known, size - 1)),)
    assert model.spec.eos_ids == known


def test_a_draft_models_weights_and_kv_are_part_of_what_a_worker_needs(family_directory: Callable[[str], Path]) -> None:
    settings = ModelConfig()
    model = resolve(family_directory("qwen3"), settings, "auto", "cpu", native)
    draft = resolve_draft(family_directory("phi3"), settings, "auto", "cpu", native)
    alone, both = needs_of_ranks(model, settings, 1), needs_of_ranks(model, settings, 1, draft)
    assert both.weight_bytes == alone.weight_bytes + draft.weight_bytes
    assert [group.name for group in both.kv_spec.groups] == ["main", "draft"]
    assert both.kv_spec.bytes_per_token == model.kv_spec.bytes_per_token + draft.kv_spec.bytes_per_token
    assert both.step_bytes.per_token > alone.step_bytes.per_token
    facts = MemoryFacts(64 * MIB, 0, swap_bytes=8 * MIB)
    pools = [size_pool(needs.kv_spec, 16, None, 1.0, facts) for needs in (alone, both)]
    assert pools[0].num_blocks > pools[1].num_blocks
    assert pools[0].num_swap_blocks == pools[1].num_swap_blocks  # the draft model's blocks are not swapped


def test_a_draft_model_has_the_arithmetic_of_the_model_beside_it(family_directory: Callable[[str], Path]) -> None:
    beside = ModelConfig.model_validate({"quantization": "int8", "dtype": "bfloat16", "max_model_len": 64})
    draft = resolve_draft(family_directory("qwen3"), beside, "bfloat16", "cpu", native)
    assert (draft.quantization, draft.dtype, draft.codec) == ("int8", "bfloat16", "bfloat16")
    assert draft.max_model_len == draft.spec.max_model_len


def test_a_draft_model_with_recurrent_layers_is_refused_by_name(family_directory: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match=r"speculation.model is .*recurrent layers"):
        resolve_draft(family_directory("qwen3-next"), ModelConfig(), "auto", "cpu", native)


@pytest.mark.parametrize("codec", ["int8_channel", "bfloat16/fp8"])
def test_one_latent_vector_has_one_codec(codec: str, family_directory: Callable[[str], Path]) -> None:
    latent = family_directory("deepseek-v2")
    model = resolve(latent, ModelConfig(), "int8", "cpu", native)
    assert [component.codec for component in model.kv_spec.main.components] == [5, 5]
    with pytest.raises(ConfigError, match="caches one vector for keys and values"):
        resolve(latent, ModelConfig(), codec, "cpu", native)
    assert resolve(family_directory("qwen3"), ModelConfig(), codec, "cpu", native).codec == codec


def test_keys_per_channel_have_a_widest_head(family_directory: Callable[[str], Path], monkeypatch) -> None:
    monkeypatch.setattr("twostroke.model.resolved.MOST_CHANNELS", 8)
    with pytest.raises(ConfigError, match="it serves up to 8: use int8"):
        resolve(family_directory("qwen3"), ModelConfig(), "int8_channel", "cpu", native)
    assert resolve(family_directory("qwen3"), ModelConfig(), "int8", "cpu", native).codec == "int8"
