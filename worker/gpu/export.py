"""The state of a GPU as a message and as metrics. Decides nothing.

Metrics that dcgm-exporter has carry its names and units, so that its dashboards show them; the others are ours.
"""

from __future__ import annotations

from ...core.board import Board, Kind, Metric
from ...protos import common_pb2
from .monitor import GpuState
from .xid import Action

_DEVICE = ("UUID",)


def _gauge(name: str, meaning: str, *labels: str) -> Metric:
    return Metric(name, Kind.GAUGE, meaning, labels=(*_DEVICE, *labels))


TEMPERATURE = _gauge("DCGM_FI_DEV_GPU_TEMP", "Temperature in degrees Celsius")
POWER = _gauge("DCGM_FI_DEV_POWER_USAGE", "Power in watts")
MEMORY_USED = _gauge("DCGM_FI_DEV_FB_USED", "Used memory in MiB")
MEMORY_FREE = _gauge("DCGM_FI_DEV_FB_FREE", "Free memory in MiB")
SM_CLOCK = _gauge("DCGM_FI_DEV_SM_CLOCK", "Clock of the multiprocessors in MHz")
CLOCK_REASONS = _gauge("DCGM_FI_DEV_CLOCK_THROTTLE_REASONS", "Bits of the reasons for slower clocks")
CORRECTED = _gauge("DCGM_FI_DEV_ECC_SBE_VOL_TOTAL", "Corrected ECC errors since the driver was loaded")
UNCORRECTED = _gauge("DCGM_FI_DEV_ECC_DBE_VOL_TOTAL", "Uncorrected ECC errors since the driver was loaded")
ROWS_CORRECTED = _gauge("DCGM_FI_DEV_CORRECTABLE_REMAPPED_ROWS", "Memory rows remapped for corrected errors")
ROWS_UNCORRECTED = _gauge("DCGM_FI_DEV_UNCORRECTABLE_REMAPPED_ROWS", "Memory rows remapped for uncorrected errors")
REMAP_FAILED = _gauge("DCGM_FI_DEV_ROW_REMAP_FAILURE", "1: a memory row could not be remapped")
PCIE_REPLAYS = _gauge("DCGM_FI_DEV_PCIE_REPLAY_COUNTER", "PCIe packets that were sent again")
VERDICT = _gauge("twostroke_gpu_verdict", "1 for the verdict that holds, 0 for the others", "verdict")
SLOWDOWN = _gauge("twostroke_gpu_slowdown_ratio", "Factor on predicted times while the GPU is throttled; 1: none")
READING_AGE = _gauge("twostroke_gpu_reading_age_seconds", "Since the last reading of NVML")
REMAP_PENDING = _gauge("twostroke_gpu_row_remap_pending", "1: memory rows wait for a reset of the GPU")
POWER_LIMIT = _gauge("twostroke_gpu_power_limit_watts", "Power that the GPU may take")
PCIE_TX = _gauge("twostroke_gpu_pcie_tx_bytes_per_second", "Bytes that the GPU sends over PCIe")
PCIE_RX = _gauge("twostroke_gpu_pcie_rx_bytes_per_second", "Bytes that the GPU receives over PCIe")
MIG_SLICES = _gauge("twostroke_gpu_mig_slices", "Slices of the GPU; 0: it is not sliced")
NVLINK_TX = Metric("twostroke_gpu_nvlink_tx_bytes", Kind.COUNTER, "Bytes sent over all NVLinks", labels=_DEVICE)
NVLINK_RX = Metric("twostroke_gpu_nvlink_rx_bytes", Kind.COUNTER, "Bytes received over all NVLinks", labels=_DEVICE)
XIDS = Metric("twostroke_gpu_xids", Kind.COUNTER, "XIDs that the driver reported", labels=(*_DEVICE, "xid"))


def set_metrics(board: Board, state: GpuState, *labels: str) -> None:
    """Set the metrics of a device. What the device does not give has no series."""
    where = (*labels, state.identity.uuid)
    for action in Action:
        board.set(VERDICT, *where, action.word, value=float(action is state.verdict.action))
    board.set(SLOWDOWN, *where, value=state.verdict.slowdown)
    if state.age_s is not None:
        board.set(READING_AGE, *where, value=state.age_s)
    for code, number in state.num_xids:
        board.set(XIDS, *where, str(code), value=number)
    reading = state.reading
    if reading is None:
        return
    used, total, rows = reading.memory_used_bytes, reading.memory_total_bytes, reading.remapped_rows
    values: dict[Metric, float | None] = {
        TEMPERATURE: reading.temperature_c,
        POWER: reading.power_watts,
        POWER_LIMIT: reading.power_limit_watts,
        MEMORY_USED: None if used is None else used >> 20,
        MEMORY_FREE: None if used is None or total is None else (total - used) >> 20,
        SM_CLOCK: reading.sm_clock_mhz,
        CLOCK_REASONS: None if reading.clock_reasons is None else int(reading.clock_reasons),
        CORRECTED: reading.corrected_errors,
        UNCORRECTED: reading.uncorrected_errors,
        ROWS_CORRECTED: None if rows is None else rows[0],
        ROWS_UNCORRECTED: None if rows is None else rows[1],
        REMAP_PENDING: reading.is_remap_pending,
        REMAP_FAILED: reading.has_remap_failed,
        PCIE_REPLAYS: reading.pcie_replays,
        PCIE_TX: reading.pcie_tx_bytes_per_s,
        PCIE_RX: reading.pcie_rx_bytes_per_s,
        NVLINK_TX: reading.nvlink_tx_bytes,
        NVLINK_RX: reading.nvlink_rx_bytes,
        MIG_SLICES: None if reading.mig is None else len(reading.mig.slices),
    }
    for metric, value in values.items():
        if value is not None:
            board.set(metric, *where, value=float(value))


def to_wire(state: GpuState) -> common_pb2.GpuState:
    """State of a device as a message."""
    reading, verdict = state.reading, state.verdict
    message = common_pb2.GpuState(
        uuid=state.identity.uuid,
        name=state.identity.name,
        parent_uuid=state.identity.parent_uuid,
        verdict=verdict.action.word,
        reasons=verdict.reasons,
        slowdown=verdict.slowdown if verdict.slowdown > 1 else 0.0,
        reading_age_s=-1.0 if state.age_s is None else state.age_s,
    )
    if reading is not None:
        message.memory_used_bytes = reading.memory_used_bytes or 0
        message.memory_total_bytes = reading.memory_total_bytes or 0
        message.power_watts = reading.power_watts or 0.0
        message.power_limit_watts = reading.power_limit_watts or 0.0
        message.temperature_c = reading.temperature_c or 0
        message.corrected_errors = reading.corrected_errors or 0
        message.uncorrected_errors = reading.uncorrected_errors or 0
    return message
