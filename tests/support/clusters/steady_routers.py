"""Routers over a worker that gives a token every few milliseconds, and the events of their streams over HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
from support.clusters.several_routers import KEY, KEYS, Routers
from support.fakes.fake_worker import Behaviour, FakeWorker
from support.fakes.short_worker import BUNDLED, MODEL

from twostroke.kv.keys import proof_key
from twostroke.protos import common_pb2
from twostroke.router.config import RouterConfig
from twostroke.router.process import RouterProcess

NUM_TOKENS = 24


class SteadyWorker(FakeWorker):
    """Gives every token that is asked for, a few milliseconds apart, under the bundled model's name."""

    def info(self) -> common_pb2.WorkerInfo:
        info = super().info()
        info.model.name = MODEL
        info.model.path = str(BUNDLED)
        info.model.vocab_size = 4096
        return info


class Quick(Routers):
    """With further settings, over a worker that is slow enough to leave its streams."""

    more: dict[str, Any]

    @property
    def prompt(self) -> list[int]:
        return list(self.worker.submits[0].prompt_ids)

    def settings(self, index: int) -> RouterConfig:
        return super().settings(index).model_copy(update=self.more)


@asynccontextmanager
async def pair(number: int = 2, **settings: Any) -> AsyncIterator[Quick]:
    found = Quick(number)
    found.more = settings
    found.worker = SteadyWorker("w0", proof_key=proof_key(KEY), behaviour=Behaviour(token_s=0.02))
    for index in range(number):
        found.processes.append(RouterProcess(found.settings(index), KEY))
        await found.processes[-1].start()
    await found.worker.start(f"127.0.0.1:{found.inside[0]}")
    for port in found.inside[1:]:
        await found.worker.announce_also(f"127.0.0.1:{port}")
    try:
        async with asyncio.timeout(60):
            while not all(p._flow.is_ready for p in found.processes):
                await asyncio.sleep(0.01)
        yield found
    finally:
        for process in found.processes:
            await process.stop(0.0)
        await found.worker.die()


def body(**more: Any) -> dict[str, Any]:
    asked = {"model": MODEL, "prompt": "hello", "max_tokens": NUM_TOKENS, "stream": True, "n": 2, "request_id": "r1"}
    return {**asked, "stream_options": {"include_usage": True}, **more}


async def events(
    routers: Quick, sent: dict[str, Any] | None, *, most: int | None = None, key: str = KEYS[0], **headers: str
) -> list[str]:
    """The events of a stream, over a connection of its own; leaves after `most`. Asks again where a router is busy."""
    url = f"http://127.0.0.1:{routers.port}/v1/completions"
    found: list[str] = []
    named = {name.replace("_", "-"): value for name, value in headers.items()} | {"api-key": key}
    async with httpx.AsyncClient(timeout=60) as client, client.stream("POST", url, json=sent, headers=named) as answer:
        if answer.status_code == 429:  # on a starved machine
            await asyncio.sleep(float(answer.headers["retry-after"]))
            return await events(routers, sent, most=most, key=key, **headers)
        if answer.status_code != 200:
            return [f"{answer.status_code} {json.loads(await answer.aread())['error']['code']}"]
        text = ""
        async for part in answer.aiter_text():
            *whole, text = (text + part).split("\n\n")
            found += whole
            if most is not None and len(found) >= most:
                return found[:most]
    return found


def ids_of(stream: list[str]) -> list[str]:
    return [event.split("\n")[0].removeprefix("id: ") for event in stream if event.startswith("id: ")]
