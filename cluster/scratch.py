"""Temporary folder of one run, accessible by its owner only. The next run removes folders that killed runs left."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

_LOCK = "in-use"  # locked until the process that made the folder ends, normally or not


class Scratch:
    """A folder `PREFIX…` in the system's folder for temporary files."""

    def __init__(self, prefix: str) -> None:
        _sweep(prefix)
        self.path = Path(tempfile.mkdtemp(prefix=prefix)).absolute()
        unnamed = self.path / f"{_LOCK}.new"  # renamed after it is locked, so that no sweep sees it unlocked
        self._lock = unnamed.open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        unnamed.rename(self.path / _LOCK)

    def remove(self) -> None:
        """Remove the folder with its contents. May be called again, to remove files created meanwhile."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def _sweep(prefix: str) -> None:
    """Remove folders of ours whose process has ended, because they hold keys. A folder without a lock is not ours."""
    for folder in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        with suppress(OSError):
            facts = folder.lstat()
            if facts.st_uid != os.getuid() or not (folder / _LOCK).is_file():
                continue
            with (folder / _LOCK).open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
