"""What `twostroke explain` draws, from the documents of a real router."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.clusters.flow_cluster import cluster, collect, request, until
from support.fakes.fake_worker import Behaviour, FakeWorker
from support.fakes.scripted_router import router, worker
from support.fakes.scripted_worker import make_model
from typer.testing import CliRunner

from twostroke.cli.explain import BAR, INSTANTS, attempts, candidates, legend, summary
from twostroke.cli.main import app
from twostroke.core.errors import RequestNotFound
from twostroke.core.request import Role
from twostroke.core.timeline import Instant


async def told(*workers: FakeWorker) -> dict[str, Any]:
    async with cluster() as c:
        await c.add(*workers)
        await collect(c.flow, request())
        found = c.flow.explain("tenant", "r1")
        assert found is not None
        return found


def drawn(part: Any) -> list[str]:
    console = Console(width=80, record=True, quiet=False)
    with console.capture() as captured:
        console.print(part)
    return captured.get().splitlines()


async def test_the_candidates_have_their_terms_and_the_winner_is_marked() -> None:
    found = await told(FakeWorker("prefill-0", Role.PREFILL), FakeWorker("decode-0", Role.DECODE))
    lines = drawn(candidates(found["choice"]))
    assert lines[0].split()[:3] == ["candidate", "(ms)", "held"]
    assert lines[0].rstrip().endswith("total")
    (winner,) = [line for line in lines if line.startswith("> ")]
    assert winner.startswith("> prefill-0 + decode-0 ")
    assert float(winner.split()[-1].replace(",", "")) == pytest.approx(found["choice"]["winner"]["total_ms"], abs=0.06)
    assert [line for line in lines if line.startswith("  decode-0 ")], "decode by itself is a candidate, too"
    assert max(map(len, lines)) <= 80


async def test_only_the_first_candidates_are_drawn() -> None:
    found = await told(*(FakeWorker(f"worker-{n:02}") for n in range(15)))
    lines = drawn(candidates(found["choice"]))
    assert len(lines) == 1 + 12 + 1
    assert lines[-1].strip() == "and 3 more: --json"


async def test_the_timeline_is_drawn_on_one_scale() -> None:
    found = await told(FakeWorker("worker-0"))
    router_part, attempt = [drawn(part) for part in attempts(found)]
    assert router_part[0] == "in the router"
    assert router_part[1].strip().startswith("arrived > admitted ")
    assert attempt[0] == "attempt 1: worker-0"
    assert attempt[-1].strip().split()[2] == "finished"
    bars = [line[33 : 33 + BAR] for line in (*router_part[1:], *attempt[1:])]
    assert all(len(bar) == BAR and set(bar) <= {"█", "·"} and "█" in bar for bar in bars), bars
    assert bars[0][0] == "█"
    assert bars[-1][-1] == "█"
    assert max(map(len, (*router_part, *attempt))) <= 80


async def test_every_attempt_is_drawn_with_what_ended_it() -> None:
    async with cluster() as c:
        first = FakeWorker("worker-0")
        first.behaviour = Behaviour(stop_after=2)
        await c.add(first)
        asking = asyncio.create_task(collect(c.flow, request()))
        await until(
            lambda: len(first.submits) == 1 and (c.flow.explain("tenant", "r1") or {})["tokens"]["completion"] == 2
        )
        await c.add(FakeWorker("worker-1"))
        await first.die()
        await asking
        found = c.flow.explain("tenant", "r1")
        assert found is not None
    parts = ["\n".join(drawn(part)) for part in attempts(found)]
    assert len(parts) == 3
    assert parts[1].startswith("attempt 1: worker-0; left: worker_lost")
    assert "> left" in parts[1]
    assert parts[2].startswith("attempt 2: worker-1, after 2 tokens")
    assert "> finished" in parts[2]


async def test_the_summary_says_what_was_asked_and_given() -> None:
    found = await told(FakeWorker("worker-0"))
    lines = list(summary(found))
    assert lines[0].startswith("r1 (")
    assert "finished, length, first token after" in lines[0]
    assert lines[1] == "100 prompt tokens, 0 of them cached, 5 generated"
    assert lines[2] == f"choice: {found['choice']['reason']}"


async def test_the_legend_explains_every_word_that_is_shown() -> None:
    found = await told(FakeWorker("prefill-0", Role.PREFILL), FakeWorker("decode-0", Role.DECODE))
    lines = list(legend(found))
    assert max(map(len, lines)) <= 80
    explained = {line[2:].split("  ")[0] for line in lines if line.startswith("  ")}
    headings = drawn(candidates(found["choice"]))[0].replace("candidate (ms)", "").split()
    assert set(headings) <= set(" ".join(explained).split())
    spans = [line.split()[:3] for part in attempts(found) for line in drawn(part)[1:]]
    assert {word for first, _, second in spans for word in (first, second)} <= explained
    assert "move KV" in explained
    assert "fetch" not in explained, "nothing is fetched here"


def test_every_term_and_instant_has_a_meaning() -> None:
    assert set(INSTANTS) == set(Instant)
    assert all(len(f"  {name:<14}  {meaning}") <= 80 for name, meaning in INSTANTS.items())


async def test_the_command_asks_a_router(tmp_path: Path) -> None:
    async with router() as there:
        await there.add(worker(make_model(tmp_path / "model"), "hello"))
        answer = await there.chat(max_tokens=4)

        async def run(*arguments: str) -> Any:
            return await asyncio.to_thread(CliRunner().invoke, app, ["explain", *arguments, "--grpc", there.grpc])

        shown = await run(answer.id)
        assert shown.exit_code == 0, shown.output
        assert "attempt 1: w0" in shown.output
        document = json.loads((await run(answer.id, "--json")).output)
        assert document["request_id"] == answer.id
        assert document["decode_worker"] == "w0"
        unknown = await run("nobody-1")
        assert isinstance(unknown.exception, RequestNotFound)
        assert "nobody-1" in str(unknown.exception)
