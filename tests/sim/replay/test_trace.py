"""Traces: both forms, and malformed lines, each named by file, line, field and value."""

import json
from pathlib import Path

import pytest

from twostroke.core.errors import ConfigError
from twostroke.sim.replay.spec import parse_cluster
from twostroke.sim.replay.trace import read_trace

TRACES = Path(__file__).parent / "traces"
GOOD = '{"timestamp": 5, "input_length": 600, "output_length": 3, "hash_ids": [1, 2]}'
HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens"


def test_a_mooncake_trace_has_an_identity_per_full_block():
    trace = read_trace(TRACES / "mooncake_conversation_200.jsonl")
    assert (len(trace.asks), trace.block_tokens) == (200, 512)
    first = trace.asks[0]
    assert (first.arrived_s, first.prompt_tokens, first.answer_tokens) == (0.0, 6758, 500)
    assert len(first.identities) == 6758 // 512, "the partial block has none"
    assert first.identities[0] == trace.asks[1].identities[0], "equal hash ids are equal identities"
    assert first.identities[1] != trace.asks[1].identities[1]


def test_an_azure_trace_begins_at_zero_and_has_no_identities():
    trace = read_trace(TRACES / "azure_conversation_200.csv")
    assert len(trace.asks) == 200
    assert (trace.asks[0].arrived_s, trace.asks[0].prompt_tokens, trace.asks[0].answer_tokens) == (0.0, 374, 44)
    assert trace.asks[1].arrived_s == pytest.approx(4.314579, abs=1e-5)
    assert not any(ask.identities for ask in trace.asks)


def test_a_trace_can_be_stretched_to_any_rate():
    trace = read_trace(TRACES / "azure_conversation_200.csv").at_rate(10.0)
    assert trace.lasts_s == pytest.approx(20.0)
    assert [a.prompt_tokens for a in trace.at_once().asks] == [a.prompt_tokens for a in trace.asks]
    assert trace.at_once().lasts_s == 0.0


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not JSON"),
        ("[1]", "must be a JSON object, found [1]"),
        (GOOD.replace("600", '"many"'), "input_length is 'many'; must be a whole number of tokens"),
        (GOOD.replace("600", "-1"), "input_length is -1; must be from 0 to"),
        (GOOD.replace("600", "6e2"), "input_length is 600.0; must be a whole number"),
        (GOOD.replace("5", "NaN", 1), "timestamp is nan; must be milliseconds"),
        (GOOD.replace('"output_length": 3, ', ""), "output_length is missing"),
        (GOOD.replace("[1, 2]", "[1]"), "1 hash_ids for an input_length of 600"),
        (GOOD.replace("[1, 2]", "[1, -2]"), "hash_ids is [1, -2]; must be a list of whole numbers"),
        (GOOD.replace("[1, 2]", "7"), "hash_ids is 7"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str, said: str):
    path = tmp_path / "trace.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n{GOOD}\n")
    with pytest.raises(ConfigError) as caught:
        read_trace(path)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("yesterday,3,4", "TIMESTAMP is 'yesterday'"),
        ("2023-11-16 18:15:46.6805900,three,4", "ContextTokens is 'three'"),
        ("2023-11-16 18:15:46.6805900,3", "GeneratedTokens is missing"),
    ],
)
def test_a_malformed_row_is_named(tmp_path: Path, row: str, said: str):
    path = tmp_path / "trace.csv"
    path.write_text(f"{HEAD}\n2023-11-16 18:15:46.6805900,3,4\n{row}\n")
    with pytest.raises(ConfigError) as caught:
        read_trace(path)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("trace.csv", "a,b\n1,2\n", ":1: the column TIMESTAMP is missing"),
        ("trace.txt", "", "'.txt'; must be .jsonl"),
        ("trace.jsonl", "\n", "has no requests"),
    ],
)
def test_a_file_that_is_no_trace(tmp_path: Path, name: str, text: str, said: str):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_trace(path)
    assert said in str(caught.value)
    with pytest.raises(ConfigError, match="No such file"):
        read_trace(tmp_path / "none.csv")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("combined=0", "has 0 workers"),
        ("prefill=2", "no worker that decodes"),
        ("combined=two", "has the part 'combined=two'"),
        ("gpu=2", "has the part 'gpu=2'"),
        ("combined=1,machine=/none.json", "No such file"),
    ],
)
def test_a_cluster_that_cannot_be(text: str, said: str):
    with pytest.raises(ConfigError) as caught:
        parse_cluster(text)
    assert said in str(caught.value)


def test_a_cluster_may_have_another_machine(tmp_path: Path):
    path = tmp_path / "machine.json"
    fields = {
        "name": "slow",
        "prefill_ms_per_token": 0.5,
        "prefill_ms_per_token_pair": 1e-5,
        "step_base_ms": 20,
        "step_ms_per_sequence": 0.1,
        "step_ms_per_kv_token": 1e-4,
        "kv_capacity_tokens": 100_000,
        "max_num_seqs": 64,
    }
    path.write_text(json.dumps(fields))
    spec = parse_cluster(f"prefill=1,decode=2,machine={path}")
    assert str(spec) == "1 prefill + 2 decode (slow)"
    assert spec.machine.prefill_s(1000, 0) == pytest.approx(0.505)
    path.write_text(json.dumps({**fields, "step_base_ms": -1}))
    with pytest.raises(ConfigError, match="step_base_ms is -1; must be a positive number"):
        parse_cluster(f"combined=1,machine={path}")
