"""Resumable chats with tools and reasoning: resumed anywhere, also in the middle of a call, they say the same."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.clusters.flow_cluster import until
from support.clusters.several_routers import KEY, KEYS
from support.clusters.steady_routers import Quick, ids_of
from support.fakes.scripted_worker import MODEL, ScriptedWorker, make_model
from support.session.redis_server import redis_server

from twostroke import AsyncClient
from twostroke.kv.keys import proof_key
from twostroke.router.process import RouterProcess

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {"name": name, "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
    }
    for name in ("get_weather", "get_time")
]
CALLS = [("get_weather", {"city": "Oslo – Østkanten"}), ("get_time", {"city": "Rome"})]
SAYS = "Two cities.</think>Let me see.\n" + "\n".join(
    "<tool_call>\n" + json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False) + "\n</tool_call>"
    for name, arguments in CALLS
)
ASKED: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "What is the weather in Oslo?"}],
    "tools": TOOLS,
    "chat_template_kwargs": {"enable_thinking": True},
    "max_tokens": 400,
    "stream": True,
    "stream_options": {"include_usage": True},
}


@asynccontextmanager
async def pair(folder: Path, **settings: Any) -> AsyncIterator[Quick]:
    both = Quick(2)
    both.more = settings
    both.worker = ScriptedWorker("w0", proof_key=proof_key(KEY), model_path=make_model(folder / "model"), says=SAYS)
    for index in range(2):
        both.processes.append(RouterProcess(both.settings(index), KEY))
        await both.processes[-1].start()
    await both.worker.start(f"127.0.0.1:{both.inside[0]}")
    await both.worker.announce_also(f"127.0.0.1:{both.inside[1]}")
    try:
        await until(lambda: all(p._flow.is_ready for p in both.processes), 60.0)
        yield both
    finally:
        for process in both.processes:
            await process.stop(0.0)
        await both.worker.die()


async def events(
    both: Quick, sent: dict[str, Any], most: int | None = None, path: str = "chat/completions", **headers: str
) -> list[str]:
    """The events of a stream, over a connection of its own; leaves after `most`."""
    named = {name.replace("_", "-"): value for name, value in headers.items()} | {"api-key": KEYS[0]}
    found: list[str] = []
    url = f"http://127.0.0.1:{both.port}/v1/{path}"
    async with httpx.AsyncClient(timeout=60) as client, client.stream("POST", url, json=sent, headers=named) as answer:
        assert answer.status_code == 200, await answer.aread()
        text = ""
        async for part in answer.aiter_text():
            *whole, text = (text + part).split("\n\n")
            found += whole
            if most is not None and len(found) >= most:
                return found[:most]
    return found


def said(stream: list[str]) -> tuple[str, str, list[tuple[str, Any]], str]:
    """Reasoning, content, calls and finish reason, as a client puts them together."""
    reasoning, content, reason = "", "", ""
    calls: dict[int, list[str]] = {}
    for line in stream:
        data = line.split("data: ")[1]
        for choice in json.loads(data)["choices"] if data != "[DONE]" else ():
            delta = choice["delta"]
            reasoning += delta.get("reasoning") or ""
            content += delta.get("content") or ""
            reason = choice["finish_reason"] or reason
            for call in delta.get("tool_calls", ()):
                name, arguments = calls.setdefault(call["index"], ["", ""])
                told = call["function"]
                calls[call["index"]] = [name + (told.get("name") or ""), arguments + told["arguments"]]
    return reasoning, content, [(name, json.loads(arguments)) for _, (name, arguments) in sorted(calls.items())], reason


async def test_a_chat_with_tools_is_resumed_behind_its_events(tmp_path: Path):
    async with pair(tmp_path) as both:
        plain = await events(both, ASKED)
        whole = await events(both, ASKED | {"request_id": "r1"}, x_twostroke_resumable="1")
        assert said(plain) == said(whole) == ("Two cities.", "Let me see.", CALLS, "tool_calls")
        ids = ids_of(whole)
        assert len(ids) == len(set(ids)) == len(whole) - 1
        for place in range(0, len(ids), 3):
            assert await events(both, {}, last_event_id=ids[place]) == whole[place + 1 :], ids[place]
        assert await events(both, {}, last_event_id="r1:") == whole
        assert len(both.worker.submits) == 2, "each computed once"


async def test_the_sdk_resumes_calls_and_reasoning(tmp_path: Path):
    async with pair(tmp_path) as both, AsyncClient(f"127.0.0.1:{both.grpc_port}", api_key=KEYS[0]) as client:
        options: Any = {
            "model": MODEL,
            "tools": TOOLS,
            "chat_template_kwargs": {"enable_thinking": True},
            "max_tokens": 400,
            "resumable": True,
            "request_id": "g1",
        }
        whole = [chunk async for chunk in client.chat_stream(ASKED["messages"], **options)]
        assert [call.name for chunk in whole for call in chunk.tool_calls] == [name for name, _ in CALLS]
        for place in range(0, len(whole), 3):
            async with AsyncClient(f"127.0.0.1:{both.grpc_port}", api_key=KEYS[0]) as other:
                assert [c async for c in other.resume("g1", whole[place].cursor)] == whole[place + 1 :]


@pytest.mark.parametrize("index", [3, 25, 60])
async def test_a_router_dies_and_the_other_goes_on_within_reasoning_and_calls(tmp_path: Path, index: int):
    with redis_server() as server:
        async with pair(tmp_path, journal_url=server.url) as both:
            both.worker.dies_at = index  # it waits there, until its order is cancelled
            had: list[str] = []

            async def follow() -> None:
                had.extend(await events(both, ASKED | {"request_id": "r1"}, index, x_twostroke_resumable="1"))

            await asyncio.wait_for(follow(), 60)
            (owner,) = [p for p in both.processes if len(p._front.streams.journal)]
            (entry,) = owner._front.streams.journal.entries()
            assert not entry.is_over
            both.worker.dies_at = None
            await owner.stop(0.0)
            more = await events(both, {}, last_event_id=ids_of(had)[-1])
            assert more[-1] == "data: [DONE]"
            assert said(had + more) == ("Two cities.", "Let me see.", CALLS, "tool_calls")
            (adopter,) = [p for p in both.processes if p is not owner]
            assert adopter._front.resumables.num_adopted == 1


async def test_a_chat_that_is_over_is_read_from_the_store_as_it_was(tmp_path: Path):
    with redis_server() as server:
        async with pair(tmp_path, journal_url=server.url) as both:
            whole = await events(both, ASKED | {"request_id": "r1"}, x_twostroke_resumable="1")
            (owner,) = [p for p in both.processes if len(p._front.streams.journal)]
            await until(lambda: not owner._front.resumables.store.num_waiting)
            await asyncio.sleep(0.2)  # the last batch may be under way
            await owner.stop(0.0)
            assert await events(both, {}, last_event_id="r1:") == whole
            assert len(both.worker.submits) == 1
