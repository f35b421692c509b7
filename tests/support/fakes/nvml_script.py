"""NVML by a script: an object of pynvml's shape whose readings, errors, XIDs and hangs a test sets while it runs.

Numbers are those of nvml.h; tests/worker/gpu/test_nvml_shape.py compares them with the real pynvml.
"""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

GIB = 1 << 30
ERRORS = {
    "UNINITIALIZED": 1,
    "INVALID_ARGUMENT": 2,
    "NOT_SUPPORTED": 3,
    "NO_PERMISSION": 4,
    "NOT_FOUND": 6,
    "DRIVER_NOT_LOADED": 9,
    "TIMEOUT": 10,
    "LIBRARY_NOT_FOUND": 12,
    "FUNCTION_NOT_FOUND": 13,
    "GPU_IS_LOST": 15,
    "RESET_REQUIRED": 16,
    "NO_DATA": 21,
    "VGPU_ECC_NOT_SUPPORTED": 22,
    "ARGUMENT_VERSION_MISMATCH": 25,
    "DEPRECATED": 26,
    "GPU_NOT_FOUND": 28,
    "UNKNOWN": 999,
}


@dataclass
class Device:
    """One GPU, or a slice of one. A value of None is not supported."""

    uuid: str = "GPU-00000000-0000-0000-0000-000000000000"
    name: str = "Scripted GPU"
    values: dict[str, Any] = field(default_factory=dict)  # over DEFAULTS
    errors: dict[str, str] = field(default_factory=dict)  # function, or "all": name of an error
    hangs: set[str] = field(default_factory=set)  # functions that do not return before `NvmlScript.release`
    xids: list[Any] = field(default_factory=list)  # to be told; a number, or (number, GPU instance)
    parent: Device | None = None  # of a slice
    instance: int = 0
    slices: list[Device] = field(default_factory=list)
    has_events: bool = True

    def value(self, name: str) -> Any:
        return self.values.get(name, DEFAULTS[name])


DEFAULTS: dict[str, Any] = {
    "memory": (80 * GIB, 20 * GIB),  # total, used
    "power_mw": 300_000,
    "limit_mw": 700_000,
    "temperature": 55,
    "sm_clock": 1980,
    "max_sm_clock": 1980,
    "clock_reasons": 0,
    "corrected": 0,
    "uncorrected": 0,
    "rows": (0, 0, 0, 0),  # corrected, uncorrected, pending, failed
    "pages_pending": None,
    "recovery": 0,
    "pcie": (1000, 2000),  # KiB/s sent, received
    "replays": 0,
    "nvlink": (10, 20),  # KiB sent, received
}


class NvmlScript:
    """A module of pynvml's shape."""

    NVML_VOLATILE_ECC = 0
    NVML_MEMORY_ERROR_TYPE_CORRECTED, NVML_MEMORY_ERROR_TYPE_UNCORRECTED = 0, 1
    NVML_TEMPERATURE_GPU = 0
    NVML_CLOCK_SM = 1
    NVML_PCIE_UTIL_TX_BYTES, NVML_PCIE_UTIL_RX_BYTES = 0, 1
    NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX, NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX = 138, 139
    NVML_FI_DEV_GET_GPU_RECOVERY_ACTION = 230
    NVML_VALUE_TYPE_UNSIGNED_INT, NVML_VALUE_TYPE_UNSIGNED_LONG_LONG = 1, 3
    nvmlEventTypeXidCriticalError = 0x8

    class NVMLError(Exception):
        def __init__(self, value: int) -> None:
            super().__init__(value)
            self.value = value

        def __str__(self) -> str:
            return next((name for name, number in ERRORS.items() if number == self.value), str(self.value))

    def __init__(self, *devices: Device) -> None:
        self.devices = list(devices)
        self.num_inits = self.num_shutdowns = 0
        self.calls: list[str] = []
        self._freed = threading.Event()
        self._refresh = lambda: None
        for name, number in ERRORS.items():
            setattr(self, f"NVML_ERROR_{name}", number)

    @classmethod
    def following(cls, file: Path) -> NvmlScript:
        """Devices as a JSON file describes them, which is read again whenever it changes.

        XIDs that stand there at the first reading are of before; later ones are told once.
        """
        script = cls()
        seen = [""]
        told: dict[str, int] = {}

        def refresh() -> None:
            text = file.read_text()
            if text == seen[0]:
                return
            seen[0] = text
            waiting = {device.uuid: device.xids for device in script.devices}
            found = [Device(**entry) for entry in json.loads(text)]
            for device in found:
                history, device.hangs = device.xids, set(device.hangs)
                device.xids = [*waiting.get(device.uuid, ()), *history[told.get(device.uuid, len(history)) :]]
                told[device.uuid] = len(history)
            for at, device in enumerate(found):  # handles stay valid
                if at < len(script.devices):
                    script.devices[at].__dict__.update(device.__dict__)
                else:
                    script.devices.append(device)

        script._refresh = refresh
        refresh()
        return script

    def release(self) -> None:
        """Let all calls that hang return, with an error."""
        self._freed.set()

    # ------------------------------------------------------------------ the library

    def nvmlInit(self) -> None:
        self._enter("nvmlInit", None)
        self.num_inits += 1

    def nvmlShutdown(self) -> None:
        self.num_shutdowns += 1

    def nvmlDeviceGetCount(self) -> int:
        self._enter("nvmlDeviceGetCount", None)
        return len(self.devices)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Device:
        self._enter("nvmlDeviceGetHandleByIndex", None)
        return self.devices[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Device:
        self._enter("nvmlDeviceGetHandleByUUID", None)
        for gpu in self.devices:
            for device in (gpu, *gpu.slices):
                if device.uuid == uuid:
                    return device
        raise self.NVMLError(ERRORS["NOT_FOUND"])

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, device: Device) -> Device:
        return self._parent(device)

    def nvmlDeviceGetGpuInstanceId(self, device: Device) -> int:
        return device.instance

    def nvmlDeviceGetUUID(self, device: Device) -> str:
        self._enter("nvmlDeviceGetUUID", device)
        return device.uuid

    def nvmlDeviceGetName(self, device: Device) -> str:
        return device.name

    # ------------------------------------------------------------------ readings

    def nvmlDeviceGetMemoryInfo(self, device: Device) -> Any:
        total, used = self._of("nvmlDeviceGetMemoryInfo", device, "memory")
        return SimpleNamespace(total=total, used=used, free=total - used)

    def nvmlDeviceGetPowerUsage(self, device: Device) -> int:
        return self._of("nvmlDeviceGetPowerUsage", device, "power_mw")

    def nvmlDeviceGetEnforcedPowerLimit(self, device: Device) -> int:
        return self._of("nvmlDeviceGetEnforcedPowerLimit", device, "limit_mw")

    def nvmlDeviceGetTemperature(self, device: Device, _: int) -> int:
        return self._of("nvmlDeviceGetTemperature", device, "temperature")

    def nvmlDeviceGetClockInfo(self, device: Device, _: int) -> int:
        return self._of("nvmlDeviceGetClockInfo", device, "sm_clock")

    def nvmlDeviceGetMaxClockInfo(self, device: Device, _: int) -> int:
        return self._of("nvmlDeviceGetMaxClockInfo", device, "max_sm_clock")

    def nvmlDeviceGetCurrentClocksEventReasons(self, device: Device) -> int:
        return self._of("nvmlDeviceGetCurrentClocksEventReasons", device, "clock_reasons")

    def nvmlDeviceGetTotalEccErrors(self, device: Device, kind: int, _: int) -> int:
        return self._of("nvmlDeviceGetTotalEccErrors", device, ("corrected", "uncorrected")[kind])

    def nvmlDeviceGetRemappedRows(self, device: Device) -> tuple[int, int, int, int]:
        return tuple(self._of("nvmlDeviceGetRemappedRows", device, "rows"))

    def nvmlDeviceGetRetiredPagesPendingStatus(self, device: Device) -> int:
        return self._of("nvmlDeviceGetRetiredPagesPendingStatus", device, "pages_pending")

    def nvmlDeviceGetPcieThroughput(self, device: Device, counter: int) -> int:
        return self._of("nvmlDeviceGetPcieThroughput", device, "pcie")[counter]

    def nvmlDeviceGetPcieReplayCounter(self, device: Device) -> int:
        return self._of("nvmlDeviceGetPcieReplayCounter", device, "replays")

    def nvmlDeviceGetFieldValues(self, device: Device, fields: list[tuple[int, int]]) -> list[Any]:
        self._enter("nvmlDeviceGetFieldValues", device)
        ((number, _),) = fields
        values = {230: device.value("recovery")}
        if device.value("nvlink") is not None:
            values |= dict(zip((138, 139), device.value("nvlink"), strict=True))
        value = values.get(number)
        code = ERRORS["NOT_SUPPORTED"] if value is None else 0
        kind = 1 if number == 230 else 3
        union = SimpleNamespace(uiVal=value if kind == 1 else -1, ullVal=value if kind == 3 else -1)
        return [SimpleNamespace(nvmlReturn=code, valueType=kind, value=union)]

    def nvmlDeviceGetMigMode(self, device: Device) -> list[int]:
        self._enter("nvmlDeviceGetMigMode", device)
        return [int(bool(device.slices))] * 2

    def nvmlDeviceGetMaxMigDeviceCount(self, device: Device) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, device: Device, index: int) -> Device:
        if index >= len(device.slices):
            raise self.NVMLError(ERRORS["NOT_FOUND"])
        return device.slices[index]

    # ------------------------------------------------------------------ events

    def nvmlDeviceGetSupportedEventTypes(self, device: Device) -> int:
        self._enter("nvmlDeviceGetSupportedEventTypes", device)
        return 0x1F if device.has_events else 0

    def nvmlEventSetCreate(self) -> list[int]:
        self._enter("nvmlEventSetCreate", None)
        return []

    def nvmlDeviceRegisterEvents(self, device: Device, _: int, events: list[int]) -> None:
        events.append(self.devices.index(device))

    def nvmlEventSetWait_v2(self, events: list[int], timeout_ms: int) -> Any:
        end_s = time.monotonic() + timeout_ms / 1000
        while time.monotonic() < end_s:
            self._refresh()
            for index in events:
                device = self.devices[index]
                self._enter("nvmlEventSetWait_v2", device)
                if device.xids:
                    xid = device.xids.pop(0)
                    code, instance = xid if isinstance(xid, list | tuple) else (xid, 0xFFFFFFFF)
                    return SimpleNamespace(eventType=0x8, eventData=code, gpuInstanceId=instance)
            time.sleep(0.01)
        raise self.NVMLError(ERRORS["TIMEOUT"])

    def nvmlEventSetFree(self, events: list[int]) -> None:
        events.clear()

    # ------------------------------------------------------------------ inside

    def _parent(self, device: Device) -> Device:
        return device.parent or next(gpu for gpu in self.devices if device in gpu.slices)

    def _enter(self, function: str, device: Device | None) -> None:
        """Fail or hang, as the script says."""
        self._refresh()
        self.calls.append(function)
        device = device or (self.devices[0] if self.devices else Device())
        if function in device.hangs:
            self._freed.wait(60.0)
            raise self.NVMLError(ERRORS["UNKNOWN"])
        error = device.errors.get(function) or device.errors.get("all")
        if error:
            raise self.NVMLError(ERRORS[error])

    def _of(self, function: str, device: Device, name: str) -> Any:
        self._enter(function, device)
        value = device.value(name)
        if value is None:
            raise self.NVMLError(ERRORS["NOT_SUPPORTED"])
        return value
