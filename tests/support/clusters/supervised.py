"""A supervisor with real processes around the tiny checkpoint, in the test's own event loop."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from twostroke.cluster.config import Config, load_config
from twostroke.cluster.model_facts import model_facts
from twostroke.cluster.placement import place
from twostroke.cluster.supervisor import Supervisor
from twostroke.worker.machine import machine_facts

BUSY_MACHINE_S = 120.0


def configured(tiny_checkpoint: Path, **more: Any) -> Config:
    """One prefill and one decode worker, each a process with one thread."""
    flags = {
        "model.path": str(tiny_checkpoint),
        "model.max_model_len": 256,
        "model.kernels": "torch",
        "cache.tokens": 4096,
        "step.num_threads": 1,
        "router.port": 0,
        "router.grpc_port": 0,
        "cluster.launcher": "process",
        "cluster.prefill": 1,
        "cluster.decode": 1,
        "cluster.key": "a key of this test",
        "cluster.drain_timeout_s": 20.0,
    }
    return load_config(flags=flags | more)


@asynccontextmanager
async def supervised(tiny_checkpoint: Path, **more: Any) -> AsyncIterator[Supervisor]:
    """A cluster that serves."""
    config = configured(tiny_checkpoint, **more)
    supervisor = Supervisor(config, place(config, machine_facts(), model_facts(config)), say=lambda _: None)
    try:
        await supervisor.start()
        yield supervisor
    finally:
        await supervisor.stop()
