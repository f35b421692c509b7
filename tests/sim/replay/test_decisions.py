"""A router's decision log, made again: all decisions the same, and the first that differs by name."""

import asyncio
import json
from pathlib import Path

import pytest
from support.clusters.flow_cluster import cluster, collect, request, until
from support.fakes.fake_worker import Behaviour, FakeWorker
from typer.testing import CliRunner

from twostroke.cli.main import app
from twostroke.core.errors import ConfigError
from twostroke.core.request import Role
from twostroke.sim.replay.decisions import replay_decisions


async def logged(path: Path) -> list[dict]:
    """Six requests on three workers, one of which loses its worker in the middle."""
    async with cluster(decision_log=path) as c:
        dying = FakeWorker("decode-0", Role.DECODE, load={"decode_step_ms": 17.123456789, "waiting": 3})
        await c.add(
            FakeWorker("prefill-0", Role.PREFILL, load={"prefill_ms_per_token": 0.1, "queued_prefill_pairs": 0.3})
        )
        await c.add(dying)
        for number in range(4):
            await collect(c.flow, request(f"r{number}"))
        dying.behaviour = Behaviour(stop_after=2)
        asking = asyncio.create_task(collect(c.flow, request("r4")))
        await until(
            lambda: (c.flow.explain("tenant", "r4") or {"tokens": {"completion": 0}})["tokens"]["completion"] == 2
        )
        await c.add(FakeWorker("decode-1", Role.DECODE))
        await dying.die()
        await asking
        await collect(c.flow, request("r5"))
    return [json.loads(line) for line in path.read_text().splitlines()]


async def test_every_decision_comes_out_the_same(tmp_path: Path):
    path = tmp_path / "decisions.jsonl"
    entries = await logged(path)
    assert [len(entry["decisions"]) for entry in entries] == [1, 1, 1, 1, 2, 1]
    assert entries[4]["decisions"][1]["asked"]["request"]["prompt_tokens"] == 102, "the prompt and two tokens"
    found = replay_decisions(path)
    assert (found.num_requests, found.num_decisions, found.num_without) == (6, 7, 0)
    assert found.difference is None
    shown = CliRunner().invoke(app, ["sim", "replay", "--decisions", str(path)])
    assert shown.exit_code == 0
    assert "7 decisions of 6 requests" in shown.output
    refused = CliRunner().invoke(app, ["sim", "replay", "--decisions", str(path), "--load", "0.3"])
    assert isinstance(refused.exception, ConfigError)
    assert "--load has no meaning with --decisions" in str(refused.exception)


async def test_the_first_that_differs_is_named(tmp_path: Path):
    path = tmp_path / "decisions.jsonl"
    entries = await logged(path)
    entries[4]["decisions"][1]["choice"]["winner"]["total_ms"] += 0.001
    entries[5]["decisions"][0]["asked"]["request"]["prompt_tokens"] = 7
    path.write_text("\n".join(map(json.dumps, entries)))
    found = replay_decisions(path)
    assert found.difference is not None
    assert found.difference.startswith(f"{path}:5: request 'r4', attempt 2: choice.winner.total_ms was ")
    assert CliRunner().invoke(app, ["sim", "replay", "--decisions", str(path)]).exit_code == 1
    entries[4]["decisions"][1]["choice"]["winner"]["total_ms"] -= 0.001
    del entries[4]["decisions"]
    path.write_text("\n".join(map(json.dumps, entries)))
    found = replay_decisions(path)
    assert found.num_without == 1
    assert found.difference is not None
    assert found.difference.startswith(f"{path}:6: request 'r5', attempt 1: choice.")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", ":2: not JSON"),
        ("{}", ":2: no entry of a decision log: request_id is missing"),
        ('{"request_id": "x", "decisions": [{}]}', ":2: request 'x', attempt 1: 'asked'"),
        ('{"request_id": "x", "decisions": [{"asked": {}, "choice": {}}]}', "'sides' is missing"),
        ('{"request_id": "x", "decisions": [{"asked": {"sides": 3}, "choice": {}}]}', "no recorded decision"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str, said: str):
    path = tmp_path / "decisions.jsonl"
    path.write_text(f'{{"request_id": "w"}}\n{line}\n')
    with pytest.raises(ConfigError) as caught:
        replay_decisions(path)
    assert said in str(caught.value)
    with pytest.raises(ConfigError, match="No such file"):
        replay_decisions(tmp_path / "none")


async def test_a_last_line_that_was_cut_is_left_out(tmp_path: Path):
    path = tmp_path / "decisions.jsonl"
    entries = await logged(path)
    whole = replay_decisions(path)
    path.write_text(path.read_text()[:-40])
    cut = replay_decisions(path)
    assert (cut.num_requests, cut.difference) == (len(entries) - 1, None)
    path.write_text("\n".join(json.dumps(entry) for entry in entries))
    assert replay_decisions(path) == whole, "a whole last line counts, with or without its end"


def test_the_command_wants_a_trace_or_a_log():
    for options in ([], ["--trace", "a.csv", "--decisions", "b"]):
        found = CliRunner().invoke(app, ["sim", "replay", *options])
        assert isinstance(found.exception, ConfigError)
        assert "either --trace FILE or --decisions LOG" in str(found.exception)
