"""A production router's flow and real workers that announce themselves to it, all in this process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from support.engines.workers import CLUSTER_KEY, Start

from twostroke.core.request import Request, Role
from twostroke.core.timeline import Timeline
from twostroke.kv.block import BlockIdentity
from twostroke.kv.keys import identity_key, proof_key
from twostroke.router.config import RouterConfig
from twostroke.router.requests.flow import Flow
from twostroke.router.routing.facts import ModelFacts, WorkerKey
from twostroke.worker.process import WorkerProcess


class RealCluster:
    """One router and its workers."""

    def __init__(self, flow: Flow, address: str, start_worker: Start) -> None:
        self.flow = flow
        self.address = address
        self._start_worker = start_worker

    async def add(self, role: Role, **changes: Any) -> WorkerProcess:
        """Start a worker; returns when the router may send it requests."""
        worker = await self._start_worker(role, routers=(self.address,), **changes)
        async with asyncio.timeout(60):
            while self._state(worker.settings.worker_id) != "live":
                await asyncio.sleep(0.01)
        return worker

    async def generate(self, request: Request) -> list[int]:
        """Generate to the end; tokens of all choices, by choice."""
        pieces = [piece async for piece in self.flow.generate(request, Timeline())]
        return [token for piece in sorted(pieces, key=lambda piece: piece.choice) for token in piece.token_ids]

    def identities(self, request: Request, model: ModelFacts) -> tuple[BlockIdentity, ...]:
        """The names that the router gives the blocks of a prompt."""
        return self.flow._members.identities(request, model)

    def lose(self, worker: WorkerProcess, may_return: bool) -> None:
        """Let the router believe that a worker is lost; with `may_return` it may get the same requests again."""
        key = WorkerKey(worker.settings.worker_id, worker.incarnation)
        if not may_return:
            self.flow._members.roster.leaving(key)
        self.flow._life.lost(key, "a test says so", self.flow.clock.now_s())

    def _state(self, worker_id: str) -> str | None:
        return {w["worker_id"]: w["state"] for w in self.flow.cluster()["workers"]}.get(worker_id)


@asynccontextmanager
async def real_cluster(start_worker: Start, **settings: Any) -> AsyncIterator[RealCluster]:
    """A router under the workers' key."""
    keys = {"identity_key": identity_key(CLUSTER_KEY), "proof_key": proof_key(CLUSTER_KEY)}
    flow = Flow(RouterConfig(**settings), **keys)
    server = flow.internal_server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    await flow.start()
    try:
        yield RealCluster(flow, f"127.0.0.1:{port}", start_worker)
    finally:
        await flow.close()
        await server.stop(None)
