"""One poll of a GPU's counters, as plain values. Knows no NVML and no clock."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntFlag


class ClockReason(IntFlag):
    """Reasons for clocks below the maximum. Source: `nvmlClocksEventReason…` of nvml.h."""

    IDLE = 0x1
    APPLICATION_CLOCKS = 0x2
    SW_POWER_CAP = 0x4  # the usual state of a busy GPU: its power limit
    HW_SLOWDOWN = 0x8
    SYNC_BOOST = 0x10
    SW_THERMAL = 0x20
    HW_THERMAL = 0x40
    HW_POWER_BRAKE = 0x80
    DISPLAY_CLOCKS = 0x100


THROTTLED_BY = ClockReason.HW_SLOWDOWN | ClockReason.SW_THERMAL | ClockReason.HW_THERMAL | ClockReason.HW_POWER_BRAKE
"""Reasons that a working GPU does not have: heat, and a power supply that cannot keep up."""


class Recovery(Enum):
    """What the driver asks for, from release 565 on. Source: `NVML_GPU_RECOVERY_ACTION_…` of nvml.h."""

    NONE = 0
    GPU_RESET = 1
    NODE_REBOOT = 2
    DRAIN_P2P = 3
    DRAIN_AND_RESET = 4
    RECOVER_IMEX_DOMAIN = 5
    BUS_RESET = 6
    SYSTEM_REBOOT = 7


@dataclass(frozen=True, slots=True)
class DeviceIdentity:
    """The device that a worker computes on."""

    uuid: str  # "GPU-…", or "MIG-…" for a slice
    name: str = ""
    parent_uuid: str = ""  # of a slice: the GPU that it is part of
    instance: int | None = None  # of a slice: id of its GPU instance


@dataclass(frozen=True, slots=True)
class MigFacts:
    """Slices of a GPU."""

    is_on: bool
    slices: tuple[str, ...] = ()  # UUIDs


@dataclass(frozen=True, slots=True)
class Reading:
    """Counters of a device; None where the device, its driver or a permission does not give one.

    Of a slice, memory is the slice's and all else its GPU's.
    """

    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    power_watts: float | None = None
    power_limit_watts: float | None = None
    temperature_c: int | None = None
    sm_clock_mhz: int | None = None
    max_sm_clock_mhz: int | None = None
    clock_reasons: ClockReason | None = None
    corrected_errors: int | None = None  # ECC, since the driver was loaded
    uncorrected_errors: int | None = None
    remapped_rows: tuple[int, int] | None = None  # for corrected, for uncorrected errors
    is_remap_pending: bool | None = None  # a reset of the GPU replaces the rows
    has_remap_failed: bool | None = None
    are_pages_pending: bool | None = None  # GPUs before Ampere: pages that the next load of the driver retires
    recovery: Recovery | None = None
    pcie_tx_bytes_per_s: int | None = None
    pcie_rx_bytes_per_s: int | None = None
    pcie_replays: int | None = None
    nvlink_tx_bytes: int | None = None  # since the driver was loaded, over all links
    nvlink_rx_bytes: int | None = None
    mig: MigFacts | None = None

    @property
    def is_throttled(self) -> bool:
        """True if heat or the power supply slows the clocks."""
        return bool((self.clock_reasons or ClockReason(0)) & THROTTLED_BY)


class Failure(Enum):
    """Kinds of a poll that gave nothing."""

    LOST = "lost"  # the GPU is not on the bus any more
    RESET_REQUIRED = "reset required"
    ABSENT = "absent"  # there is no NVML, no driver, or no such device
    UNREADABLE = "unreadable"  # NVML itself fails, e.g. while the driver is replaced; says nothing about the GPU


class ReadError(Exception):
    """A poll gave nothing."""

    def __init__(self, kind: Failure, message: str) -> None:
        super().__init__(message)
        self.kind = kind
