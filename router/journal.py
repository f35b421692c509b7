"""What was decided and how it ended: the last requests in memory, and all of them as JSON lines if wanted.

Bounded in both places. A disk that is full or broken costs the lines, never a request.
"""

from __future__ import annotations

import json
import logging
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any, TextIO

log = logging.getLogger(__name__)


class Journal:
    """The decision log. Entries are what `explain` shows."""

    def __init__(self, file: Path | None = None, max_entries: int = 2_000, max_file_bytes: int = 256 << 20) -> None:
        self._entries: OrderedDict[tuple[str, str], dict[str, Any]] = OrderedDict()  # by tenant and id
        self._max_entries = max_entries
        self._max_file_bytes = max_file_bytes
        self._path = file
        self._file: TextIO | None = None
        self.num_lost_lines = 0

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, entry: dict[str, Any]) -> None:
        """Note a request that is over; the oldest entry makes room."""
        key = entry["tenant"], entry["request_id"]
        self._entries[key] = entry
        self._entries.move_to_end(key)
        while len(self._entries) > self._max_entries:
            self._entries.popitem(last=False)
        if self._path is not None:
            self._write(self._path, json.dumps(entry, separators=(",", ":")))

    def find(self, tenant: str, request_id: str) -> dict[str, Any] | None:
        """A tenant's recent request, or None."""
        return self._entries.get((tenant, request_id))

    def close(self) -> None:
        """Flush and close the file."""
        if self._file is not None:
            try:
                self._file.close()
            except OSError as error:
                log.warning("decision log %s: %s", self._path, error)
            self._file = None

    def _write(self, path: Path, line: str) -> None:
        try:
            if self._file is None:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file = open(path, "a", encoding="utf-8", opener=_for_us_alone)  # noqa: SIM115  # stays open
            self._file.write(line + "\n")
            self._file.flush()
            if self._file.tell() > self._max_file_bytes:
                self.close()
                path.replace(path.with_name(path.name + ".1"))  # one old file is kept
        except OSError as error:
            self.num_lost_lines += 1
            if self.num_lost_lines == 1:
                log.warning("decision log %s: %s; lines are lost until it can be written again", path, error)
            self.close()


def _for_us_alone(path: str, flags: int) -> int:
    """Stop strings are a client's words."""
    return os.open(path, flags, 0o600)
