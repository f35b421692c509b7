"""Routers in this process that share their client ports, over one worker; started by the tests that use them."""

from __future__ import annotations

import httpx
from support.fakes.fake_worker import Behaviour, FakeWorker
from support.fakes.short_worker import ShortWorker

from twostroke.core.ports import free_ports
from twostroke.kv.keys import proof_key
from twostroke.router.config import RouterConfig
from twostroke.router.process import RouterProcess

KEY = "a-key-of-this-test's-cluster"
KEYS = ("first-key-of-this-test", "second-key-of-this-test")


class Routers:
    """Routers in this process that share their client ports, and one worker that announces itself to all."""

    def __init__(self, number: int) -> None:
        self.port, self.grpc_port, *self.inside = free_ports("127.0.0.1", 2 + number)
        self.processes: list[RouterProcess] = []
        self.worker: FakeWorker = ShortWorker("w0", proof_key=proof_key(KEY), behaviour=Behaviour())

    def settings(self, index: int) -> RouterConfig:
        return RouterConfig(
            port=self.port,
            grpc_port=self.grpc_port,
            internal_port=self.inside[index],
            name=f"router-{index}",
            peers=[f"127.0.0.1:{port}" for place, port in enumerate(self.inside) if place != index],
            shared_ports=True,
            api_keys=KEYS,
        )

    async def get(self, path: str, key: str = KEYS[0]) -> httpx.Response:
        """Ask over a connection of its own: the kernel chooses the router."""
        async with httpx.AsyncClient(timeout=60) as client:
            return await client.get(f"http://127.0.0.1:{self.port}{path}", headers={"api-key": key})
