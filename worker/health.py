"""Standard gRPC health service of a worker, based on the engine's beat. Knows no request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from ..core.clock import Clock
from ..core.lease import ENGINE_LEASE
from ..engine.link.client import EngineClient
from ..engine.link.messages import LoadNews
from ..kv.handover.transports.grpc import BLOCKS_SERVICE, HANDOVER_SERVICE
from ..protos import handover_pb2, worker_pb2

CHECK_S = 0.5

WORKER_SERVICE: str = worker_pb2.DESCRIPTOR.services_by_name["Worker"].full_name
_SERVICES = ("", WORKER_SERVICE, HANDOVER_SERVICE, BLOCKS_SERVICE)
_NOT_READY = ("loading", "stopped", "broken")


class Health:
    """Status SERVING while orders are taken and the engine beats, or has no work."""

    def __init__(self, dispatcher: EngineClient, clock: Clock, is_draining: Callable[[], bool]) -> None:
        self._dispatcher = dispatcher
        self._clock = clock
        self._is_draining = is_draining
        self._servicer = health.aio.HealthServicer()
        self._beat_at_s = clock.now_s()
        self._phase = "loading"
        self._ready = asyncio.Event()
        self.is_changing = False  # the engine is replaced by another one: that there is none is no fault
        dispatcher.on_load(self._on_load)

    def follow(self, dispatcher: EngineClient) -> None:
        """Watch another engine, which loads."""
        self._dispatcher = dispatcher
        self._phase, self._ready = "loading", asyncio.Event()
        dispatcher.on_load(self._on_load)

    async def wait_ready(self) -> None:
        """Return when the engine has warmed up."""
        await self._ready.wait()

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register the standard service."""
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    def is_serving(self) -> bool:
        """True if the worker takes orders and its engine is not hanging."""
        return self.is_live() and not self._is_draining()

    def is_live(self) -> bool:
        """True if the engine steps, or has no work: a draining worker too. False: only a restart can help."""
        if self.is_changing:
            return True
        if self._phase in _NOT_READY:
            return False
        is_stale = self._clock.now_s() - self._beat_at_s > ENGINE_LEASE.silence_s
        return not (is_stale and self._dispatcher.num_owned > 0)

    async def keep(self) -> None:
        """Keep the status up to date, for ever."""
        while True:
            serving = self.is_serving()
            status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
            for service in _SERVICES:
                await self._servicer.set(service, status)
            await asyncio.sleep(CHECK_S)

    def _on_load(self, load: LoadNews) -> None:
        self._beat_at_s = self._clock.now_s()
        self._phase = load.phase
        if load.phase not in _NOT_READY:
            self._ready.set()


def enable_reflection(server: grpc.aio.Server) -> None:
    """Let grpcurl and its like list what this port serves."""
    assert handover_pb2.DESCRIPTOR is not None  # its messages are in the pool
    names = (WORKER_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
