"""Devices that CUDA_VISIBLE_DEVICES lets a process see: indices, and UUIDs of GPUs and of MIG slices. Pure.

Source: CUDA C++ Programming Guide, "CUDA Environment Variables". UUIDs may be shortened, and the first entry that
names no device ends the list.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

VARIABLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, slots=True)
class DeviceName:
    """Name of a device: exactly one of the two is given."""

    index: int | None = None  # among the GPUs of the machine, in the order of the bus
    uuid: str = ""  # "GPU-…" or "MIG-…", perhaps shortened

    @property
    def is_slice(self) -> bool:
        """True for a slice of a GPU."""
        return self.uuid.startswith("MIG-")


def visible_devices(environment: Mapping[str, str]) -> tuple[DeviceName, ...] | None:
    """Devices of a process, in CUDA's order; None: the variable is not set, and all GPUs are visible."""
    value = environment.get(VARIABLE)
    if value is None:
        return None
    found = []
    for word in (entry.strip() for entry in value.split(",")):
        name = _device(word)
        if name is None:
            break
        found.append(name)
    return tuple(found)


def device_of_process(environment: Mapping[str, str], index: int) -> DeviceName | None:
    """The device that CUDA calls `index` in a process with this environment; None: it sees no such device."""
    visible = visible_devices(environment)
    if visible is None:
        return DeviceName(index)
    return visible[index] if index < len(visible) else None


def parent_in_name(uuid: str) -> tuple[str, int] | None:
    """GPU and GPU instance in an old name of a slice, "MIG-GPU-…/1/0", of drivers before 470; None: another form."""
    gpu, _, rest = uuid.removeprefix("MIG-").partition("/")
    instance = rest.partition("/")[0]
    return (gpu, int(instance)) if gpu.startswith("GPU-") and instance.isdecimal() else None


def _device(word: str) -> DeviceName | None:
    if word.isdecimal():
        return DeviceName(int(word))
    return DeviceName(uuid=word) if word.startswith(("GPU-", "MIG-")) else None
