"""XID codes of NVIDIA's driver: class of the cause, and what a worker does. Pure.

Source: NVIDIA, "Analyzing Xid Errors with the Xid Catalog" (docs.nvidia.com/deploy/xid-errors), column "Immediate
Action": RESTART_APP is RESTART here, RESET_GPU and RESTART_BM are CORDON (a worker may not reset a GPU), IGNORE is
NOTHING. For NVLink errors the catalogue has a workflow: this worker's own results are right, so it drains.
"""

from __future__ import annotations

from enum import Enum, IntEnum
from typing import NamedTuple


class Action(IntEnum):
    """What is done about a device, mildest first."""

    NOTHING = 0
    THROTTLED = 1  # the router avoids the worker while it lasts
    DRAIN = 2  # no new work; running work ends; then the process is replaced
    RESTART = 3  # the process ends at once, because its work on the device is lost or wrong; the device is used again
    CORDON = 4  # the process ends, and nothing is started on this device again

    @property
    def word(self) -> str:
        """Name on the wire, in `status` and in metrics."""
        return "ok" if self is Action.NOTHING else self.name.lower()


class XidClass(Enum):
    """Cause of an XID."""

    APPLICATION = "application"  # a fault in our own work: illegal access, aborted channel
    MEMORY = "memory"  # ECC, row remapping, page retirement
    LINK = "link"  # NVLink
    BUS = "bus"  # PCIe
    FIRMWARE = "firmware"  # the GPU's own processors, or their driver
    NOTICE = "notice"  # a consequence of another XID, or nothing that matters


class XidRule(NamedTuple):
    """Meaning and action of one code."""

    kind: XidClass
    action: Action
    meaning: str
    lets_work_end: bool = False  # of DRAIN and CORDON: what runs now may end first


def _restart(meaning: str, kind: XidClass = XidClass.APPLICATION) -> XidRule:
    return XidRule(kind, Action.RESTART, meaning)


def _cordon(kind: XidClass, meaning: str, *, lets_work_end: bool = False) -> XidRule:
    return XidRule(kind, Action.CORDON, meaning, lets_work_end)


def _drain(meaning: str) -> XidRule:
    return XidRule(XidClass.LINK, Action.DRAIN, meaning, lets_work_end=True)


def _note(meaning: str, kind: XidClass = XidClass.NOTICE) -> XidRule:
    return XidRule(kind, Action.NOTHING, meaning)


XIDS: dict[int, XidRule] = {
    8: _restart("the GPU stopped processing a channel"),
    11: _restart("invalid commands in a push buffer"),
    13: _restart("exception of the compute engine: an illegal access or instruction"),
    25: _restart("invalid commands in a push buffer"),
    31: _restart("page fault: an illegal address"),
    32: _restart("damaged commands on their way to the GPU", XidClass.BUS),
    37: _note("driver firmware error that is ignored", XidClass.FIRMWARE),
    38: _note("watchdog of the driver's firmware", XidClass.FIRMWARE),
    39: _restart("exception of a copy engine"),
    40: _restart("exception of a copy engine"),
    41: _restart("exception of a copy engine"),
    # The catalogue ignores 43, because the GPU stays healthy; the application whose channel was reset must end.
    43: _restart("a channel was reset after a fault of the application"),
    44: _note("fault during a context switch"),
    45: _note("channels removed after another error or the end of a process"),
    46: _cordon(XidClass.FIRMWARE, "the GPU stopped processing"),
    48: _cordon(XidClass.MEMORY, "uncorrectable ECC error"),
    62: _cordon(XidClass.FIRMWARE, "an internal microcontroller halted"),
    63: _note("a memory row is to be remapped, or a page retired", XidClass.MEMORY),
    64: _cordon(XidClass.MEMORY, "a memory row could not be remapped, or a page retired", lets_work_end=True),
    66: _note("illegal access by the driver", XidClass.FIRMWARE),
    67: _note("illegal access by the driver", XidClass.FIRMWARE),
    69: _restart("class error of the compute engine"),
    70: _restart("error of a copy engine"),
    71: _restart("error of a copy engine"),
    72: _restart("error of a copy engine"),
    74: _drain("NVLink error"),
    75: _restart("error of a copy engine"),
    76: _restart("error of a copy engine"),
    77: _restart("error of a copy engine"),
    79: _cordon(XidClass.BUS, "the GPU has fallen off the bus"),
    80: _restart("damaged data sent to the GPU", XidClass.BUS),
    85: _restart("error of a copy engine"),
    92: _note("many corrected ECC errors", XidClass.MEMORY),
    93: _note("limit of writes to the InfoROM", XidClass.FIRMWARE),
    94: _restart("contained memory error", XidClass.MEMORY),
    95: _cordon(XidClass.MEMORY, "uncontained memory error"),
    109: _cordon(XidClass.FIRMWARE, "timeout of a context switch"),
    110: _cordon(XidClass.FIRMWARE, "security fault"),
    119: _cordon(XidClass.FIRMWARE, "the GSP processor does not answer"),
    120: _cordon(XidClass.FIRMWARE, "error of the GSP processor"),
    121: _note("corrected errors of the link to the CPU", XidClass.LINK),
    136: _drain("training of an NVLink failed"),
    137: _note("illegal NVLink access by a peer", XidClass.LINK),
    140: _cordon(XidClass.MEMORY, "unrecovered ECC error"),
    141: _note("error of CUDA's fast path"),
    143: _cordon(XidClass.FIRMWARE, "the GPU could not be initialised"),
    **{code: _drain("NVLink error") for code in range(144, 151)},
    154: _note("the recovery action changed"),  # the action itself is read by polling
    155: _drain("an NVLink is down"),
    156: _cordon(XidClass.MEMORY, "a defective resource was retired", lets_work_end=True),
    157: _note("a defective resource could not be retired", XidClass.MEMORY),
    158: _cordon(XidClass.FIRMWARE, "fatal timeout"),
    160: _note("a memory channel was retired", XidClass.MEMORY),
    161: _note("a memory channel could not be retired", XidClass.MEMORY),
}

UNKNOWN = _note("unknown to this release")


def rule_of(code: int) -> XidRule:
    """Rule of a code. A code that the table does not have changes nothing and is reported."""
    return XIDS.get(code, UNKNOWN)
