"""GPUs that fail under real worker processes: restarted, moved to a spare GPU, or left down, and said so.

The processes find a scripted pynvml first on their path; nothing else of them is different.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from twostroke.cli.main import app
from twostroke.client.async_client import AsyncClient
from twostroke.cluster.config import load_config
from twostroke.cluster.model_facts import model_facts
from twostroke.cluster.placement import place
from twostroke.cluster.supervisor import Supervisor
from twostroke.worker.machine import machine_facts

SCRIPTED = Path(__file__).parents[1] / "support" / "fakes" / "scripted_nvml"


class Gpus:
    """The file that the processes' NVML follows."""

    def __init__(self, file: Path, *names: str) -> None:
        self.file = file
        self.devices: list[dict[str, Any]] = [{"uuid": name, "xids": []} for name in names]
        self.write()

    def write(self) -> None:
        fresh = self.file.with_suffix(".new")
        fresh.write_text(json.dumps(self.devices))
        fresh.rename(self.file)

    def xid(self, index: int, code: int) -> None:
        self.devices[index]["xids"].append(code)
        self.write()


class Cluster:
    """A running cluster of one worker."""

    def __init__(self, supervisor: Supervisor, client: AsyncClient, said: list[str]) -> None:
        self.supervisor, self.client, self.said = supervisor, client, said

    async def worker(self) -> dict[str, Any] | None:
        """The live worker, if there is one."""
        live = [w for w in (await self.client.cluster())["workers"] if w["state"] == "live"]
        return live[0] if live else None

    async def another(self, incarnation: str) -> dict[str, Any]:
        """The next life of the worker."""
        async with asyncio.timeout(90):
            while True:
                worker = await self.worker()
                if worker is not None and worker["incarnation"] != incarnation and worker["gpus"]:
                    return worker
                await asyncio.sleep(0.1)

    async def heard(self, words: str) -> None:
        """Wait until the supervisor says something."""
        async with asyncio.timeout(240):
            while not any(words in line for line in self.said):
                await asyncio.sleep(0.1)


@asynccontextmanager
async def running(checkpoint: Path, *, spare: tuple[int, ...] = (), **more: Any) -> AsyncIterator[Cluster]:
    flags = {
        "model.path": str(checkpoint),
        "model.max_model_len": 256,
        "model.device": "cpu",
        "cache.tokens": 1024,
        "step.num_threads": 1,
        "cluster.launcher": "process",
        "cluster.prefill": 0,
        "cluster.gpu_health": "on",
        "router.port": 0,
        "router.grpc_port": 0,
    }
    config = load_config(flags=flags | {name.replace("__", "."): value for name, value in more.items()})
    plan = replace(place(config, machine_facts(), model_facts(config)), spare_gpus=spare)
    said: list[str] = []
    supervisor = Supervisor(config, plan, say=said.append)
    try:
        await supervisor.start()
        async with AsyncClient(supervisor.grpc_address) as client:
            yield Cluster(supervisor, client, said)
    finally:
        await supervisor.stop()


def status(grpc: str) -> str:
    """What `twostroke status` prints."""
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["status", "--grpc", grpc])
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gpus:
    monkeypatch.setenv("SCRIPTED_NVML", str(tmp_path / "gpus.json"))
    path = [str(SCRIPTED), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-zero,GPU-one")
    return Gpus(tmp_path / "gpus.json", "GPU-zero", "GPU-one")


@pytest.mark.campaign
@pytest.mark.parametrize("launcher", ["process", pytest.param("ray", marks=pytest.mark.ray)])
async def test_a_worker_is_restarted_on_its_gpu_moved_to_a_spare_one_and_then_left_down(
    tiny_checkpoint: Path, gpus: Gpus, launcher: str
) -> None:
    async with running(tiny_checkpoint, spare=(1,), cluster__launcher=launcher) as cluster:
        first = await cluster.another("")
        assert [gpu["uuid"] for gpu in first["gpus"]] == ["GPU-zero"]
        gpus.xid(0, 31)  # a fault of the work: the process is restarted on the same GPU
        second = await cluster.another(first["incarnation"])
        assert [gpu["uuid"] for gpu in second["gpus"]] == ["GPU-zero"]
        assert any("XID 31" in line and "starting it again" in line for line in cluster.said)
        gpus.xid(0, 79)  # a fault of the GPU: the next process has another one
        third = await cluster.another(second["incarnation"])
        assert [gpu["uuid"] for gpu in third["gpus"]] == ["GPU-one"]
        assert any("moves from GPU 0 to GPU 1" in line and "XID 79" in line for line in cluster.said)
        assert [gpu["uuid"] for gpu in (await cluster.client.cluster())["cordoned_gpus"]] == ["GPU-zero"]
        shown = await asyncio.to_thread(status, cluster.supervisor.grpc_address)
        assert "cordoned: GPU-zero (Scripted GPU) of combined-0" in shown
        assert "XID 79: the GPU has fallen off the bus" in shown
        assert "20,480/81,920" in shown  # MiB of the GPU that is used now
        usage = (await cluster.client.generate("hello", max_tokens=3, ignore_eos=True)).usage
        assert usage.completion_tokens == 3
        gpus.xid(1, 95)
        await cluster.heard("is not started again, because no other GPU is free: GPU-one is cordoned")
        cordoned = (await cluster.client.cluster())["cordoned_gpus"]
        assert {gpu["uuid"] for gpu in cordoned} == {"GPU-zero", "GPU-one"}
        assert any("XID 95" in reason for gpu in cordoned for reason in gpu["reasons"])
        await asyncio.sleep(1.5)
        assert await cluster.worker() is None


async def test_a_cluster_does_not_start_on_an_unfit_gpu_and_says_why(tiny_checkpoint: Path, gpus: Gpus) -> None:
    gpus.devices[0]["values"] = {"rows": [0, 1, 0, 1]}
    gpus.write()
    with pytest.raises(Exception, match="GPU-zero is cordoned: a memory row could not be remapped"):
        async with running(tiny_checkpoint):
            pass


@pytest.mark.campaign
async def test_a_hot_gpu_is_shown_and_one_off_the_bus_leaves_its_worker_down(tiny_checkpoint: Path, gpus: Gpus) -> None:
    async def verdict() -> str:
        worker = await cluster.worker()
        return worker["gpus"][0]["verdict"] if worker else "nobody"

    async def becomes(wanted: str) -> None:
        async with asyncio.timeout(240):
            while await verdict() != wanted:
                await asyncio.sleep(0.1)

    device = gpus.devices[0]
    async with running(tiny_checkpoint) as cluster:
        await becomes("ok")
        device["values"] = {"clock_reasons": 0x20, "sm_clock": 990}
        gpus.write()
        await becomes("throttled")
        device["values"], device["errors"] = {}, {"nvmlDeviceGetTemperature": "UNKNOWN"}  # in the middle of a poll
        gpus.write()
        await asyncio.sleep(2.0)
        device["errors"] = {}
        gpus.write()
        await becomes("ok")
        device["errors"] = {"all": "GPU_IS_LOST"}
        gpus.write()
        await cluster.heard("is not started again, because no other GPU is free: GPU-zero is cordoned: the GPU is lost")
        assert await verdict() == "nobody"
