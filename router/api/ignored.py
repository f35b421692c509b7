"""Names of what a client sent and nothing reads: collected, so that the answer can tell them."""

from __future__ import annotations

import re

MAX_NAMES = 32


class Ignored:
    """Names of fields without effect, each once, safe to show in a header."""

    def __init__(self) -> None:
        self._names: dict[str, None] = {}

    def add(self, *path: str) -> None:
        """Note `path`; a client wrote it, so it may be anything."""
        if len(self._names) < MAX_NAMES:
            self._names[".".join(re.sub(r"[^A-Za-z0-9_-]", "?", part[:64]) for part in path)] = None

    def names(self) -> tuple[str, ...]:
        """All of them, in the order of their first occurrence."""
        return tuple(self._names)
