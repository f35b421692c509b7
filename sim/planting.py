"""Planting of a bug: replaces an attribute of production code for the duration of a `with` block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Planted:
    """One planted bug and the number of seeds within which it must be found."""

    plant: Callable[[], AbstractContextManager[None]]
    breaks: tuple[str, ...]  # invariants; one of them must be the first that breaks
    max_seeds: int

    @property
    def name(self) -> str:
        """Name of the function that plants the bug."""
        return self.plant.__name__


def heard(owner: Any) -> None:
    """Called with every owner that a bug patches; tests replace it."""


def owner_module(owner: Any) -> str:
    """Name of the module that defines a patched class, or of the patched module itself."""
    return str(getattr(owner, "__module__", None) or owner.__name__)


@contextmanager
def instead(owner: Any, name: str, replacement: Any) -> Iterator[None]:
    """Replace an attribute inside a `with` block. Refuses the simulator's own code: a bug there would prove nothing."""
    assert ".sim." not in owner_module(owner), f"{owner} is the simulator's"
    heard(owner)
    original = getattr(owner, name)
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        setattr(owner, name, original)
