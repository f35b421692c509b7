"""What this machine offers: cores, and memory that is free. Read once before anything is placed."""

from __future__ import annotations

import os
from collections.abc import Callable, Set
from dataclasses import dataclass
from pathlib import Path

from ..model.ops.device import gpu_free_bytes
from .cgroup import left_bytes, quota_cores


@dataclass(frozen=True, slots=True)
class MachineFacts:
    """What there is to place on."""

    num_cores: int  # that we may keep busy
    memory_bytes: int  # available now
    gpu_bytes: tuple[int, ...] = ()  # likewise, of each GPU
    cores_reason: str = ""  # why so many


def machine_facts() -> MachineFacts:
    """Cores that we may run on, and memory that is available now (a cgroup's limits count), of each GPU too."""
    in_group = left_bytes()
    memory_bytes = _available_bytes() if in_group is None else min(_available_bytes(), in_group)
    cores, reason = usable_cores(os.sched_getaffinity(0), quota_cores(), _siblings)
    return MachineFacts(cores, memory_bytes, gpu_free_bytes(), reason)


def usable_cores(allowed: Set[int], quota: float | None, siblings: Callable[[int], str]) -> tuple[int, str]:
    """How many threads can compute at once, and why so many.

    `allowed`: logical processors of our affinity mask. `siblings`: which ones share a processor's physical core, as
    Linux lists them; two threads on one core get in each other's way here. `quota`: a cgroup's, in cores.
    """
    physical = len({siblings(processor) or str(processor) for processor in allowed})
    told = f"{physical} physical" + (f" of {len(allowed)} logical" if len(allowed) != physical else "")
    if quota is None or quota >= physical:
        return physical, told
    return max(1, int(quota)), f"a cgroup's quota of {quota:g}, {told}"


def _available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _siblings(processor: int) -> str:
    try:
        return Path(f"/sys/devices/system/cpu/cpu{processor}/topology/thread_siblings_list").read_text()
    except OSError:
        return ""
