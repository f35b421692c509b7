"""A small change that somebody could make by accident, and who must see it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Mutant:
    """`old` stands exactly once in `file` and becomes `new`."""

    file: str
    old: str
    new: str
    survives: str = ""  # why nobody sees it, where that is right

    @property
    def name(self) -> str:
        """Its file and the first line that is changed."""
        return f"{self.file}: {self.old.strip().splitlines()[0][:70]}"

    def planted(self, text: str) -> str:
        """The file's text with the change.

        Raises:
            ValueError: `old` does not stand there once.
        """
        if text.count(self.old) != 1:
            raise ValueError(f"{self.name} stands {text.count(self.old)} times in its file")
        return text.replace(self.old, self.new)
