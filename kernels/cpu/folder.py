"""The folder of built libraries, private to one user, and its lock. Knows no compiler."""

from __future__ import annotations

import atexit
import fcntl
import functools
import os
import shutil
import stat
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import IO


def take_lock(lock: IO[str]) -> bool:
    """Lock the open file for this process. False: it is locked already, or the file no longer exists at its path."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(lock.fileno()), os.stat(lock.name))
    except OSError:
        return False


def library_folder() -> Path:
    """A folder that only this user can write to, because its libraries are executed."""
    for directory in (_home_cache(), _shared_folder()):
        if directory is not None and _is_ours(directory):
            return directory
    return _own_directory()


def _home_cache() -> Path | None:
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None  # a user without a home
    return base / "twostroke" / "kernels" if base.is_absolute() else None  # not relative to the working directory


def _shared_folder() -> Path:
    """The folder that all processes of this user share where the home cache is not writable."""
    return Path(tempfile.gettempdir()).absolute() / f"twostroke-kernels-{os.getuid()}"


def _is_ours(directory: Path) -> bool:
    """True if it exists or was created, and only this user can write to it. Refuses links in world-writable parents."""
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        facts = directory.stat(follow_symlinks=not directory.parent.stat().st_mode & stat.S_IWOTH)
    except OSError:
        return False
    is_safe = stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.getuid()
    return is_safe and not facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and os.access(directory, os.W_OK)


@functools.cache
def _own_directory() -> Path:
    directory = Path(tempfile.mkdtemp(prefix="twostroke-kernels-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


def forget_empty_folder() -> None:
    """Remove the shared temporary folder if it holds no library."""
    directory = _shared_folder()
    with suppress(OSError), (directory / "lock").open("r+") as lock:
        if take_lock(lock) and not any(directory.glob("*.so")):
            shutil.rmtree(directory)
