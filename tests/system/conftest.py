"""A real cluster for a module's tests: the bundled model, real sockets, every member in this process or its own."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import pytest
from support.clusters.leases import patient_leases

from twostroke.cluster.config import load_config
from twostroke.cluster.model_facts import model_facts
from twostroke.cluster.placement import place
from twostroke.cluster.supervisor import Supervisor
from twostroke.worker.machine import machine_facts

__all__ = ["patient_leases"]


class Cluster:
    """A supervisor on an event loop of its own, so that blocking clients can be tested against it."""

    def __init__(self, **flags: Any) -> None:
        ports = {"router.port": 0, "router.grpc_port": 0}
        config = load_config(flags=ports | {name.replace("__", "."): value for name, value in flags.items()})
        self.said: list[str] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        plan = place(config, machine_facts(), model_facts(config))
        self.supervisor: Supervisor = self.run(_make(config, plan, self.said.append))

    @property
    def url(self) -> str:
        return self.supervisor.http_url

    @property
    def grpc(self) -> str:
        return self.supervisor.grpc_address

    def run(self, work: Coroutine[Any, Any, Any], timeout_s: float = 300.0) -> Any:
        future: Future[Any] = asyncio.run_coroutine_threadsafe(work, self._loop)
        return future.result(timeout_s)

    def start(self) -> None:
        self.run(self.supervisor.start())

    def stop(self) -> None:
        self.run(self.supervisor.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


async def _make(config: Any, plan: Any, say: Callable[[str], None]) -> Supervisor:
    return Supervisor(config, plan, say=say)


@contextmanager
def running_cluster(**flags: Any) -> Iterator[Cluster]:
    cluster = Cluster(**flags)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """One prefill and one decode worker with small bounds, in this process."""
    with running_cluster(
        cluster__launcher="inprocess",
        cluster__prefill=1,
        cluster__decode=1,
        step__num_threads=1,
        cache__tokens=16384,
        router__max_body_bytes=256 * 1024,
        router__local_prefill=False,  # whichever way this machine predicts to be quicker, KV is handed over
    ) as running:
        yield running


@pytest.fixture(scope="session")
def run_cluster() -> Callable[..., Any]:
    """`with run_cluster(cluster__prefill=2, ...) as cluster:` for tests that need one of their own."""
    return running_cluster
