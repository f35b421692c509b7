"""A worker beside a scripted GPU: what it tells routers and scrapers, and how it gives a GPU up."""

from __future__ import annotations

import asyncio
import urllib.request
from collections.abc import Callable

import pytest
from support.clusters.real_cluster import RealCluster, real_cluster
from support.engines.workers import Start
from support.fakes.nvml_script import Device, NvmlScript

from twostroke.core.errors import DeviceCordoned, DeviceFault
from twostroke.core.request import Request, Role, SamplingParams
from twostroke.worker.gpu import monitor
from twostroke.worker.process import WorkerProcess

UUID = "GPU-11111111-2222-3333-4444-555555555555"


@pytest.fixture(autouse=True)
def polls_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "POLL_S", 0.02)


def beside(*devices: Device) -> dict[str, object]:
    return {"gpu_health": "on", "nvml": NvmlScript(*devices)}


def shown(cluster: RealCluster, worker_id: str) -> dict[str, object] | None:
    """The worker's first GPU as `status` shows it."""
    for worker in cluster.flow.cluster()["workers"]:
        if worker["worker_id"] == worker_id and worker["gpus"]:
            return worker["gpus"][0]
    return None


async def until(holds: Callable[[], object], timeout_s: float = 60.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not holds():
            await asyncio.sleep(0.02)


def request(number: int, max_tokens: int = 4) -> Request:
    return Request(
        request_id=f"r{number}",
        model="tiny",
        prompt_ids=tuple(range(number % 7, 40 + number % 7)),
        sampling=SamplingParams(max_tokens=max_tokens, temperature=0.0, seed=1, ignore_eos=True),
        num_choices=1,
        isolation_domain="tests",
        timeout_s=60.0,
    )


async def test_the_state_goes_to_routers_and_scrapers(start_worker: Start) -> None:
    device = Device(UUID, "Scripted H100", values={"corrected": 7})
    async with real_cluster(start_worker) as cluster:
        worker = await cluster.add(Role.COMBINED, worker_id="w", **beside(device))
        await until(lambda: shown(cluster, "w"))
        gpu = shown(cluster, "w")
        assert gpu is not None
        assert (gpu["uuid"], gpu["name"], gpu["verdict"], gpu["slowdown"]) == (UUID, "Scripted H100", "ok", 0.0)
        assert (gpu["memory_total_bytes"], gpu["power_watts"], gpu["corrected_errors"]) == (80 << 30, 300.0, 7)
        assert [g.uuid for g in worker.info().gpus] == [UUID]
        device.xids = [63]
        await until(lambda: worker.info().gpus[0].reasons)
        page = await asyncio.to_thread(_read, f"http://{worker.metrics_address}/metrics")
    labels = 'engine="w",model_name="tiny"'
    assert f'DCGM_FI_DEV_GPU_TEMP{{UUID="{UUID}",{labels}}} 55.0' in _sorted_labels(page)
    assert f'DCGM_FI_DEV_FB_FREE{{UUID="{UUID}",{labels}}} 61440.0' in _sorted_labels(page)
    assert f'DCGM_FI_DEV_ECC_SBE_VOL_TOTAL{{UUID="{UUID}",{labels}}} 7.0' in _sorted_labels(page)
    assert f'twostroke_gpu_xids_total{{UUID="{UUID}",{labels},xid="63"}} 1.0' in _sorted_labels(page)
    assert f'twostroke_gpu_verdict{{UUID="{UUID}",{labels},verdict="ok"}} 1.0' in _sorted_labels(page)
    assert f'twostroke_gpu_verdict{{UUID="{UUID}",{labels},verdict="cordon"}} 0.0' in _sorted_labels(page)


async def test_the_router_avoids_a_throttled_gpu_while_it_is_one(start_worker: Start) -> None:
    device = Device(UUID, values={"clock_reasons": 0x40, "sm_clock": 495})
    async with real_cluster(start_worker) as cluster:
        await cluster.add(Role.COMBINED, worker_id="hot", **beside(device))
        await cluster.add(Role.COMBINED, worker_id="cool", **beside(Device("GPU-cool")))
        await until(lambda: (shown(cluster, "hot") or {}).get("verdict") == "throttled")
        assert (shown(cluster, "hot") or {})["slowdown"] == 4.0
        for number in range(6):
            await cluster.generate(request(number, max_tokens=16))
            explained = cluster.flow.explain("tests", f"r{number}")
            assert explained is not None
            assert explained["decode_worker"] == "cool"
            by_name = {c["decode_worker"]: c for c in explained["choice"]["candidates"]}
            assert by_name["hot"]["throttle_ms"] > 0.0
            assert by_name["cool"]["throttle_ms"] == 0.0
        device.values = {}
        await until(lambda: (shown(cluster, "hot") or {}).get("verdict") == "ok")
        await cluster.generate(request(99))
        explained = cluster.flow.explain("tests", "r99")
        assert explained is not None
        assert all(c["throttle_ms"] == 0.0 for c in explained["choice"]["candidates"])


async def test_a_worker_whose_only_peer_is_throttled_still_serves(start_worker: Start) -> None:
    async with real_cluster(start_worker) as cluster:
        device = Device(UUID, values={"clock_reasons": 0x80})
        await cluster.add(Role.COMBINED, worker_id="hot", **beside(device))
        await until(lambda: (shown(cluster, "hot") or {}).get("verdict") == "throttled")
        assert len(await cluster.generate(request(1))) == 4


@pytest.mark.parametrize(
    ("xid", "fault", "grace"),
    [(79, DeviceCordoned, False), (95, DeviceCordoned, False), (64, DeviceCordoned, True), (31, DeviceFault, False)],
)
async def test_an_xid_ends_the_worker_and_running_work_ends_first_where_it_may(
    start_worker: Start, xid: int, fault: type[DeviceFault], grace: bool
) -> None:
    device = Device(UUID)
    async with real_cluster(start_worker) as cluster:
        worker = await cluster.add(Role.COMBINED, worker_id="w", drain_timeout_s=20.0, **beside(device))
        running = asyncio.create_task(cluster.generate(request(1, max_tokens=400)))
        await until(lambda: worker.dispatcher.num_owned)
        device.xids = [xid]
        await asyncio.wait_for(worker.ended.wait(), 30)
        assert type(worker.fault) is fault
        assert f"XID {xid}" in str(worker.fault)
        await until(lambda: fault is DeviceFault or cluster.flow.cluster()["cordoned_gpus"])
        await worker.stop(0.0)
        result = (await asyncio.gather(running, return_exceptions=True))[0]
        assert (isinstance(result, list) and len(result) == 400) is grace, result
        cordoned = cluster.flow.cluster()["cordoned_gpus"]
        assert [(gpu["uuid"], gpu["worker_id"]) for gpu in cordoned] == (
            [(UUID, "w")] if fault is DeviceCordoned else []
        )


async def test_a_leaving_worker_says_that_its_gpu_is_cordoned(start_worker: Start) -> None:
    """With its last words, also if it ends before a load report leaves."""
    device = Device(UUID)
    async with real_cluster(start_worker) as cluster:
        worker = await cluster.add(Role.DECODE, worker_id="w", **beside(device))
        device.xids = [79]
        await asyncio.wait_for(worker.ended.wait(), 30)
        await worker.stop(0.0)
        await until(lambda: cluster.flow.cluster()["cordoned_gpus"])
        # another process on it, which finds it well: the operator has seen to it
        await cluster.add(Role.DECODE, worker_id="w2", **beside(Device(UUID)))
        await until(lambda: not cluster.flow.cluster()["cordoned_gpus"])


async def test_an_uncorrectable_error_waits_for_what_it_is(start_worker: Start) -> None:
    contained, alone = Device("GPU-contained"), Device("GPU-alone")
    async with real_cluster(start_worker) as cluster:
        first = await cluster.add(Role.DECODE, worker_id="first", **beside(contained))
        second = await cluster.add(Role.DECODE, worker_id="second", **beside(alone))
        contained.xids, alone.xids = [48, 94], [48]
        await asyncio.wait_for(asyncio.gather(first.ended.wait(), second.ended.wait()), 30)
        assert type(first.fault) is DeviceFault
        assert type(second.fault) is DeviceCordoned


async def test_faults_of_nvml_itself_end_nobody(start_worker: Start) -> None:
    device = Device(UUID)
    async with real_cluster(start_worker) as cluster:
        worker = await cluster.add(Role.COMBINED, worker_id="w", **beside(device))
        for error in ("UNKNOWN", "UNINITIALIZED", "DRIVER_NOT_LOADED", "TIMEOUT"):
            device.errors = {"nvmlDeviceGetMemoryInfo": error}
            await asyncio.sleep(0.2)
            assert len(await cluster.generate(request(1))) == 4
        device.errors, device.hangs = {}, {"nvmlDeviceGetPcieReplayCounter"}
        await until(lambda: (shown(cluster, "w") or {}).get("verdict") == "throttled")
        assert len(await cluster.generate(request(2))) == 4
        assert not worker.ended.is_set()


@pytest.mark.parametrize(
    "device",
    [
        Device(UUID, values={"rows": (0, 4, 0, 1)}),
        Device(UUID, values={"recovery": 1}),
        Device(UUID, errors={"nvmlDeviceGetMemoryInfo": "GPU_IS_LOST"}),
        Device(UUID, errors={"nvmlDeviceGetMemoryInfo": "RESET_REQUIRED"}),
    ],
    ids=["remap failed", "reset wanted", "lost", "reset required"],
)
async def test_no_worker_starts_on_an_unfit_gpu(start_worker: Start, device: Device) -> None:
    with pytest.raises(DeviceCordoned, match=f"{UUID} is cordoned: "):
        await start_worker(Role.COMBINED, **beside(device))


async def test_without_nvml_a_worker_serves_as_ever(start_worker: Start) -> None:
    for script in (NvmlScript(), NvmlScript(Device(errors={"nvmlInit": "LIBRARY_NOT_FOUND"}))):
        worker: WorkerProcess = await start_worker(Role.COMBINED, gpu_health="on", nvml=script)
        assert list(worker.info().gpus) == []
        page = await asyncio.to_thread(_read, f"http://{worker.metrics_address}/metrics")
        assert "DCGM" not in page


def _read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read().decode()


def _sorted_labels(page: str) -> str:
    lines = []
    for line in page.splitlines():
        name, brace, rest = line.partition("{")
        if not brace or line.startswith("#"):
            continue
        labels, _, value = rest.rpartition("} ")
        lines.append(f"{name}{{{','.join(sorted(labels.split(',')))}}} {value}")
    return "\n".join(lines)
