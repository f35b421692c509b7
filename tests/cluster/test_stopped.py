"""A process that a signal stopped holds its streams and connections: the supervisor replaces it at once."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from support.clusters.asking import Asking
from support.clusters.supervised import BUSY_MACHINE_S, supervised

from twostroke.client.async_client import AsyncClient


@pytest.mark.campaign
@pytest.mark.timeout(600)
async def test_a_stopped_worker_is_replaced_and_so_is_a_stopped_router(tiny_checkpoint: Path) -> None:
    said: list[str] = []

    async def until(is_so: Callable[[], bool]) -> None:
        async with asyncio.timeout(BUSY_MACHINE_S):
            while not is_so():
                await asyncio.sleep(0.02)

    # The patience with members that are merely silent is far longer than the test.
    flags = {"cluster.decode": 2, "cluster.replace_after_s": 10 * BUSY_MACHINE_S}
    async with supervised(tiny_checkpoint, **flags) as supervisor:
        supervisor._say = said.append
        async with AsyncClient(supervisor.grpc_address, timeout_s=BUSY_MACHINE_S) as client:
            async with Asking(client, 3, tokens=60) as asking:
                await asking.more(2)
                pids = {w["worker_id"]: w["pid"] for w in (await client.cluster())["workers"]}
                os.kill(pids["decode-0"], signal.SIGSTOP)
                await until(lambda: any("decode-0 is ready" in line for line in said))
                await asking.more(3)
            assert said[:2] == [
                "decode-0 was stopped by a signal (SIGSTOP); replacing it",
                "decode-0 ended (killed, to be replaced); starting it again in 0.0 s",
            ]
            os.kill((await client.cluster())["router"]["pid"], signal.SIGSTOP)
            await until(lambda: any("router-0 is ready" in line for line in said))
    assert sum("replacing it" in line for line in said) == 2
