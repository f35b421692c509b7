"""Limits of cores and memory that control groups (version 2 or 1) set for this process. Reads files only."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_ROOT, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def quota_cores(root: Path = _ROOT, own: Path = _OWN) -> float | None:
    """Lowest CPU quota of this process's groups, in cores; None: no limit."""
    found = [_quota_of(group) for group in _groups(root, own, "cpu")]
    return min((cores for cores in found if cores is not None), default=None)


def left_bytes(root: Path = _ROOT, own: Path = _OWN) -> int | None:
    """Lowest remaining memory of this process's groups, in bytes; None: no limit.

    Inactive cached files count as free, because the kernel drops them under pressure.
    """
    found = [_left_of(group) for group in _groups(root, own, "memory")]
    return min((size for size in found if size is not None), default=None)


def _groups(root: Path, own: Path, controller: str) -> Iterator[Path]:
    """This process's group of a controller and its visible parents."""
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers and controller not in controllers.split(","):
            continue
        base = root / controllers if controllers and (root / controllers).is_dir() else root / controller
        base = base if controllers else root
        group = base / path.strip("/")
        # In a container the path may be the host's: then the mount itself is the group.
        yield from (g for g in (group, *group.parents) if g == base or base in g.parents)


def _quota_of(group: Path) -> float | None:
    words = _read(group / "cpu.max").split()
    if not words:
        words = [_read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")]
    try:
        quota, period = int(words[0]), int(words[1])
    except (ValueError, IndexError):  # "max", or no such files
        return None
    return quota / period if quota > 0 and period > 0 else None


def _left_of(group: Path) -> int | None:
    limit, used = _read(group / "memory.max"), _read(group / "memory.current")
    inactive = "inactive_file"
    if not limit:
        limit, used = _read(group / "memory.limit_in_bytes"), _read(group / "memory.usage_in_bytes")
        inactive = "total_inactive_file"
    if not limit.isdecimal() or not used.isdecimal() or int(limit) >= 1 << 60:  # "max", or version 1's largest number
        return None
    for line in _read(group / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name == inactive and value.isdecimal():
            return max(0, int(limit) - max(0, int(used) - int(value)))
    return max(0, int(limit) - int(used))


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""
