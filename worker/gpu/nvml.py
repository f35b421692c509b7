"""Thin reader of NVML for one device: handles, one poll, XID events. Errors of NVML become a `ReadError` or a None.

`library` is the module pynvml of nvidia-ml-py, or any module of its shape. Calls may block: make them in a thread.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from typing import Any, TypeVar

from .reading import ClockReason, DeviceIdentity, Failure, MigFacts, ReadError, Reading, Recovery
from .visible import DeviceName, parent_in_name

Library = Any
T = TypeVar("T")

MAX_SLICES = 64
_ANY_INSTANCE = 0xFFFFFFFF  # GPU instance of an event that belongs to the whole GPU
_KIB = 1024
_ALL_LINKS = 0xFFFFFFFF  # scope of a field value
_log = logging.getLogger(__name__)


def load_library() -> Library | None:
    """The module pynvml, if it is installed."""
    try:
        return importlib.import_module("pynvml")
    except ImportError:
        return None


class NvmlReader:
    """Reads one device. `open` before anything else, and again after `ReadError` of kind UNREADABLE."""

    def __init__(self, library: Library, name: DeviceName) -> None:
        self._nvml = library
        self._name = name
        self._device: Any = None  # a GPU, or a slice
        self._gpu: Any = None  # the GPU itself, or the slice's
        self._missing: set[str] = set()  # values that this device does not give; they are not asked for again
        self._is_open = False

    # ------------------------------------------------------------------ life

    def open(self) -> DeviceIdentity:
        """Find the device.

        Raises:
            ReadError: NVML or the device cannot be used.
        """
        self.close()
        self._call(self._nvml.nvmlInit)
        self._is_open = True
        self._missing.clear()
        name = self._name
        if name.index is not None:
            if name.index >= self._call(self._nvml.nvmlDeviceGetCount):
                raise ReadError(Failure.ABSENT, f"there is no GPU {name.index}")
            self._device = self._call(self._nvml.nvmlDeviceGetHandleByIndex, name.index)
        else:
            self._device = self._by_uuid(name.uuid)
        self._gpu, parent, instance = self._device, "", None
        old = parent_in_name(name.uuid)
        if name.is_slice:
            self._gpu = self._call(self._nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle, self._device)
            parent = _text(self._call(self._nvml.nvmlDeviceGetUUID, self._gpu))
            instance = self._maybe("nvmlDeviceGetGpuInstanceId", self._device)
            instance = old[1] if instance is None and old else instance
        uuid = _text(self._call(self._nvml.nvmlDeviceGetUUID, self._device))
        return DeviceIdentity(uuid, _text(self._maybe("nvmlDeviceGetName", self._gpu) or ""), parent, instance)

    def close(self) -> None:
        """Give NVML back. Never fails."""
        if self._is_open:
            self._is_open = False
            try:
                self._nvml.nvmlShutdown()
            except Exception as error:  # the library may be gone with its driver
                _log.debug("nvmlShutdown: %s", error)

    # ------------------------------------------------------------------ one poll

    def read(self) -> Reading:
        """All counters of the device, in some milliseconds.

        Raises:
            ReadError: the device is lost or needs a reset, or NVML failed in the middle.
        """
        nvml, gpu = self._nvml, self._gpu
        memory = self._maybe("nvmlDeviceGetMemoryInfo", self._device)
        power = self._maybe("nvmlDeviceGetPowerUsage", gpu)
        limit = self._maybe("nvmlDeviceGetEnforcedPowerLimit", gpu)
        reasons = self._maybe("nvmlDeviceGetCurrentClocksEventReasons", gpu)
        if reasons is None:  # drivers before 535
            reasons = self._maybe("nvmlDeviceGetCurrentClocksThrottleReasons", gpu)
        rows = self._maybe("nvmlDeviceGetRemappedRows", gpu)
        pages = self._maybe("nvmlDeviceGetRetiredPagesPendingStatus", gpu) if rows is None else None
        errors, volatile = "nvmlDeviceGetTotalEccErrors", getattr(nvml, "NVML_VOLATILE_ECC", 0)
        return Reading(
            memory_used_bytes=None if memory is None else int(memory.used),
            memory_total_bytes=None if memory is None else int(memory.total),
            power_watts=None if power is None else power / 1000,
            power_limit_watts=None if limit is None else limit / 1000,
            temperature_c=self._maybe("nvmlDeviceGetTemperature", gpu, getattr(nvml, "NVML_TEMPERATURE_GPU", 0)),
            sm_clock_mhz=self._maybe("nvmlDeviceGetClockInfo", gpu, getattr(nvml, "NVML_CLOCK_SM", 1)),
            max_sm_clock_mhz=self._maybe("nvmlDeviceGetMaxClockInfo", gpu, getattr(nvml, "NVML_CLOCK_SM", 1)),
            clock_reasons=None if reasons is None else ClockReason(int(reasons) & 0x1FF),
            corrected_errors=self._maybe(errors, gpu, getattr(nvml, "NVML_MEMORY_ERROR_TYPE_CORRECTED", 0), volatile),
            uncorrected_errors=self._maybe(
                errors, gpu, getattr(nvml, "NVML_MEMORY_ERROR_TYPE_UNCORRECTED", 1), volatile
            ),
            remapped_rows=None if rows is None else (int(rows[0]), int(rows[1])),
            is_remap_pending=None if rows is None else bool(rows[2]),
            has_remap_failed=None if rows is None else bool(rows[3]),
            are_pages_pending=None if pages is None else bool(pages),
            recovery=self._recovery(),
            pcie_tx_bytes_per_s=self._pcie(getattr(nvml, "NVML_PCIE_UTIL_TX_BYTES", 0)),
            pcie_rx_bytes_per_s=self._pcie(getattr(nvml, "NVML_PCIE_UTIL_RX_BYTES", 1)),
            pcie_replays=self._maybe("nvmlDeviceGetPcieReplayCounter", gpu),
            nvlink_tx_bytes=self._kib("NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX"),
            nvlink_rx_bytes=self._kib("NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX"),
            mig=self._mig(),
        )

    # ------------------------------------------------------------------ XIDs

    def open_events(self) -> Any | None:
        """A set of events that hears this device's XIDs; None: the device or its driver has none.

        Raises:
            ReadError: NVML failed.
        """
        kinds = getattr(self._nvml, "nvmlEventTypeXidCriticalError", 0x8)
        supported = self._maybe("nvmlDeviceGetSupportedEventTypes", self._gpu)
        if supported is None or not supported & kinds:
            return None
        events = self._call(self._nvml.nvmlEventSetCreate)
        try:
            self._call(self._nvml.nvmlDeviceRegisterEvents, self._gpu, kinds, events)
        except ReadError:
            self.close_events(events)
            raise
        return events

    def next_xid(self, events: Any, timeout_ms: int, instance: int | None) -> int | None:
        """Wait for an XID; None: there was none, or it belongs to another slice than `instance`.

        Raises:
            ReadError: NVML failed; open the events again.
        """
        nvml = self._nvml
        try:
            event = nvml.nvmlEventSetWait_v2(events, timeout_ms)
        except nvml.NVMLError as error:
            if error.value == nvml.NVML_ERROR_TIMEOUT:
                return None
            raise self._read_error(error) from None
        if not event.eventType & getattr(nvml, "nvmlEventTypeXidCriticalError", 0x8):
            return None
        belongs_to = getattr(event, "gpuInstanceId", _ANY_INSTANCE)
        if instance is not None and belongs_to not in (instance, _ANY_INSTANCE):
            return None
        return int(event.eventData)

    def close_events(self, events: Any) -> None:
        """Free a set of events. Never fails."""
        try:
            self._nvml.nvmlEventSetFree(events)
        except Exception as error:
            _log.debug("nvmlEventSetFree: %s", error)

    # ------------------------------------------------------------------ inside

    def _by_uuid(self, uuid: str) -> Any:
        """Handle of a device by its UUID, which may be shortened to a prefix that one device alone has."""
        nvml = self._nvml
        try:
            return nvml.nvmlDeviceGetHandleByUUID(uuid)
        except nvml.NVMLError as error:
            if error.value not in (nvml.NVML_ERROR_NOT_FOUND, nvml.NVML_ERROR_INVALID_ARGUMENT):
                raise self._read_error(error) from None
        found = []
        for index in range(self._call(nvml.nvmlDeviceGetCount)):
            gpu = self._call(nvml.nvmlDeviceGetHandleByIndex, index)
            for handle in (gpu, *self._slices(gpu)):
                if _text(self._call(nvml.nvmlDeviceGetUUID, handle)).startswith(uuid):
                    found.append(handle)
        if len(found) != 1:
            raise ReadError(Failure.ABSENT, f"{len(found)} devices have a UUID that begins with {uuid}")
        return found[0]

    def _slices(self, gpu: Any) -> list[Any]:
        mode = self._maybe("nvmlDeviceGetMigMode", gpu)
        if mode is None or not mode[0]:
            return []
        most = min(self._maybe("nvmlDeviceGetMaxMigDeviceCount", gpu) or 0, MAX_SLICES)
        found = []
        for index in range(most):
            try:
                found.append(self._nvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, index))
            except self._nvml.NVMLError as error:
                if error.value not in (self._nvml.NVML_ERROR_NOT_FOUND, self._nvml.NVML_ERROR_INVALID_ARGUMENT):
                    raise self._read_error(error) from None
        return found

    def _mig(self) -> MigFacts | None:
        mode = self._maybe("nvmlDeviceGetMigMode", self._gpu)
        if mode is None:
            return None
        slices = [_text(self._call(self._nvml.nvmlDeviceGetUUID, handle)) for handle in self._slices(self._gpu)]
        return MigFacts(bool(mode[0]), tuple(slices))

    def _recovery(self) -> Recovery | None:
        value = self._field("NVML_FI_DEV_GET_GPU_RECOVERY_ACTION", 0)
        try:
            return None if value is None else Recovery(value)
        except ValueError:
            return None  # an action of a newer driver

    def _pcie(self, counter: int) -> int | None:
        kib_per_s = self._maybe("nvmlDeviceGetPcieThroughput", self._gpu, counter)
        return None if kib_per_s is None else int(kib_per_s) * _KIB

    def _kib(self, field: str) -> int | None:
        value = self._field(field, _ALL_LINKS)
        return None if value is None else value * _KIB

    def _field(self, name: str, scope: int) -> int | None:
        """One field value; None where the device has none."""
        number = getattr(self._nvml, name, None)
        if number is None or name in self._missing:
            return None
        values = self._maybe("nvmlDeviceGetFieldValues", self._gpu, [(number, scope)])
        if not values or values[0].nvmlReturn != 0:
            self._missing.add(name)
            return None
        value = values[0].value
        kind = values[0].valueType
        if kind == getattr(self._nvml, "NVML_VALUE_TYPE_UNSIGNED_INT", 1):
            return int(value.uiVal)
        return int(value.ullVal)

    def _maybe(self, name: str, *args: Any) -> Any:
        """Result of a call, or None where this device or driver does not know it.

        Raises:
            ReadError: any other error.
        """
        key = f"{name}{args[1:]}"
        function = getattr(self._nvml, name, None)
        if function is None or key in self._missing:
            return None
        try:
            return function(*args)
        except self._nvml.NVMLError as error:
            # Every device has memory: here an invalid argument is a handle that a reset of the driver made void.
            is_void = name == "nvmlDeviceGetMemoryInfo" and error.value == self._nvml.NVML_ERROR_INVALID_ARGUMENT
            if error.value in self._unsupported() and not is_void:
                self._missing.add(key)
                return None
            raise self._read_error(error, name) from None
        except Exception as error:  # of ctypes, when the library goes away
            raise ReadError(Failure.UNREADABLE, f"{name}: {error!r}") from None

    def _call(self, function: Callable[..., T], *args: Any) -> T:
        try:
            return function(*args)
        except self._nvml.NVMLError as error:
            raise self._read_error(error, getattr(function, "__name__", "")) from None
        except Exception as error:
            raise ReadError(Failure.UNREADABLE, repr(error)) from None

    def _read_error(self, error: Any, what: str = "") -> ReadError:
        nvml = self._nvml
        kind = Failure.UNREADABLE
        if error.value in (nvml.NVML_ERROR_GPU_IS_LOST, getattr(nvml, "NVML_ERROR_GPU_NOT_FOUND", 28)):
            kind = Failure.LOST
        elif error.value in (nvml.NVML_ERROR_LIBRARY_NOT_FOUND, nvml.NVML_ERROR_DRIVER_NOT_LOADED):
            kind = Failure.ABSENT
        elif error.value == getattr(nvml, "NVML_ERROR_RESET_REQUIRED", 16):
            kind = Failure.RESET_REQUIRED
        return ReadError(kind, f"{what}: {error}" if what else str(error))

    def _unsupported(self) -> tuple[int, ...]:
        nvml = self._nvml
        names = (
            *("NVML_ERROR_NOT_SUPPORTED", "NVML_ERROR_NO_PERMISSION", "NVML_ERROR_FUNCTION_NOT_FOUND"),
            *("NVML_ERROR_INVALID_ARGUMENT", "NVML_ERROR_NO_DATA", "NVML_ERROR_VGPU_ECC_NOT_SUPPORTED"),
            *("NVML_ERROR_ARGUMENT_VERSION_MISMATCH", "NVML_ERROR_DEPRECATED"),
        )
        return tuple(number for name in names if (number := getattr(nvml, name, None)) is not None)


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
