"""Ends the processes of one local Ray, which are found by the folder that they name and by their parents. Knows no Ray.

The folder alone does not find all: some processes overwrite their command line and most of their environment. The
parents alone do not either: if a Ray process dies, its children get another parent.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

_WITHIN_S = 1.0
_POLL_S = 0.02


def end_processes(folder: Path) -> None:
    """Send SIGKILL to every process that names `folder` and to its descendants. Takes a second at most.

    They are stopped first, so that none starts another process meanwhile.
    """
    give_up_s = time.monotonic() + _WITHIN_S
    stopped: set[int] = set()
    while (found := _of(str(folder).encode()) - stopped) and time.monotonic() < give_up_s:
        _send(found, signal.SIGSTOP)
        stopped |= found
    _send(stopped, signal.SIGKILL)
    while any(_lives(process) for process in stopped) and time.monotonic() < give_up_s:
        time.sleep(_POLL_S)


def _send(processes: set[int], number: int) -> None:
    for process in processes:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(process, number)


def _of(folder: bytes) -> set[int]:
    """Processes that name `folder`, and their descendants, without this process; empty if there is no /proc."""
    naming, parent_of = set[int](), dict[int, int]()
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError):
            process = int(entry.name)
            parent_of[process] = int(_facts(process)[1])
            if folder in (entry / "cmdline").read_bytes() or folder in (entry / "environ").read_bytes():
                naming.add(process)
    found = naming - {os.getpid()}
    while more := {child for child, parent in parent_of.items() if parent in found} - found:
        found |= more
    return found - {os.getpid()}


def _facts(process: int) -> list[str]:
    """Fields of /proc/PID/stat after the name (state, parent, …); the name itself may hold any character."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()


def _lives(process: int) -> bool:
    try:
        return _facts(process)[0] not in "ZX"
    except OSError:
        return False
