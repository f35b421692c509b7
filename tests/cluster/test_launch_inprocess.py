"""Members in this process: one that ends by its own fault is told of, like any other."""

import asyncio
import shutil
import socket
from pathlib import Path

import httpx
import pytest

from twostroke.client.async_client import AsyncClient
from twostroke.cluster.config import load_config
from twostroke.cluster.launch.inprocess import InProcessLauncher
from twostroke.cluster.launch.last_words import ProcessEnd
from twostroke.cluster.launch.launcher import Site
from twostroke.cluster.placement import ProcessPlan
from twostroke.core.errors import ConfigError
from twostroke.core.ports import free_ports
from twostroke.core.request import Role
from twostroke.engine.link import messages as link


@pytest.fixture
async def launcher(tiny_checkpoint):
    flags = {"cache.tokens": 1024, "step.num_threads": 1, "model.max_model_len": 256, "router.port": 0}
    config = load_config(flags=flags | {"router.grpc_port": 0})
    made = InProcessLauncher(Site(config, str(tiny_checkpoint), "tiny", (0,)))
    yield made
    await made.close()


async def test_a_worker_whose_engine_ends_is_told_of_once_and_can_be_started_again(launcher):
    ends: list[str] = []
    told = asyncio.Event()

    def ended(name: str, end: ProcessEnd) -> None:
        ends.append(end.cause)
        told.set()

    member = ProcessPlan("w", "worker", Role.COMBINED, 1, 1 << 30)
    await launcher.start(member, ended)
    worker, _ = launcher._running["w"]
    worker.room.link.send(link.Stop())
    await asyncio.wait_for(told.wait(), 60)
    assert len(ends) == 1
    assert "own fault" in ends[0]
    told.clear()
    await launcher.start(member, ended)
    await launcher.stop("w", 0.0)
    await asyncio.sleep(0.05)
    assert ends[1:] == ["stopped"]


async def test_a_router_that_cannot_start_lets_its_ports_go():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        (free,) = free_ports("127.0.0.1", 1)
        flags = {"router.port": free, "router.grpc_port": taken.getsockname()[1]}
        launcher = InProcessLauncher(Site(load_config(flags=flags), "", "", (0,)))
        before = asyncio.all_tasks()
        with pytest.raises(ConfigError, match=r"is in use; choose another with --grpc-port"):
            await launcher.start(ProcessPlan("router-0", "router"), lambda *_: None)
    assert asyncio.all_tasks() <= before
    with socket.socket() as again:
        again.bind(("127.0.0.1", free))


@pytest.mark.parametrize("setting", ["auto", "none"])
async def test_a_checkpoints_sampling_defaults_reach_both_faces_unless_turned_off(setting, tiny_checkpoint, tmp_path):
    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "m"))
    (checkpoint / "generation_config.json").write_text('{"top_k": 3, "temperature": 0.25, "max_new_tokens": 5}')
    http, grpc, internal = free_ports("127.0.0.1", 3)
    flags = {"router.port": http, "router.grpc_port": grpc, "model.generation_config": setting, "cache.tokens": 1024}
    launcher = InProcessLauncher(Site(load_config(flags=flags), str(checkpoint), "tiny", (internal,)))
    try:
        for member in (ProcessPlan("router-0", "router"), ProcessPlan("w", "worker", Role.COMBINED, 1, 1 << 30)):
            await launcher.start(member, lambda *_: None)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{http}") as client:
            async with asyncio.timeout(240):
                while (await client.get("/health")).status_code != 200:
                    await asyncio.sleep(0.05)
            card = (await client.get("/v1/models")).json()["data"][0]
            answer = await client.post("/v1/completions", json={"prompt": "hi", "ignore_eos": True, "temperature": 0.5})
            found = (await client.get(f"/v1/requests/{answer.json()['id']}/explain")).json()["sampling"]
        async with AsyncClient(f"127.0.0.1:{grpc}") as sdk:
            told = (await sdk.explain((await sdk.generate("hi", ignore_eos=True)).request_id))["sampling"]
    finally:
        await launcher.close()
    is_on = setting == "auto"
    assert card["max_model_len"] == 1024  # the checkpoint was made for 2,048, and the pool holds no more
    assert card["default_sampling_params"] == ({"top_k": 3, "temperature": 0.25, "max_tokens": 5} if is_on else {})
    assert (found["top_k"], found["temperature"], found["max_tokens"]) == (3 if is_on else 0, 0.5, 16)
    assert (told["top_k"], told["temperature"]) == ((3, 0.25) if is_on else (0, 1.0))
