"""Resources of this machine: cores and free memory. Read once before workers are placed."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from ..model.ops.device import gpu_free_bytes
from .cgroup import left_bytes, quota_cores

KEPT_ALLOCATION_BYTES = 32 << 20  # frames are at most 16 MiB; weights and pools are still mapped and unmapped
KEPT_BYTES = 64 << 20  # freed memory at the end of a heap
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


@dataclass(frozen=True, slots=True)
class MachineFacts:
    """Resources available to workers."""

    num_cores: int  # number of threads that can compute at once
    memory_bytes: int  # available now
    gpu_bytes: tuple[int, ...] = ()  # available now, of each GPU
    cores_reason: str = ""  # explanation of num_cores


def machine_facts() -> MachineFacts:
    """Cores that this process may use, and memory available now, of each GPU too; cgroup limits are included."""
    in_group = left_bytes()
    memory_bytes = _available_bytes() if in_group is None else min(_available_bytes(), in_group)
    cores, reason = usable_cores(os.sched_getaffinity(0), quota_cores(), _siblings)
    return MachineFacts(cores, memory_bytes, gpu_free_bytes(), reason)


def cores() -> tuple[int, ...]:
    """One logical processor of each physical core that this process may use, ascending."""
    first_of: dict[str, int] = {}
    for processor in sorted(os.sched_getaffinity(0)):
        first_of.setdefault(_siblings(processor) or str(processor), processor)
    return tuple(first_of.values())


def cores_of_rank(every: Sequence[int], first: int | None, rank: int, num_threads: int) -> tuple[int, ...]:
    """The cores of one rank: `num_threads` neighbours of `every`. Empty, for any: not told, or there are too few."""
    if first is None:
        return ()
    start = first + rank * num_threads
    return tuple(every[start : start + num_threads]) if start + num_threads <= len(every) else ()


def keep_freed_memory() -> bool:
    """Let this process's allocator keep freed memory up to KEPT_BYTES; False: it is not glibc's.

    By default it returns the memory of each frame to the system, and every new frame costs a page fault per 4 KiB: on a
    hand-over over gRPC that took as much time as all the rest.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, KEPT_ALLOCATION_BYTES)) and bool(mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES))


def pin_thread(processors: Sequence[int]) -> None:
    """Let the calling thread, and threads that it starts, run on these processors only. Empty: no change."""
    if processors:
        os.sched_setaffinity(0, processors)


def usable_cores(allowed: Set[int], quota: float | None, siblings: Callable[[int], str]) -> tuple[int, str]:
    """Number of threads that can compute at once, and the explanation.

    `allowed`: logical processors of our affinity mask. `siblings`: Linux's list of the processors that share a
    processor's physical core; two computing threads on one core slow each other. `quota`: a cgroup's, in cores.
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
