"""Adapters on the command line and in a configuration: vLLM's forms, and what is refused before anything starts."""

import pytest

from twostroke.checkpoint.config import ModelConfig
from twostroke.cli.arguments import translated
from twostroke.cli.options import config_from
from twostroke.cluster.config import load_config
from twostroke.core.config import load_section
from twostroke.core.errors import ConfigError
from twostroke.kv.sizing import MemoryFacts, size_pool
from twostroke.kv.spec import attention_spec


def modules(value):
    return [(module.name, module.path) for module in load_section(ModelConfig, {"lora_modules": value}).lora_modules]


@pytest.mark.parametrize(
    "value",
    [
        ["a=/x", "b=/y=1"],
        ["a=/x", '{"name": "b", "path": "/y=1", "base_model_name": "m"}'],
        '[{"name": "a", "path": "/x"}, {"name": "b", "path": "/y=1"}]',
        [{"name": "a", "path": "/x"}, {"name": "b", "path": "/y=1"}],
        {"a": "/x", "b": "/y=1"},
    ],
)
def test_every_form_names_the_same_adapters(value):
    assert modules(value) == [("a", "/x"), ("b", "/y=1")]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (["a"], "must be NAME=PATH"),
        (["=x"], "must be NAME=PATH"),
        (["a=/x", "a=/y"], "two adapters have the name 'a'"),
        ([{"name": "a", "path": "/x", "rank": 8}], "rank is not a setting"),
    ],
)
def test_other_forms_are_refused_by_name(value, said):
    with pytest.raises(ConfigError, match=said):
        modules(value)


def test_an_adapter_may_not_have_the_models_name_and_all_must_fit():
    with pytest.raises(ConfigError, match="the name of the model, 'm'"):
        load_section(ModelConfig, {"name": "m", "lora_modules": ["m=/x"]})
    with pytest.raises(ConfigError, match="raise max_loras"):
        load_section(ModelConfig, {"max_loras": 1, "lora_modules": ["a=/x", "b=/y"]})


def test_the_flag_takes_several_values_as_vllms_does():
    given = [
        "serve",
        "--lora-modules",
        "a=/x",
        '{"name": "b"}',
        "--port",
        "1",
        "--lora-modules",
        "c=/z",
        "d=/w",
        "-tp",
        "2",
    ]
    assert translated(given, print) == [
        *("serve", "--lora-modules", "a=/x", "--lora-modules", '{"name": "b"}', "--port", "1"),
        *("--lora-modules", "c=/z", "--lora-modules", "d=/w", "-tp", "2"),
    ]
    assert translated(["serve", "model", "--lora-modules", "a=/x", "rest"], print)[-1] == "rest"
    others = ["serve", "--lora-modules", "a=/x", "--speculative-config", '{"method": "ngram"}', "--config", "a=b.yaml"]
    assert translated(others, print) == others, "values of other flags"


def test_memory_is_kept_for_adapters_only_where_there_can_be_some():
    assert ModelConfig().adapter_bytes == 0
    assert ModelConfig(enable_lora=True, max_lora_bytes=1 << 20).adapter_bytes == 1 << 20
    assert load_section(ModelConfig, {"lora_modules": ["a=/x"]}).serves_adapters


def test_memory_for_adapters_is_a_term_of_its_own_and_not_of_the_weights():
    spec = attention_spec(8, 8, 64, 1)
    sizes = [
        size_pool(spec, 16, None, 1.0, MemoryFacts(1 << 30, 100 << 20, adapter_bytes=kept)) for kept in (0, 64 << 20)
    ]
    assert "weights 100 MiB − adapters 64 MiB = 860 MiB" in sizes[1].arithmetic
    assert "adapters" not in sizes[0].arithmetic
    assert abs(sizes[0].pool_bytes - sizes[1].pool_bytes - (64 << 20)) < 1 << 20


def test_loading_at_run_time_needs_room_for_adapters():
    config = config_from({"enable_runtime_lora": True})
    assert config.router.runtime_lora
    assert config.model.enable_lora
    with pytest.raises(ConfigError, match=r"model\.enable_lora false"):
        load_config(flags={"router.runtime_lora": True})
