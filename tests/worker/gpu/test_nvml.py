"""The reader of NVML against scripted devices: every error and every missing value has a defined outcome."""

from __future__ import annotations

import pytest
from support.fakes.nvml_script import DEFAULTS, ERRORS, GIB, Device, NvmlScript

from twostroke.worker.gpu.nvml import NvmlReader
from twostroke.worker.gpu.reading import ClockReason, Failure, MigFacts, ReadError, Reading, Recovery
from twostroke.worker.gpu.visible import DeviceName


def opened(script: NvmlScript, name: DeviceName | None = None) -> NvmlReader:
    reader = NvmlReader(script, name or DeviceName(0))
    reader.open()
    return reader


def test_reads_everything_in_the_units_that_it_says():
    values = {"clock_reasons": 0x48, "rows": (1, 2, 1, 0), "replays": 9, "recovery": 4, "corrected": 3}
    reading = opened(NvmlScript(Device(values=values))).read()
    assert reading == Reading(
        memory_used_bytes=20 * GIB,
        memory_total_bytes=80 * GIB,
        power_watts=300.0,
        power_limit_watts=700.0,
        temperature_c=55,
        sm_clock_mhz=1980,
        max_sm_clock_mhz=1980,
        clock_reasons=ClockReason.HW_SLOWDOWN | ClockReason.HW_THERMAL,
        corrected_errors=3,
        uncorrected_errors=0,
        remapped_rows=(1, 2),
        is_remap_pending=True,
        has_remap_failed=False,
        recovery=Recovery.DRAIN_AND_RESET,
        pcie_tx_bytes_per_s=1000 * 1024,
        pcie_rx_bytes_per_s=2000 * 1024,
        pcie_replays=9,
        nvlink_tx_bytes=10 * 1024,
        nvlink_rx_bytes=20 * 1024,
        mig=MigFacts(False),
    )
    assert reading.is_throttled


def test_a_consumer_card_gives_what_it_has_and_is_not_asked_again():
    missing = ("corrected", "uncorrected", "rows", "pages_pending", "nvlink", "limit_mw", "recovery")
    script = NvmlScript(Device(values=dict.fromkeys(missing)))
    reader = opened(script)
    reading = reader.read()
    assert reading.uncorrected_errors is reading.remapped_rows is reading.nvlink_tx_bytes is reading.recovery is None
    assert reading.power_watts == 300.0
    script.calls.clear()
    assert reader.read() == reading
    assert "nvmlDeviceGetTotalEccErrors" not in script.calls
    assert "nvmlDeviceGetPowerUsage" in script.calls


@pytest.mark.parametrize("name", sorted(set(DEFAULTS) - {"memory"}))
def test_no_value_is_needed(name: str):
    opened(NvmlScript(Device(values={name: None}))).read()


@pytest.mark.parametrize("error", ["NO_PERMISSION", "FUNCTION_NOT_FOUND", "VGPU_ECC_NOT_SUPPORTED", "NO_DATA"])
def test_what_is_forbidden_or_unknown_is_not_there(error: str):
    script = NvmlScript(Device(errors={"nvmlDeviceGetTotalEccErrors": error}))
    assert opened(script).read().corrected_errors is None


def test_an_older_library_lacks_functions():
    script = NvmlScript(Device())
    script.nvmlDeviceGetRemappedRows = None  # type: ignore[method-assign]
    script.nvmlDeviceGetCurrentClocksEventReasons = None  # type: ignore[method-assign]
    script.nvmlDeviceGetCurrentClocksThrottleReasons = lambda _: 0x20  # type: ignore[attr-defined]
    reading = opened(script).read()
    assert reading.remapped_rows is None
    assert reading.clock_reasons is ClockReason.SW_THERMAL


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ("GPU_IS_LOST", Failure.LOST),
        ("GPU_NOT_FOUND", Failure.LOST),
        ("RESET_REQUIRED", Failure.RESET_REQUIRED),
        ("UNINITIALIZED", Failure.UNREADABLE),
        ("UNKNOWN", Failure.UNREADABLE),
        ("TIMEOUT", Failure.UNREADABLE),
        ("DRIVER_NOT_LOADED", Failure.ABSENT),
    ],
)
@pytest.mark.parametrize(
    "function", ["nvmlDeviceGetMemoryInfo", "nvmlDeviceGetPcieReplayCounter", "nvmlEventSetWait_v2"]
)
def test_an_error_in_the_middle_has_its_kind(error: str, kind: Failure, function: str):
    device = Device()
    reader = opened(NvmlScript(device))
    reader.read()
    events = reader.open_events()
    device.errors[function] = error
    if function == "nvmlEventSetWait_v2" and error == "TIMEOUT":
        assert reader.next_xid(events, 10, None) is None
        return
    with pytest.raises(ReadError) as caught:
        reader.next_xid(events, 10, None) if function.startswith("nvmlEvent") else reader.read()
    assert caught.value.kind is kind
    assert error in str(caught.value)


def test_a_void_handle_is_no_missing_value():
    device = Device()
    reader = opened(NvmlScript(device))
    device.errors["nvmlDeviceGetMemoryInfo"] = "INVALID_ARGUMENT"
    with pytest.raises(ReadError) as caught:
        reader.read()
    assert caught.value.kind is Failure.UNREADABLE


def test_whatever_the_library_raises_is_a_read_error():
    script = NvmlScript(Device())
    reader = opened(script)

    def gone(_: object) -> int:
        raise OSError("libnvidia-ml.so.1 was unloaded")

    script.nvmlDeviceGetPowerUsage = gone  # type: ignore[method-assign]
    with pytest.raises(ReadError, match="unloaded"):
        reader.read()


@pytest.mark.parametrize("error", ["LIBRARY_NOT_FOUND", "DRIVER_NOT_LOADED"])
def test_without_a_driver_nvml_is_absent(error: str):
    script = NvmlScript(Device(errors={"nvmlInit": error}))
    with pytest.raises(ReadError) as caught:
        opened(script)
    assert caught.value.kind is Failure.ABSENT


def test_an_index_without_a_gpu_is_absent():
    with pytest.raises(ReadError, match="there is no GPU 1") as caught:
        opened(NvmlScript(Device()), DeviceName(1))
    assert caught.value.kind is Failure.ABSENT


# ------------------------------------------------------------------ names, slices


def sliced() -> tuple[NvmlScript, Device, Device]:
    one = Device("MIG-one", values={"memory": (10 * GIB, GIB)}, instance=1)
    two = Device("MIG-two", values={"memory": (20 * GIB, GIB)}, instance=2)
    gpu = Device("GPU-parent", values={"temperature": 70}, slices=[one, two])
    return NvmlScript(Device("GPU-other"), gpu), gpu, two


def test_a_slice_has_its_own_memory_and_all_else_of_its_gpu():
    script, _, _ = sliced()
    reader = NvmlReader(script, DeviceName(uuid="MIG-two"))
    identity = reader.open()
    assert (identity.uuid, identity.parent_uuid, identity.instance) == ("MIG-two", "GPU-parent", 2)
    reading = reader.read()
    assert (reading.memory_total_bytes, reading.temperature_c) == (20 * GIB, 70)
    assert reading.mig == MigFacts(True, ("MIG-one", "MIG-two"))


def test_of_a_sliced_gpu_only_the_own_slices_xids_count():
    script, gpu, _ = sliced()
    reader = opened(script, DeviceName(uuid="MIG-two"))
    events = reader.open_events()
    gpu.xids = [(94, 1), (94, 2), 79]
    assert [reader.next_xid(events, 20, 2) for _ in range(3)] == [None, 94, 79]


def test_a_shortened_uuid_names_the_one_that_begins_with_it():
    script, _, _ = sliced()
    assert NvmlReader(script, DeviceName(uuid="GPU-oth")).open().uuid == "GPU-other"
    assert NvmlReader(script, DeviceName(uuid="MIG-t")).open().uuid == "MIG-two"
    for ambiguous in ("GPU-", "GPU-none"):
        with pytest.raises(ReadError, match="devices have a UUID that begins with"):
            NvmlReader(script, DeviceName(uuid=ambiguous)).open()


def test_opening_again_gives_back_what_was_open():
    script = NvmlScript(Device())
    reader = opened(script)
    reader.open()
    reader.close()
    reader.close()
    assert (script.num_inits, script.num_shutdowns) == (2, 2)


# ------------------------------------------------------------------ the shape of the stand-in


def test_the_stand_in_has_the_numbers_of_the_real_library():
    real = pytest.importorskip("pynvml")
    script = NvmlScript()
    for name in dir(script):
        if name.startswith(("NVML_", "nvml")):
            assert hasattr(real, name), name
            if isinstance(getattr(script, name), int):
                assert getattr(real, name) == getattr(script, name), name
    for name, number in ERRORS.items():
        assert getattr(real, f"NVML_ERROR_{name}") == number
    assert real.NVMLError(15).value == 15
    assert {action.value for action in Recovery} >= {
        getattr(real, name) for name in dir(real) if name.startswith("NVML_GPU_RECOVERY_ACTION_")
    }
    for reason, name in (("HW_THERMAL", "HwThermalSlowdown"), ("SW_THERMAL", "SwThermalSlowdown")):
        assert getattr(real, f"nvmlClocksEventReason{name}") == ClockReason[reason]


def test_the_real_library_on_a_machine_without_a_driver_is_absent():
    real = pytest.importorskip("pynvml")
    try:
        real.nvmlInit()
    except real.NVMLError:
        with pytest.raises(ReadError) as caught:
            NvmlReader(real, DeviceName(0)).open()
        assert caught.value.kind is Failure.ABSENT
    else:
        real.nvmlShutdown()
        assert NvmlReader(real, DeviceName(0)).open().uuid.startswith("GPU-")
