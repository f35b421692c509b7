"""The reason of a choice tells where its prompt was computed, also where the decode worker departed from it."""

from typing import Any

from support.clusters.flow_cluster import cluster, collect, request
from support.fakes.fake_worker import Behaviour, FakeWorker

from twostroke.core.request import Role


async def explained(decode: FakeWorker) -> dict[str, Any]:
    async with cluster() as c:
        await c.add(FakeWorker("prefill-0", Role.PREFILL))
        await c.add(decode)
        await collect(c.flow, request())
        found = c.flow.explain("tenant", "r1")
        assert found is not None
        return found


async def test_a_choice_that_was_followed_has_its_reason_alone() -> None:
    found = await explained(FakeWorker("decode-0", Role.DECODE))
    assert found["choice"]["reason"].startswith("decode-0, prefill on prefill-0: ")
    assert "itself" not in found["choice"]["reason"]
    assert found["choice"]["winner"]["computed_by"] == "prefill-0"


async def test_a_decode_worker_that_departed_from_it_says_why() -> None:
    decode = FakeWorker("decode-0", Role.DECODE)
    decode.behaviour = Behaviour(local_reason="under_a_block_missing")
    found = await explained(decode)
    assert found["prefill_worker"] is None
    end = "; decode-0 computed the prompt itself after all: under_a_block_missing"
    assert found["choice"]["reason"].endswith(end)


async def test_a_local_prefill_that_was_ordered_is_no_departure() -> None:
    async with cluster() as c:
        await c.add(FakeWorker("worker-0"))
        await collect(c.flow, request())
        found = c.flow.explain("tenant", "r1")
        assert found is not None
    assert found["choice"]["reason"].startswith("worker-0, prefill locally: ")
    assert "after all" not in found["choice"]["reason"]
    assert found["choice"]["winner"]["computed_by"] == "worker-0"
