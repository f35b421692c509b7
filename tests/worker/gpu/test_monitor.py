"""The threads around NVML: errors in the middle, hangs, a driver that comes back, and nothing where no GPU is."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable

import pytest
from support.fakes.nvml_script import Device, NvmlScript

from twostroke.core.clock import MonotonicClock
from twostroke.worker.gpu import monitor as monitor_module
from twostroke.worker.gpu.monitor import GpuMonitor
from twostroke.worker.gpu.nvml import NvmlReader
from twostroke.worker.gpu.verdict import HealthLimits, Verdict
from twostroke.worker.gpu.visible import DeviceName
from twostroke.worker.gpu.xid import Action

PATIENT = HealthLimits(silent_after_s=60.0)
QUICK = HealthLimits(throttled_after_s=0.1, cool_after_s=0.2, silent_after_s=0.4, settled_after_s=0.3)


class Watched:
    """A monitor with quick limits, and the verdicts that it told."""

    def __init__(self, *devices: Device, limits: HealthLimits) -> None:
        self.script = NvmlScript(*devices)
        self.told: list[Verdict] = []
        reader = NvmlReader(self.script, DeviceName(0))
        self.monitor = GpuMonitor(reader, "GPU 0", MonotonicClock(), self.told.append, limits=limits, poll_s=0.02)

    async def until(self, holds: Callable[[], bool], timeout_s: float = 60.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not holds():
                await asyncio.sleep(0.01)

    @property
    def action(self) -> Action:
        return self.monitor.state().verdict.action


@pytest.fixture
async def watched() -> AsyncIterator[Callable[..., Watched]]:
    made: list[Watched] = []

    def make(*devices: Device, limits: HealthLimits = QUICK) -> Watched:
        made.append(Watched(*(devices or (Device("GPU-a"),)), limits=limits))
        return made[-1]

    yield make
    for one in made:
        one.script.release()
        await one.monitor.close()


async def test_throttling_appears_and_vanishes(watched: Callable[..., Watched]) -> None:
    one = watched()
    assert await one.monitor.start() == Verdict()
    device = one.script.devices[0]
    device.values = {"clock_reasons": 0x40, "sm_clock": 990}
    await one.until(lambda: one.action is Action.THROTTLED)
    assert one.monitor.state().verdict.slowdown == 2.0
    device.values = {}
    await one.until(lambda: one.action is Action.NOTHING)
    await one.until(lambda: [v.action for v in one.told] == [Action.THROTTLED, Action.NOTHING])


async def test_an_xid_is_told_at_once(watched: Callable[..., Watched], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor_module, "LOOK_S", 30.0)  # so that only the thread's call tells it
    one = watched()
    await one.monitor.start()
    one.script.devices[0].xids = [63, 79]
    await one.until(lambda: one.action is Action.CORDON)
    await one.until(lambda: bool(one.told) and one.told[-1].action is Action.CORDON)
    assert one.monitor.state().num_xids == ((63, 1), (79, 1))


async def test_an_error_in_the_middle_is_one_missed_reading(
    watched: Callable[..., Watched], caplog: pytest.LogCaptureFixture
) -> None:
    one = watched(limits=PATIENT)
    await one.monitor.start()
    device, before = one.script.devices[0], one.script.num_inits
    device.errors["nvmlDeviceGetPowerUsage"] = "UNKNOWN"
    await one.until(lambda: one.script.num_inits > before)  # the handles are found anew
    assert one.action is Action.NOTHING
    device.errors.clear()
    await one.until(lambda: (one.monitor.state().age_s or 9.0) < 0.1)
    assert one.told == []
    assert sum("gave no reading" in record.message for record in caplog.records) == 1  # not one per poll


async def test_a_driver_that_is_replaced_comes_back(watched: Callable[..., Watched]) -> None:
    one = watched()
    await one.monitor.start()
    device = one.script.devices[0]
    device.errors["all"] = "UNINITIALIZED"
    await one.until(lambda: one.action is Action.THROTTLED)  # silence is avoided
    assert "has not answered" in one.monitor.state().verdict.reasons[-1]
    device.errors.clear()
    await one.until(lambda: one.action is Action.NOTHING)
    device.xids = [74]  # and its events are heard again
    await one.until(lambda: one.action is Action.DRAIN)


async def test_a_gpu_off_the_bus_is_cordoned(watched: Callable[..., Watched]) -> None:
    one = watched()
    await one.monitor.start()
    one.script.devices[0].errors["all"] = "GPU_IS_LOST"
    await one.until(lambda: one.action is Action.CORDON)
    assert "the GPU is lost" in one.monitor.state().verdict.reasons[-1]


async def test_the_first_verdict_is_told_once(watched: Callable[..., Watched]) -> None:
    one = watched(Device("GPU-a", errors={"nvmlDeviceGetMemoryInfo": "GPU_IS_LOST"}))
    verdict = await one.monitor.start()
    assert verdict is not None
    assert verdict.action is Action.CORDON
    await asyncio.sleep(0.1)
    assert one.told == []


@pytest.mark.parametrize("function", ["nvmlDeviceGetTemperature", "nvmlEventSetWait_v2"])
async def test_a_hang_is_noticed_and_stops_nobody(watched: Callable[..., Watched], function: str) -> None:
    one = watched()
    await one.monitor.start()
    device = one.script.devices[0]
    device.hangs.add(function)
    if function == "nvmlEventSetWait_v2":
        await asyncio.sleep(1.0)
        await one.until(lambda: one.action is Action.NOTHING and (one.monitor.state().age_s or 9.0) < 0.2)
    else:
        await one.until(lambda: one.action is Action.THROTTLED)
        await one.until(lambda: bool(one.told) and one.told[-1].action is Action.THROTTLED)
        device.xids = [79]  # the other thread goes on
        await one.until(lambda: one.action is Action.CORDON)
    began_s = time.monotonic()
    await one.monitor.close()
    assert time.monotonic() - began_s < 2.0


async def test_a_hang_at_the_start_does_not_hold_a_worker_up(
    watched: Callable[..., Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor_module, "FIRST_READ_S", 0.1)
    one = watched(Device("GPU-a", hangs={"nvmlInit"}))
    verdict = await one.monitor.start()
    assert verdict is not None
    assert not verdict.ends_process
    await one.until(lambda: one.action is Action.THROTTLED)
    assert one.monitor.state().identity.uuid == "GPU 0"  # all that is known of it
    assert one.monitor.state().age_s is None


async def test_a_device_without_events_is_polled(watched: Callable[..., Watched]) -> None:
    one = watched(Device("GPU-a", has_events=False))
    await one.monitor.start()
    one.script.devices[0].values = {"uncorrected": 1}
    await one.until(lambda: one.action is Action.RESTART)


@pytest.mark.parametrize("error", ["LIBRARY_NOT_FOUND", "DRIVER_NOT_LOADED"])
async def test_without_a_gpu_there_is_one_line(
    watched: Callable[..., Watched], caplog: pytest.LogCaptureFixture, error: str
) -> None:
    caplog.set_level(logging.DEBUG, "twostroke.worker.gpu")
    one = watched(Device(errors={"nvmlInit": error}))
    assert await one.monitor.start() is None
    assert [(r.levelno, r.message) for r in caplog.records] == [(logging.INFO, f"no GPU is watched: nvmlInit: {error}")]
    assert one.told == []


async def test_a_slow_library_is_asked_less_often(watched: Callable[..., Watched]) -> None:
    one = watched()
    slow = one.script.nvmlDeviceGetPowerUsage

    def slowly(device: Device) -> int:
        time.sleep(0.1)
        return slow(device)

    one.script.nvmlDeviceGetPowerUsage = slowly  # type: ignore[method-assign]
    await one.monitor.start()
    before = one.script.calls.count("nvmlDeviceGetPowerUsage")
    await asyncio.sleep(1.5)
    # a fifth of the time is for polls of 0.1 s: about three of them
    assert one.script.calls.count("nvmlDeviceGetPowerUsage") - before <= 4
