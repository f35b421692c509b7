"""A checkpoint with every choice made: what differs by device and kernels, and what a GPU refuses before it loads."""

from collections.abc import Callable
from pathlib import Path

import pytest

from twostroke.checkpoint.config import ModelConfig
from twostroke.core.errors import ConfigError
from twostroke.kernels.cpu.build import NativeUnavailable
from twostroke.model.resolved import ResolvedModel, resolve


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
