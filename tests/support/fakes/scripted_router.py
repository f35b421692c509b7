"""A whole router in this process with scripted workers, and the clients of both its APIs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai
from support.clusters.flow_cluster import until
from support.fakes.scripted_worker import MODEL, ScriptedWorker

from twostroke import AsyncClient
from twostroke.core.ports import free_ports
from twostroke.kv.keys import proof_key
from twostroke.router.config import RouterConfig
from twostroke.router.process import RouterProcess

KEY = "a key of the tests"
HELLO: list[Any] = [{"role": "user", "content": "What is the weather in Oslo?"}]


class There:
    """A router with its workers, and the clients of both APIs."""

    def __init__(self, process: RouterProcess, config: RouterConfig) -> None:
        self.process = process
        self.url = f"http://127.0.0.1:{config.port}"
        self.openai = openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=30)
        self.grpc = f"127.0.0.1:{config.grpc_port}"
        self.sdk = AsyncClient(self.grpc)
        self._internal = f"127.0.0.1:{config.internal_port}"
        self.workers: list[ScriptedWorker] = []

    async def add(self, worker: ScriptedWorker) -> ScriptedWorker:
        await worker.start(self._internal)
        self.workers.append(worker)
        flow = self.process._flow
        states = lambda: {w["worker_id"]: w["state"] for w in flow.cluster()["workers"]}  # noqa: E731
        await until(lambda: states().get(worker.worker_id) == "live" and worker.watchers)
        return worker

    async def chat(self, **more: Any) -> Any:
        return await self.openai.chat.completions.create(model=MODEL, messages=HELLO, **more)


@asynccontextmanager
async def router(**settings: Any) -> AsyncIterator[There]:
    port, grpc_port, internal = free_ports("127.0.0.1", 3)
    config = RouterConfig(port=port, grpc_port=grpc_port, internal_port=internal, worker_return_s=0.0, **settings)
    process = RouterProcess(config, KEY)
    await process.start()
    there = There(process, config)
    try:
        yield there
    finally:
        await there.openai.close()
        await there.sdk.close()
        for worker in there.workers:
            await worker.die()
        await process.stop(0.0)


def worker(path: Path, says: str = "", name: str = "w0", **more: Any) -> ScriptedWorker:
    return ScriptedWorker(name, model_path=path, says=says, proof_key=proof_key(KEY), kv_blocks=100_000, **more)
