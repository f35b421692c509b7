"""The lines of `twostroke status`, on reports of a real router."""

from pathlib import Path
from typing import Any

from support.fakes.scripted_router import router

from twostroke import AsyncClient
from twostroke.cli.status import adapter_memory, models_of, pending_of, router_problems
from twostroke.cluster.planner.decision import HOLD, Decision
from twostroke.router.keys.digests import line_for
from twostroke.router.peers.joined import joined_report

OPERATOR = "a key of the operator, long enough"


async def report() -> dict[str, Any]:
    async with router() as there:
        return await there.sdk.cluster()


async def test_a_router_alone_has_no_problem() -> None:
    assert router_problems(await report()) == []


async def test_routers_that_do_not_answer_are_counted() -> None:
    own = await report()
    own["router"]["num_routers"] = 3
    assert router_problems(joined_report(own, [own])) == ["1 of 3 routers do not answer"]


async def test_keys_that_cannot_be_read_are_shown(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(f"keys:\n  - key: {line_for(OPERATOR)}\n    monitor: true\n")
    async with router(api_key_file=path) as there, AsyncClient(there.grpc, api_key=OPERATOR) as client:
        assert router_problems(await client.cluster()) == []
        path.write_text("keys: nonsense")
        there.process._front.keys.look()
        (line,) = router_problems(await client.cluster())
    assert "keeps its keys: " in line
    assert str(path) in line


def test_models_and_adapters_have_a_line_with_their_live_workers() -> None:
    def worker(role: str, state: str, *adapters: str) -> dict[str, Any]:
        return {"role": role, "state": state, "model": "m", "adapters": [{"name": name} for name in adapters]}

    workers = [worker("prefill", "live", "a"), worker("decode", "live", "a"), worker("decode", "suspect", "a", "b")]
    assert models_of({"workers": workers}) == [
        "model m: 1 of its 2 decode workers is live",
        "model a, an adapter of m: 1 of its 2 decode workers is live",
        "model b, an adapter of m: 0 of its 1 decode workers are live",
    ]


def test_adapters_have_a_line_with_their_memory_beside_the_weights() -> None:
    held = [{"name": name, "digest": digest, "size_bytes": 3 << 20} for name, digest in (("a", "1"), ("b", "1"))]
    workers = [{"worker_id": "d", "adapters": held}, {"worker_id": "e", "adapters": []}]
    assert adapter_memory({"workers": workers}) == ["d holds 1 adapter in 3.0 MiB beside its weights"]


async def test_a_router_without_workers_names_no_model() -> None:
    assert models_of(await report()) == []


def test_what_the_planner_has_decided_and_does_not_see_yet_has_a_line_each() -> None:
    said = ("decode-1 drains, for 3 s", "ts-decode is to have 1 pod fewer: 403: forbidden")
    assert pending_of({"decision": Decision(0.0, HOLD, "", pending=said).facts()}) == list(said)
    assert pending_of({"decision": None}) == pending_of({}) == []
