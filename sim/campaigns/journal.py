"""The file of a campaign: one line for what it is, one line per range of seeds that is done."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Range:
    """Result of the schedules of consecutive seeds."""

    first: int
    count: int
    num_events: int = 0
    virtual_s: float = 0.0
    ends: dict[str, int] = field(default_factory=dict)  # attempts by outcome
    failed: tuple[int, ...] = ()  # seeds that broke an invariant


@dataclass(slots=True)
class Sums:
    """Sums over ranges."""

    num_schedules: int = 0
    num_events: int = 0
    virtual_s: float = 0.0
    ends: Counter[str] = field(default_factory=Counter)
    failed: list[int] = field(default_factory=list)

    def add(self, done: Range) -> None:
        """Add a range."""
        self.num_schedules += done.count
        self.num_events += done.num_events
        self.virtual_s += done.virtual_s
        self.ends.update(done.ends)
        self.failed += done.failed


def code_digest(package: Path = PACKAGE) -> str:
    """Digest of the package's sources: results of other code say nothing about this one."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


class Journal:
    """Ranges that are done, in a file that is only appended to. A line that was cut off counts as not written."""

    def __init__(self, path: Path, campaign: int, code: str) -> None:
        """Read the file; it is begun anew if it is of another campaign or of other code."""
        self._path = path
        self._title = {"campaign": campaign, "code": code}
        lines = _lines(path)
        self.done: list[Range] = []
        if lines and lines[0] == self._title:
            self.done = [Range(**{**line, "failed": tuple(line["failed"])}) for line in lines[1:]]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in (self._title, *map(asdict, self.done))))

    def add(self, done: Range) -> None:
        """Append a range."""
        self.done.append(done)
        with self._path.open("a") as file:
            file.write(json.dumps(asdict(done)) + "\n")


def _lines(path: Path) -> list[dict[str, Any]]:
    found = []
    try:
        text = path.read_text()
    except FileNotFoundError:
        return []
    for line in text.splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found
