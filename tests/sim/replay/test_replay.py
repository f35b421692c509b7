"""Whole runs on small traces: determinism, what each policy does to the same requests, and the command."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from typer.testing import CliRunner

from twostroke.cli.main import app
from twostroke.core.errors import ConfigError
from twostroke.sim.replay.compare import capacity_per_s, compare, parse_loads, parse_policies
from twostroke.sim.replay.figures import Targets
from twostroke.sim.replay.play import ORACLE, OURS, POLICIES, Replay, play
from twostroke.sim.replay.spec import ClusterSpec, parse_cluster
from twostroke.sim.replay.trace import Ask, Trace, read_trace
from twostroke.sim.scale.machine import Machine

TRACES = Path(__file__).parent / "traces"
MOONCAKE = read_trace(TRACES / "mooncake_conversation_200.jsonl").first(80).at_rate(1.5)
AZURE = read_trace(TRACES / "azure_conversation_200.csv").at_rate(40.0)
COMBINED, PAIRS = parse_cluster("combined=3"), parse_cluster("prefill=2,decode=2")


@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_seed_gives_the_same_run(policy: str):
    first, second = play(AZURE.first(60), PAIRS, policy, seed=3), play(AZURE.first(60), PAIRS, policy, seed=3)
    assert first == second
    assert all(c.first_s > c.arrived_s and c.ended_s >= c.first_s for c in first.courses)


def test_another_seed_gives_another_run_where_lots_are_drawn():
    assert play(AZURE, COMBINED, "power-of-two", seed=3) != play(AZURE, COMBINED, "power-of-two", seed=4)


@pytest.mark.parametrize("spec", [COMBINED, PAIRS], ids=str)
@pytest.mark.parametrize("policy", [OURS, "dynamo", "least-loaded+queue", ORACLE])
def test_every_request_ends_and_every_block_is_free(policy: str, spec):
    replay = Replay(MOONCAKE, spec, policy)
    played = replay.run()
    assert len(played.courses) == 80
    assert sum(played.gaps_ms.values()) == sum(a.answer_tokens - 1 for a in MOONCAKE.asks)
    for worker in replay.workers.values():
        assert worker.cache.pool.num_live == 0
        assert worker.waiting == worker.prefilling == worker.coming == []
        assert (len(worker.decoding), worker.num_bound) == (0, 0)
        worker.cache.pool.check_integrity()
        worker.cache.prefix.check_integrity()
        believed = replay.router.prefixes.believed(worker.name)
        assert believed is not None
        assert believed == frozenset(worker.cache.prefix.snapshot()), "the router's map is the worker's cache"
    assert replay.router.life.is_idle


def test_a_repeated_prompt_is_found_where_it_was_computed():
    """Turns of two conversations, far apart: ours and prefix-only return to their worker, round robin does not."""
    one, two = MOONCAKE.asks[6].identities, MOONCAKE.asks[7].identities
    turns = [(one, 0.0), (two, 20.0), (two, 40.0), (one, 60.0)]
    asks = [Ask(at_s, len(ids) * 512 + 100, 5, ids) for ids, at_s in turns]
    trace, spec = Trace(tuple(asks), 512), parse_cluster("combined=2")
    held = [0, 512, len(two) * 512, len(one) * 512]  # both begin with the same block
    assert [c.cached_tokens for c in play(trace, spec, "prefix-only").courses] == held
    assert [c.cached_tokens for c in play(trace, spec, OURS).courses][2:] == held[2:]
    assert [c.cached_tokens for c in play(trace, spec, "round-robin").courses] == [0, 0, 512, 512]


def test_a_full_pool_preempts_and_everything_still_ends():
    machine = {
        "name": "small",
        "prefill_ms_per_token": 0.1,
        "prefill_ms_per_token_pair": 1e-6,
        "step_base_ms": 10,
        "step_ms_per_sequence": 0.1,
        "step_ms_per_kv_token": 1e-5,
        "kv_capacity_tokens": 4096,
        "max_num_seqs": 16,
    }
    spec = ClusterSpec(combined=1, machine=Machine(**machine))
    asks = tuple(Ask(0.01 * n, 300, 700) for n in range(12))
    replay = Replay(Trace(asks, 64), spec, "round-robin")
    played = replay.run()
    assert played.num_preemptions > 0
    assert all(c.ended_s for c in played.courses)
    assert replay.workers["combined-000"].cache.pool.num_live == 0
    with pytest.raises(
        ConfigError, match="request 0 of the trace has 4000 prompt and 97 answer tokens; a worker of small"
    ):
        play(Trace((Ask(0.0, 4000, 97),), 64), spec, OURS)


def test_the_capacity_is_what_is_completed_while_all_wait():
    per_s = capacity_per_s(AZURE, COMBINED)
    below = play(AZURE.at_rate(0.5 * per_s), COMBINED, OURS)
    above = play(AZURE.at_rate(3.0 * per_s), COMBINED, OURS)
    first, last = (sum(c.ttft_s for c in played.courses[-50:]) for played in (below, above))
    assert last > 3 * first, "the queue grows without an end above it, and does not below"


def test_the_oracle_is_compared_with_itself():
    found = compare(AZURE.first(100), COMBINED, [OURS, ORACLE], [0.8], Targets(0.1, 0.05), capacity=60.0)
    oracle, ours = found.at(0.8)
    assert (oracle.policy, ours.policy) == (ORACLE, OURS)
    assert oracle.regret is not None
    assert oracle.regret.value == 0.0
    assert ours.regret is not None
    assert ours.regret.value == pytest.approx(1 - ours.goodput_per_s / oracle.goodput_per_s)
    assert ours.attained.low <= ours.attained.value <= ours.attained.high


def test_options_that_cannot_be():
    with pytest.raises(ConfigError, match="names 'fastest'; known: ours, round-robin"):
        parse_policies("ours,fastest")
    for bad in ("", "0", "a", "0.3,,1"):
        with pytest.raises(ConfigError, match="--load is"):
            parse_loads(bad)
    assert parse_policies("all") == list(POLICIES)
    assert parse_policies("ours, dynamo+queue,ours") == ["ours", "dynamo+queue"]


def test_the_command_prints_a_table_a_document_and_a_plot(tmp_path: Path):
    picture = tmp_path / "goodput.svg"
    options = ["--trace", str(TRACES / "azure_conversation_200.csv"), "--cluster", "combined=2", "--capacity", "30"]
    chosen = ["--policy", "ours,round-robin,oracle", "--load", "0.5,0.9", "--requests", "80"]
    shown = CliRunner().invoke(app, ["sim", "replay", *options, *chosen, "--plot", str(picture)])
    assert shown.exit_code == 0, shown.output
    assert "load 0.9 of capacity" in shown.output
    assert "round-robin" in shown.output
    root = ET.fromstring(picture.read_text())
    assert len([e for e in root if e.tag.endswith("polyline")]) == 3
    raw = CliRunner().invoke(app, ["sim", "replay", *options, *chosen, "--json"])
    document = json.loads(raw.stdout)
    assert [(row["load"], row["policy"]) for row in document["rows"]] == [
        (load, name) for load in (0.5, 0.9) for name in ("oracle", "ours", "round-robin")
    ]
    assert document["rows"][1]["regret"].keys() == {"value", "low", "high"}


def test_a_malformed_line_ends_the_command(tmp_path: Path):
    path = tmp_path / "trace.jsonl"
    path.write_text("{}\n")
    found = CliRunner().invoke(app, ["sim", "replay", "--trace", str(path)])
    assert isinstance(found.exception, ConfigError)
    assert f"{path}:1: input_length is missing" in str(found.exception)


def test_the_help_names_every_policy():
    said = CliRunner().invoke(app, ["sim", "replay", "--help"], env={"COLUMNS": "300"}).stdout
    assert all(name in said for name in POLICIES)
