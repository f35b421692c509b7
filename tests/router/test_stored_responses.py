"""Stored responses with several routers: asked for, followed, cancelled and deleted at any, also where one is lost."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
from support.clusters.flow_cluster import until
from support.clusters.several_routers import KEY, KEYS
from support.clusters.steady_routers import Quick
from support.fakes.scripted_worker import MODEL, ScriptedWorker, make_model
from support.session.redis_server import redis_server

from twostroke.core.ports import free_ports
from twostroke.kv.keys import proof_key
from twostroke.router.config import RouterConfig
from twostroke.router.journal.redis_store import RedisStore
from twostroke.router.process import RouterProcess

SAYS = "Two cities.</think>Let me see: it rains in Oslo – and it will rain in Rome.\n" + (
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo – Østkanten"}}\n</tool_call>'
)
TOOL = {"type": "function", "name": "get_weather", "parameters": {"type": "object"}}
ASKED: dict[str, Any] = {
    "model": MODEL,
    "input": "What is the weather in Oslo?",
    "tools": [TOOL],
    "chat_template_kwargs": {"enable_thinking": True},
    "background": True,
}


class Apart(Quick):
    """Routers with HTTP ports of their own, so that a test chooses which one answers."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.ports = free_ports("127.0.0.1", 2 * number)

    def settings(self, index: int) -> RouterConfig:
        own = {"port": self.ports[2 * index], "grpc_port": self.ports[2 * index + 1], "shared_ports": False}
        return super().settings(index).model_copy(update=own)

    async def ask(self, index: int, method: str, path: str = "", key: str = KEYS[0], **more: Any) -> Any:
        """The body of an answer, with its status."""
        url = f"http://127.0.0.1:{self.ports[2 * index]}/v1/responses{path}"
        async with httpx.AsyncClient(timeout=30) as client:
            reply = await client.request(method, url, headers={"api-key": key}, **more)
            return {"http_status": reply.status_code, **reply.json()}

    async def events(self, index: int, path: str, most: int | None = None, **more: Any) -> list[dict[str, Any]]:
        """The events of a stream; leaves after `most`."""
        found: list[dict[str, Any]] = []
        url = f"http://127.0.0.1:{self.ports[2 * index]}/v1/responses{path}"
        method = "POST" if "json" in more else "GET"
        headers = {"api-key": KEYS[0]}
        async with (
            httpx.AsyncClient(timeout=30) as client,
            client.stream(method, url, headers=headers, **more) as reply,
        ):
            if reply.status_code in (429, 503):  # a starved machine: asked again
                await asyncio.sleep(float(reply.headers["retry-after"]))
                return await self.events(index, path, most, **more)
            if reply.status_code != 200:
                return [{"http_status": reply.status_code, **json.loads(await reply.aread())}]
            async for line in reply.aiter_lines():
                if line.startswith("data: "):
                    found.append(json.loads(line.removeprefix("data: ")))
                if most is not None and len(found) >= most:
                    break
        return found


@asynccontextmanager
async def pair(folder: Path, token_s: float = 0.02, **settings: Any) -> AsyncIterator[Apart]:
    both = Apart(2)
    both.more = settings
    model = folder / "model"
    both.worker = ScriptedWorker(
        "w0",
        proof_key=proof_key(KEY),
        model_path=model if model.exists() else make_model(model),
        says=SAYS,
        token_s=token_s,
        kv_blocks=100_000,
    )
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


async def over(both: Apart, index: int, name: str) -> dict[str, Any]:
    async with asyncio.timeout(60):
        while (now := await both.ask(index, "GET", f"/{name}"))["status"] in ("queued", "in_progress"):
            await asyncio.sleep(0.05)
    return dict(now)


def without_times(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Events that two runs of the same request have in common: without ids and times."""
    text = re.sub("call_[0-9a-f]{24}", "call_ID", json.dumps(events))
    name = events[0]["response"]["id"].removeprefix("resp_")
    created = events[0]["response"]["created_at"]
    return list(json.loads(text.replace(name, "ID").replace(f'"created_at": {created}', '"created_at": 0')))


async def test_any_router_answers_for_a_response_of_another(tmp_path):
    async with pair(tmp_path) as both:
        events = await both.events(0, "", json={**ASKED, "stream": True})
        name = events[0]["response"]["id"]
        final = events[-1]["response"]
        assert [item["type"] for item in final["output"]] == ["reasoning", "message", "function_call"]
        assert await both.ask(1, "GET", f"/{name}") == {"http_status": 200, **final}
        for after in (-1, 0, 9, len(events) - 3):
            query = "" if after < 0 else f"&starting_after={after}"
            assert await both.events(1, f"/{name}?stream=true{query}") == events[after + 1 :]
        listed = await both.ask(1, "GET", f"/{name}/input_items")
        assert listed["data"][0]["content"][0]["text"] == ASKED["input"]
        foreground = await both.ask(0, "POST", json={**ASKED, "background": False})
        then: dict[str, Any] = {"model": MODEL, "input": "And then?", "previous_response_id": foreground["id"]}
        unanswered = await both.ask(1, "POST", json=then)
        call = foreground["output"][-1]["call_id"]
        assert unanswered["http_status"] == 400
        assert f"No tool output found for function call '{call}'" in unanswered["error"]["message"]
        then["input"] = [{"type": "function_call_output", "call_id": call, "output": "rain"}]
        assert (await both.ask(1, "POST", json=then))["status"] == "completed"
        other = await both.ask(1, "GET", f"/{name}", key=KEYS[1])
        assert (other["http_status"], other["error"]["code"]) == (404, "request_not_found")
        assert (await both.ask(1, "DELETE", f"/{name}", key=KEYS[1]))["http_status"] == 404
        assert (await both.ask(1, "DELETE", f"/{name}"))["deleted"] is True
        assert (await both.ask(0, "GET", f"/{name}"))["http_status"] == 404


async def test_any_router_follows_and_cancels_what_runs_at_another(tmp_path):
    async with pair(tmp_path, token_s=0.1) as both:
        begun = await both.ask(0, "POST", json=ASKED)
        path = f"/{begun['id']}"
        had = await both.events(1, f"{path}?stream=true", most=9)
        now = await both.ask(1, "GET", path)
        assert now["status"] == "in_progress"
        assert now["output"][0]["content"][0]["text"]
        reading = asyncio.create_task(both.events(1, f"{path}?stream=true&starting_after={had[-1]['sequence_number']}"))
        await asyncio.sleep(0.3)
        assert (await both.ask(1, "POST", f"{path}/cancel"))["status"] == "cancelled"
        rest = await reading
        assert [event.get("sequence_number") for event in had + rest] == list(range(len(had + rest))), rest
        assert (rest[-1]["type"], rest[-1]["response"]["status"]) == ("response.failed", "cancelled")
        assert (await both.ask(0, "GET", path))["status"] == "cancelled"


async def test_cancelling_at_all_routers_at_once_says_the_same_everywhere(tmp_path):
    async with pair(tmp_path, token_s=0.05) as both:
        for _ in range(4):
            begun = await both.ask(0, "POST", json=ASKED)
            path = f"/{begun['id']}"
            await both.events(1, f"{path}?stream=true", most=8)
            told = await asyncio.gather(*(both.ask(number % 2, "POST", f"{path}/cancel") for number in range(8)))
            assert [one["status"] for one in told] == ["cancelled"] * 8
            assert all(one == told[0] for one in told), "what was said is final"


async def test_a_stream_whose_router_ended_goes_on_at_the_other_behind_its_number(tmp_path):
    with redis_server() as server:
        async with pair(tmp_path, journal_url=server.url) as both:
            sent = {**ASKED, "stream": True, "seed": 1}
            whole = await both.events(1, "", json=sent)
            had = await both.events(0, "", most=17, json=sent)
            name = had[0]["response"]["id"]
            await both.processes[0].stop(0.0)
            path = f"/{name}?stream=true&starting_after="
            more = await both.events(1, f"{path}{had[-1]['sequence_number']}")
            assert without_times(had + more) == without_times(whole)
            assert [order for order in both.worker.submits if order.emitted_tokens], "it went on after stored tokens"
            again = await both.events(1, f"{path}{had[-1]['sequence_number'] + 5}")
            assert again == more[5:]
            assert await both.ask(1, "GET", f"/{name}") == {"http_status": 200, **more[-1]["response"]}


async def test_an_event_that_was_not_stored_before_its_router_was_lost_is_no_place_to_go_on_from(tmp_path):
    with redis_server() as server:
        async with pair(tmp_path, token_s=0.05, journal_url=server.url) as both:
            begun = await both.ask(0, "POST", json=ASKED)
            path = f"/{begun['id']}?stream=true&starting_after="
            had = await both.events(0, f"/{begun['id']}?stream=true", most=8)
            await both.processes[0].stop(0.0)
            lost = await both.events(1, f"{path}500")
            assert (lost[0]["http_status"], lost[0]["error"]["code"]) == (409, "cursor_lost")
            assert lost[0]["error"]["param"] == "starting_after"
            certain = int(lost[0]["error"]["message"].split(" is ")[-1].split(":")[0])
            assert certain >= had[-1]["sequence_number"], "whatever was given out was stored before"
            rest = await both.events(1, f"{path}{certain}")
            assert rest[0]["sequence_number"] == certain + 1
            assert rest[-1]["type"] == "response.completed"


async def test_no_event_is_given_out_before_it_is_stored_so_a_killed_router_leaves_no_gap(tmp_path, monkeypatch):
    with redis_server() as server:
        async with pair(tmp_path, journal_url=server.url) as both:
            sent = {**ASKED, "stream": True, "seed": 1}
            whole = await both.events(1, "", json=sent)
            reading = asyncio.create_task(both.events(0, "", json=sent))
            dead, write = both.processes[0]._front.resumables.store, RedisStore._write
            await until(lambda: max(dead._written.values(), default=0) > 12)

            async def writes(store: RedisStore) -> bool:
                return True if store is dead else await write(store)

            monkeypatch.setattr(RedisStore, "_write", writes)
            await asyncio.sleep(0.3)  # it computes on, and its last words are never stored
            await both.processes[0].stop(0.0)
            *had, moved = await reading
            assert (moved["type"], moved["code"]) == ("error", "stream_moved")
            name, last = had[0]["response"]["id"], had[-1]["sequence_number"]
            more = await both.events(1, f"/{name}?stream=true&starting_after={last}")
            assert 5 < len(had) < len(whole) - 5
            assert without_times(had + more) == without_times(whole)


async def test_a_background_response_goes_on_where_it_is_asked_for_after_its_router_was_lost(tmp_path):
    with redis_server() as server:
        async with pair(tmp_path, token_s=0.05, journal_url=server.url) as both:
            begun = await both.ask(0, "POST", json=ASKED)
            kept = await both.ask(0, "POST", json={**ASKED, "background": False})
            await both.events(0, f"/{begun['id']}?stream=true", most=8)
            await asyncio.sleep(0.2)
            await both.processes[0].stop(0.0)
            done = await over(both, 1, begun["id"])
            assert done["status"] == "completed"
            assert [item["type"] for item in done["output"]] == ["reasoning", "message", "function_call"]
            assert (await both.ask(1, "GET", f"/{kept['id']}"))["output"] == kept["output"]
            path = f"/{begun['id']}"
            assert (await both.ask(1, "DELETE", path))["deleted"] is True
            assert (await both.ask(1, "GET", path))["http_status"] == 404
            assert redis.Redis(port=server.port).keys("ts:*")
            await both.ask(1, "DELETE", f"/{kept['id']}")
            await until(lambda: not redis.Redis(port=server.port).keys("ts:*"))


@pytest.mark.parametrize("how", ["killed", "frozen"])
async def test_a_broken_store_delays_a_stream_and_ends_none(tmp_path, how):
    with redis_server() as server:
        async with pair(tmp_path, journal_url=server.url) as both:
            first = await both.events(0, "", json={**ASKED, "stream": True})
            if how == "killed":
                server.process.kill()
            else:
                os.kill(server.process.pid, signal.SIGSTOP)
            second = await both.events(0, "", json={**ASKED, "stream": True})
            assert without_times(second) == without_times(first)
            name = second[0]["response"]["id"]
            assert (await both.ask(1, "GET", f"/{name}"))["status"] == "completed", "memory still has it"
            deleted = await both.ask(0, "DELETE", f"/{name}")
            assert (deleted["http_status"], deleted["error"]["code"]) == (503, "unavailable")
            assert (await both.ask(0, "POST", json=ASKED))["status"] == "queued"
