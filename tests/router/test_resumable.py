"""Resumable streams over HTTP and gRPC at two routers: resumed anywhere, byte for byte, by their tenant alone."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from support.clusters.several_routers import KEYS
from support.clusters.steady_routers import NUM_TOKENS, body, events, ids_of, pair
from support.fakes.fake_worker import token_at
from support.fakes.short_worker import MODEL

from twostroke.client.async_client import AsyncClient
from twostroke.core import errors
from twostroke.protos import common_pb2


async def test_a_stream_goes_on_at_any_router_as_if_it_had_never_stopped():
    async with pair() as both:
        had = await events(both, body(), most=5, x_twostroke_resumable="1")
        whole = had
        for _ in range(8):  # each over a new connection: some at the router that runs it, some at the other
            last = ids_of(had)[-1]
            more = await events(both, {}, last_event_id=last)
            assert more[-1] == "data: [DONE]"
            whole = had + more
            assert len(ids_of(whole)) == len(set(ids_of(whole))) == 2 * (NUM_TOKENS + 1) + 1
            had = whole[: len(had) + 5]
        values = [json.loads(event.split("data: ")[1]) for event in whole[:-1]]
        assert len({(value["id"], value["created"]) for value in values}) == 1
        assert values[-1]["usage"]["completion_tokens"] == 2 * NUM_TOKENS
        assert sum("usage" in v and v["usage"] is not None for v in values) == 1
        again = await events(both, {}, last_event_id="r1:")
        assert again == whole
        assert len(both.worker.submits) == 2, "computed once"


async def test_a_stream_without_the_wish_has_no_ids_and_cannot_be_resumed():
    async with pair(1) as one:
        plain = await events(one, body())
        assert ids_of(plain) == []
        assert plain[-1] == "data: [DONE]"
        assert await events(one, {}, last_event_id="r1:") == ["404 request_not_found"]


@pytest.mark.parametrize(
    ("cursor", "told"),
    [
        ("r1:3-00000000.0", "409 cursor_lost"),
        ("r1:7000-01020304.0", "409 cursor_lost"),
        ("r1:0e.0e", "409 cursor_lost"),
        ("r1:x", "400 invalid_value"),
        ("r1:0", "400 invalid_value"),
        ("r1:-1.0", "400 invalid_value"),
        ("r2:0.0", "404 request_not_found"),
        ("", "404 request_not_found"),
        ("r1:" + "9" * 5000, "400 invalid_value"),
    ],
)
async def test_a_wrong_cursor_is_a_typed_error(cursor: str, told: str):
    async with pair(1) as one:
        assert (await events(one, body(), x_twostroke_resumable="1"))[-1] == "data: [DONE]"
        assert await events(one, {}, last_event_id=cursor) == [told]


async def test_another_tenant_finds_neither_the_stream_nor_the_key():
    async with pair() as both:
        mine = await events(both, body(), idempotency_key="k1")
        for _ in range(6):
            assert await events(both, {}, last_event_id=ids_of(mine)[3], key=KEYS[1]) == ["404 request_not_found"]
        theirs = await events(both, body(prompt="other"), idempotency_key="k1", key=KEYS[1])
        assert theirs[-1] == "data: [DONE]"
        assert len(both.worker.submits) == 4


async def test_an_idempotency_key_gives_the_same_answer_once_computed():
    async with pair() as both:
        sent = body(stream=False, stream_options=None)
        url = f"http://127.0.0.1:{both.port}/v1/completions"

        async def post(**changes: Any) -> httpx.Response:
            async with httpx.AsyncClient(timeout=60) as client:
                headers = {"api-key": KEYS[0], "idempotency-key": "once"}
                return await client.post(url, json={**sent, **changes}, headers=headers)

        first = await post()
        assert {(await post()).content for _ in range(6)} == {first.content}
        other = await post(max_tokens=3)
        assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_key_reused")
        assert len(both.worker.submits) == 2


async def test_a_request_is_cancelled_when_its_client_stays_away():
    async with pair(1, resume_grace_s=0.3) as one:
        one.worker.behaviour.stop_after = 4
        had = await events(one, body(), most=2, x_twostroke_resumable="1")
        assert one.worker.cancels == []
        async with asyncio.timeout(60):
            while not one.worker.cancels:
                await asyncio.sleep(0.05)
        told = await events(one, {}, last_event_id=ids_of(had)[-1])
        assert json.loads(told[-1].split("data: ")[1])["error"]["code"] == "cancelled"


async def test_a_refused_request_leaves_its_key_free():
    async with pair(1) as one:
        one.worker.behaviour.refuse = common_pb2.Error(code="invalid_value", message="no")
        assert await events(one, body(), idempotency_key="k") == ["400 invalid_value"]
        one.worker.behaviour.refuse = None
        assert (await events(one, body(max_tokens=2), idempotency_key="k"))[-1] == "data: [DONE]"


async def test_the_sdk_resumes_a_stream_and_joins_one_by_its_key():
    async with pair() as both, AsyncClient(f"127.0.0.1:{both.grpc_port}", api_key=KEYS[0]) as client:
        options: Any = {"model": MODEL, "max_tokens": NUM_TOKENS, "request_id": "g1", "resumable": True}
        stream = client.generate_stream("hello", **options)
        had = [await anext(stream) for _ in range(5)]
        await stream.close()
        for _ in range(4):
            async with AsyncClient(f"127.0.0.1:{both.grpc_port}", api_key=KEYS[0]) as other:
                rest = [chunk async for chunk in other.resume("g1", had[-1].cursor)]
                said = [token_id for chunk in had + rest for token_id in chunk.token_ids]
                assert said == [token_at(both.prompt, 0, index) for index in range(NUM_TOKENS)]
                assert rest[-1].usage is not None
                joined = [chunk async for chunk in other.generate_stream("hello", **options)]
                assert joined == [chunk async for chunk in other.resume("g1")]
                with pytest.raises(errors.IdempotencyKeyReused):
                    async for _ in other.generate_stream("bye", **options):
                        pass
                with pytest.raises(errors.CursorLost):
                    async for _ in other.resume("g1", "3-00000000"):
                        pass
                with pytest.raises(errors.RequestNotFound):
                    async for _ in other.resume("g2"):
                        pass
        assert len(both.worker.submits) == 1
