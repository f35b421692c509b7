"""How a bug is put into production code for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Planted:
    """One bug and its bound."""

    plant: Callable[[], AbstractContextManager[None]]
    breaks: tuple[str, ...]  # invariants, whichever is seen first
    max_seeds: int

    @property
    def name(self) -> str:
        """The function's."""
        return self.plant.__name__


def heard(owner: Any) -> None:
    """Told of every owner that a bug patches; for tests."""


def owner_module(owner: Any) -> str:
    """Where a class or module that a bug patches is defined."""
    return str(getattr(owner, "__module__", None) or owner.__name__)


@contextmanager
def instead(owner: Any, name: str, replacement: Any) -> Iterator[None]:
    """The attribute is another one for a while. A bug in the simulator itself would prove nothing."""
    assert ".sim." not in owner_module(owner), f"{owner} is the simulator's"
    heard(owner)
    original = getattr(owner, name)
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        setattr(owner, name, original)
