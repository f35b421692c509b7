"""History of ended requests: the last ones in memory, and all of them as JSON lines if configured.

Bounded in entries and in bytes: an entry is kept as JSON text, so its length is its memory cost.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .decision_log import DecisionLog

MAX_ENTRIES = 2_000
MAX_BYTES = 16 << 20  # of all entries
MAX_ENTRY_BYTES = 16 << 10
MAX_LOGGED_BYTES = 1 << 20  # of a line in the file
_NAMES = ("request_id", "tenant", "isolation_domain", "state")  # never left out of an entry


class RequestHistory:
    """Ended requests by tenant and id. An entry is the report of `explain_run`."""

    def __init__(
        self,
        file: Path | None = None,
        max_entries: int = MAX_ENTRIES,
        max_file_bytes: int = 256 << 20,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self._entries: OrderedDict[tuple[str, str], str] = OrderedDict()  # JSON by tenant and id
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._log = DecisionLog(file, max_file_bytes) if file is not None else None
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def num_lost_lines(self) -> int:
        """Number of lines that could not be written to the file."""
        return self._log.num_lost_lines if self._log is not None else 0

    def add(self, entry: dict[str, Any], decisions: Callable[[], list[dict[str, Any]]] | None = None) -> None:
        """Add a request that is over; the oldest entries are removed if necessary.

        `decisions`: those of its attempts, with what they were made from; only the file gets them.
        """
        key, line = (entry["tenant"], entry["request_id"]), _line(entry, MAX_ENTRY_BYTES)
        self._forget(key)
        self._entries[key] = line
        self.num_bytes += len(line)
        while len(self._entries) > self._max_entries or self.num_bytes > self._max_bytes:
            self._forget(next(iter(self._entries)))
        if self._log is not None:
            logged = {**entry, "decisions": decisions()} if decisions is not None else entry
            self._log.add(_line(logged, MAX_LOGGED_BYTES))

    def find(self, tenant: str, request_id: str) -> dict[str, Any] | None:
        """A tenant's recent request, or None."""
        line = self._entries.get((tenant, request_id))
        entry: dict[str, Any] | None = None if line is None else json.loads(line)
        return entry

    def close(self) -> None:
        """Flush and close the file."""
        if self._log is not None:
            self._log.close()

    def _forget(self, key: tuple[str, str]) -> None:
        self.num_bytes -= len(self._entries.pop(key, ""))


def _line(entry: dict[str, Any], most: int) -> str:
    """An entry as ASCII JSON; if it is too long, its longest values are left out."""
    line = _json(entry)
    while len(line) > most:
        sizes = {name: len(_json(value)) for name, value in entry.items() if name not in _NAMES}
        longest = max(sizes, key=sizes.__getitem__)
        entry = entry | {longest: f"left out: {sizes[longest]} bytes"}
        line = _json(entry)
    return line


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))
