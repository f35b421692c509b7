"""A temporary folder of one run, for its owner alone. What killed runs left behind is removed by the next one."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

_LOCK = "in-use"  # locked for as long as the process lives that made the folder, however that ends


class Scratch:
    """A folder `PREFIX…` under the temporary one."""

    def __init__(self, prefix: str) -> None:
        _sweep(prefix)
        self.path = Path(tempfile.mkdtemp(prefix=prefix)).absolute()
        unnamed = self.path / f"{_LOCK}.new"  # it gets its name when it is locked: nobody may find it free
        self._lock = unnamed.open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        unnamed.rename(self.path / _LOCK)

    def remove(self) -> None:
        """The folder and all in it. May be called again, for what came into being meanwhile."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def _sweep(prefix: str) -> None:
    """Remove folders of ours whose process is gone: they hold keys. A folder without a lock is somebody else's."""
    for folder in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        with suppress(OSError):
            facts = folder.lstat()
            if facts.st_uid != os.getuid() or not (folder / _LOCK).is_file():
                continue
            with (folder / _LOCK).open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
