"""The processes of one local Ray, found by the folder that their environment names, and ended. Knows no Ray.

They cannot be found as children: when Ray's own parent of them dies, they become somebody else's.
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
    """SIGKILL every process whose environment or command names `folder`, until there is none. A second at most."""
    give_up_s = time.monotonic() + _WITHIN_S
    while (found := _naming(str(folder).encode())) and time.monotonic() < give_up_s:
        for process in found:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(process, signal.SIGKILL)
        time.sleep(_POLL_S)


def _naming(folder: bytes) -> list[int]:
    """Living processes of ours but this one; where there is no /proc, none."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError):
            process = int(entry.name)
            told = (entry / "environ").read_bytes() + (entry / "cmdline").read_bytes()
            if process != os.getpid() and folder in told:
                found.append(process)
    return found
