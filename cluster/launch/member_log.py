"""Log file of one child process, bounded in size. Knows no process.

The child holds the file open and appends, so the file cannot be rotated by a rename: its last `max_bytes` are copied
to a second file, and the first one is truncated. A line that is written in between may be lost.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

MAX_LOG_BYTES = 16 << 20  # per file; there are two
_TAIL_BYTES = 8000


class MemberLog:
    """`NAME.log` in a folder, and `NAME.log.1` with the output before it."""

    def __init__(self, folder: Path, name: str, max_bytes: int = MAX_LOG_BYTES) -> None:
        self._file = folder / f"{name}.log"
        self._older = folder / f"{name}.log.1"
        self._max_bytes = max_bytes

    def open(self) -> BinaryIO:
        """Open the file for the child, which appends to it."""
        self._file.touch(mode=0o600)
        return self._file.open("ab")

    def bound(self) -> None:
        """Rotate the file if it is full. To be called from time to time."""
        try:
            if self._file.stat().st_size > self._max_bytes:
                self._older.touch(mode=0o600)
                self._older.write_bytes(_tail(self._file, self._max_bytes))
                os.truncate(self._file, 0)
        except OSError:
            pass  # the folder was removed, or the disk is full: the next call tries again

    def tail(self) -> str:
        """The last 8,000 bytes of the output, as text."""
        newest = _tail(self._file, _TAIL_BYTES)
        if len(newest) < _TAIL_BYTES:
            older = _tail(self._older, _TAIL_BYTES)[len(newest) - _TAIL_BYTES :]
            # A copy may end within a long line whose rest is lost. What follows it is a line of its own.
            newest = older + (b"\n" if older and not older.endswith(b"\n") else b"") + newest
        return newest.decode(errors="replace").strip()


def _tail(file: Path, num_bytes: int) -> bytes:
    """The last `num_bytes` of a file; bounded also if its writer is faster than this reader."""
    try:
        with file.open("rb") as opened:
            opened.seek(0, os.SEEK_END)
            opened.seek(max(0, opened.tell() - num_bytes))
            return opened.read(num_bytes)
    except OSError:
        return b""
