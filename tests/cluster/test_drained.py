"""A worker that was told to drain by nobody of us is of no use for ever: the supervisor puts a new one in its place."""

import asyncio

from twostroke.client.async_client import AsyncClient
from twostroke.cluster.config import load_config
from twostroke.cluster.model_facts import model_facts
from twostroke.cluster.placement import place
from twostroke.cluster.supervisor import Supervisor
from twostroke.core.inside import InsideChannel
from twostroke.kv.keys import proof_key
from twostroke.protos import worker_pb2, worker_pb2_grpc
from twostroke.worker.machine import machine_facts


async def test_a_worker_that_drains_unasked_is_replaced(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr("twostroke.cluster.supervisor._WATCH_S", 0.05)
    flags = {
        "model.path": str(tiny_checkpoint),
        "model.max_model_len": 256,
        "cache.tokens": 1024,
        "step.num_threads": 1,
        "cluster.launcher": "inprocess",
        "cluster.prefill": 0,
        "cluster.replace_after_s": 0.3,
        "cluster.drain_timeout_s": 0.1,
        "router.port": 0,
        "router.grpc_port": 0,
    }
    config = load_config(flags=flags)
    said: list[str] = []
    supervisor = Supervisor(config, place(config, machine_facts(), model_facts(config)), say=said.append)
    try:
        await supervisor.start()
        async with AsyncClient(supervisor.grpc_address) as client:
            (worker,) = (await client.cluster())["workers"]
            first_life = worker["incarnation"]
            async with InsideChannel(worker["address"], proof_key(config.cluster.key)) as channel:
                stub = worker_pb2_grpc.WorkerStub(channel)
                assert (await stub.Drain(worker_pb2.DrainRequest(timeout_ms=100))).empty
            async with asyncio.timeout(30):
                while True:
                    workers = (await client.cluster())["workers"]
                    if any(w["state"] == "live" and w["incarnation"] != first_life for w in workers):
                        break
                    await asyncio.sleep(0.05)
            assert (await client.generate("hello", max_tokens=3, ignore_eos=True)).usage.completion_tokens == 3
        assert any("drains, and nobody here asked for it; replacing it" in line for line in said)
        assert sum("replacing it" in line for line in said) == 1
        assert any("ended (killed, to be replaced); starting it again" in line for line in said)
    finally:
        await supervisor.stop()
