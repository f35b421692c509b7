"""The decision log: every ended request as a JSON line, written by its own thread.

Bounded in waiting lines and on disk. With a full, broken or slow disk lines are lost, but no request fails and the
event loop is not delayed.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from pathlib import Path
from typing import TextIO

log = logging.getLogger(__name__)

MAX_WAITING_LINES = 1_000
CLOSE_S = 5.0  # longest time to write the waiting lines at the end


class DecisionLog:
    """A log file, and one older file beside it."""

    def __init__(self, path: Path, max_file_bytes: int = 256 << 20) -> None:
        self._path = path
        self._max_file_bytes = max_file_bytes
        self._file: TextIO | None = None
        self._lines: queue.Queue[str | None] = queue.Queue(MAX_WAITING_LINES)
        self._thread = threading.Thread(target=self._run, name="decision-log", daemon=True)
        self._thread.start()
        self.num_lost_lines = 0

    def add(self, line: str) -> None:
        """Queue a line; it is lost if too many wait."""
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._lose("it is too slow")

    def close(self) -> None:
        """Write the waiting lines, within CLOSE_S, and close the file."""
        if self._thread.is_alive():
            try:
                self._lines.put(None, timeout=CLOSE_S)
            except queue.Full:
                return
            self._thread.join(CLOSE_S)

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            self._write(line)
        self._close_file()

    def _write(self, line: str) -> None:
        try:
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = open(self._path, "a", encoding="utf-8", opener=_for_us_alone)  # noqa: SIM115  # stays open
            self._file.write(line + "\n")
            self._file.flush()
            if self._file.tell() > self._max_file_bytes:
                self._close_file()
                self._path.replace(self._path.with_name(self._path.name + ".1"))  # one old file is kept
        except OSError as error:
            self._lose(str(error))
            self._close_file()

    def _lose(self, why: str) -> None:
        self.num_lost_lines += 1
        if self.num_lost_lines == 1:
            log.warning("decision log %s: %s; lines are lost until it can be written again", self._path, why)

    def _close_file(self) -> None:
        if self._file is not None:
            try:
                self._file.close()
            except OSError as error:
                log.warning("decision log %s: %s", self._path, error)
            self._file = None


def _for_us_alone(path: str, flags: int) -> int:
    """Open the file for its owner only, because entries hold clients' stop strings."""
    return os.open(path, flags, 0o600)
