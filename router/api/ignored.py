"""Names of request fields without effect, collected for the response."""

from __future__ import annotations

import re

MAX_NAMES = 32


class Ignored:
    """Names of fields without effect, each once, safe to show in a header."""

    def __init__(self) -> None:
        self._names: dict[str, None] = {}

    def add(self, *path: str) -> None:
        """Add the path of a field; unsafe characters of the client's names are replaced."""
        if len(self._names) < MAX_NAMES:
            self._names[".".join(re.sub(r"[^A-Za-z0-9_-]", "?", part[:64]) for part in path)] = None

    def names(self) -> tuple[str, ...]:
        """All names, in order of their first occurrence."""
        return tuple(self._names)
