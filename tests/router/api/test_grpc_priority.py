"""A priority over gRPC: the key's bounds it, the request may lower it, as over HTTP."""

from pathlib import Path

import pytest
from support.fakes.scripted_router import HELLO, MODEL, router, worker

from twostroke import AsyncClient, InvalidRequest
from twostroke.router.keys.digests import line_for

BATCH = "tsk-batch-0123456789abcdef0123456789abcdef"
BUNDLED = Path(__file__).resolve().parents[3] / "model" / "bundled"


async def test_the_key_bounds_the_priority_and_the_request_may_lower_it(tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text(f"keys:\n  - key: {line_for(BATCH)}\n    tenant: batch\n    priority: 5\n")
    async with router(api_key_file=keys) as there, AsyncClient(there.grpc, api_key=BATCH) as client:
        fake = await there.add(worker(BUNDLED, "yes"))
        for options in ({}, {"priority": None}, {"priority": -3}, {"priority": 0}, {"priority": 7}):
            await client.generate("hello", model=MODEL, max_tokens=2, **options)  # type: ignore[arg-type]
        await client.chat(HELLO, model=MODEL, max_tokens=2, priority=8)
        async for _ in client.chat_stream(HELLO, model=MODEL, max_tokens=2, priority=9):
            pass
        assert [1000 - order.priority for order in fake.submits] == [5, 5, 5, 5, 7, 8, 9]
        for wrong in (-1001, 1001):
            with pytest.raises(InvalidRequest) as caught:
                await client.generate("hello", model=MODEL, priority=wrong)
            assert caught.value.param == "priority"
