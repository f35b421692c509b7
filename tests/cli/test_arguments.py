"""Command lines as users of vLLM and SGLang write them."""

import pytest

from twostroke.cli.arguments import ALWAYS, INSTEAD, SAME, translated
from twostroke.cli.options import SETTING_BY_FLAG
from twostroke.core.errors import ConfigError


def said_of(*given: str) -> tuple[list[str], list[str]]:
    said: list[str] = []
    return translated(["serve", *given], said.append)[1:], said


def test_flags_of_the_same_meaning_become_ours():
    ours, said = said_of("--model-path", "m", "--tp=2", "--context-length", "4096", "--max-running-requests", "8")
    assert ours == ["--model", "m", "--tensor-parallel-size=2", "--max-model-len", "4096", "--max-num-seqs", "8"]
    assert not said


@pytest.mark.parametrize(
    ("given", "ours"),
    [
        (["--max-model-len", "8k"], ["--max-model-len", "8000"]),
        (["--max-model-len=8K"], ["--max-model-len=8192"]),
        (["--max-num-batched-tokens", "1.5k"], ["--max-num-batched-tokens", "1500"]),
        (["--max-model-len", "8x"], ["--max-model-len", "8x"]),
        (["--dtype", "half"], ["--dtype", "float16"]),
        (["--port", "8k"], ["--port", "8k"]),
        (["half"], ["half"]),
    ],
)
def test_values_as_others_write_them(given, ours):
    assert said_of(*given) == (ours, [])


def test_switches_without_effect_are_named_and_dropped():
    ours, said = said_of("m", "--enable-prefix-caching", "--trust-remote-code", "--port", "1")
    assert ours == ["m", "--port", "1"]
    assert said == [
        "--enable-prefix-caching has no effect: prefixes are cached unless cache.prefix_caching says no",
        "--trust-remote-code has no effect: no code of a checkpoint is ever run",
    ]


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        ("--gpu-memory-utilization=0.9", "--kv-cache-memory-fraction"),
        ("--data-parallel-size", "--decode"),
        ("-pp", "--tensor-parallel-size"),
        ("--disable-radix-cache", "TWOSTROKE__CACHE__PREFIX_CACHING=false"),
        ("--revision=main", "--model"),
        ("--disaggregation-mode", "--prefill"),
    ],
)
def test_a_flag_that_means_something_else_here_is_refused_with_ours(flag, named):
    with pytest.raises(ConfigError, match=f"{flag.partition('=')[0]} is no flag here; .*{named}"):
        said_of(flag)


@pytest.mark.parametrize("given", [["--quantization", "awq"], ["--quantization=fp8"], ["-q", "gptq"]])
def test_the_quantisation_of_a_checkpoint_is_not_asked_for(given):
    with pytest.raises(ConfigError, match="read from its files, so leave the flag out"):
        said_of(*given)
    assert said_of("--quantization", "int8")[0] == ["--quantization", "int8"]


def test_other_commands_are_left_alone():
    assert translated(["chat", "--seed", "4"], print) == ["chat", "--seed", "4"]
    assert translated([], print) == []


def test_every_flag_that_is_named_is_ours_and_none_of_ours_is_taken_away():
    ours = {f"--{name.replace('_', '-')}" for name in SETTING_BY_FLAG}
    assert not {*SAME, *ALWAYS, *INSTEAD} & ours
    assert set(SAME.values()) <= ours
    words = {word.strip(",:;") for text in INSTEAD.values() for word in text.split()}
    assert {word for word in words if word.startswith("--")} <= ours
