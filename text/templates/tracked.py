"""A message that remembers which of its fields a template asked for. Knows no template."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


class TrackedMessage(dict[str, Any]):
    """A message as a template sees it; `unread` names the fields that it left alone.

    Asking whether a field is there counts as reading it. Whatever looks at the whole message (printing it, `tojson`,
    a loop over it) reads all fields.
    """

    __slots__ = ("_asked",)  # the underscore keeps it from templates

    def __init__(self, message: dict[str, Any]) -> None:
        super().__init__(message)
        self._asked: set[Any] = set()

    def __getitem__(self, name: str) -> Any:
        self._asked.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """A field, or `default`."""
        self._asked.add(name)
        return super().get(name, default)

    def __contains__(self, name: object) -> bool:
        self._asked.add(name)
        return super().__contains__(name)

    def __iter__(self) -> Iterator[str]:
        self._read_all()
        return super().__iter__()

    def keys(self) -> Any:
        """All names."""
        self._read_all()
        return super().keys()

    def values(self) -> Any:
        """All values."""
        self._read_all()
        return super().values()

    def items(self) -> Any:
        """All fields."""
        self._read_all()
        return super().items()

    def copy(self) -> dict[str, Any]:
        """A copy without memory."""
        self._read_all()
        return super().copy()

    def __repr__(self) -> str:
        self._read_all()
        return super().__repr__()

    def _read_all(self) -> None:
        self._asked.update(dict.keys(self))


# What jinja2 calls a message in its own complaints, which reach the client.
TrackedMessage.__module__, TrackedMessage.__name__ = dict.__module__, dict.__name__


def unread(message: TrackedMessage) -> tuple[str, ...]:
    """The fields that nobody asked for, in their order."""
    return tuple(name for name in dict.keys(message) if name not in message._asked)
