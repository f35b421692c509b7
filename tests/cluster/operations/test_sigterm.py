"""SIGTERM to a worker: it takes nothing new, ends what it can in its time, gives back the rest, and exits by itself."""

import asyncio
import os
import signal

import pytest
from support.clusters.asking import Asking
from support.clusters.supervised import BUSY_MACHINE_S, supervised

from twostroke.client.async_client import AsyncClient


@pytest.mark.campaign
@pytest.mark.timeout(600)
async def test_streams_of_a_terminated_worker_go_on_and_it_comes_back(tiny_checkpoint):
    flags = {"cluster.decode": 2, "cluster.drain_timeout_s": 0.1}  # no stream ends in so short a time
    said: list[str] = []
    async with (
        supervised(tiny_checkpoint, **flags) as supervisor,
        AsyncClient(supervisor.grpc_address, timeout_s=BUSY_MACHINE_S) as client,
    ):
        supervisor._say = said.append
        async with Asking(client, 4, tokens=120) as asking:
            await asking.more(2)
            pids = {w["worker_id"]: w["pid"] for w in (await client.cluster())["workers"]}
            for name in ("decode-0", "prefill-0"):
                os.kill(pids[name], signal.SIGTERM)
                async with asyncio.timeout(BUSY_MACHINE_S):
                    while not any(f"{name} is ready" in line for line in said):
                        await asyncio.sleep(0.05)
                await asking.more(4)
        counters = (await client.cluster())["counters"]
        assert (counters["workers_lost"], counters["rejected"]) == (0, 0)
    assert [line.partition(";")[0] for line in said if " ended " in line] == [
        "decode-0 ended (exit code 0: it was told to stop)",  # not killed
        "prefill-0 ended (exit code 0: it was told to stop)",
    ]
