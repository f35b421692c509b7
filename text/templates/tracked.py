"""Message that records which of its fields a template reads. Knows no template."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


class TrackedMessage(dict[str, Any]):
    """Message for a template; `unread` returns the fields that the template did not read.

    A test for a field counts as reading it. An operation on the whole message (printing it, `tojson`, a loop over it)
    reads all fields.
    """

    __slots__ = ("_asked",)  # the sandbox hides names with an underscore

    def __init__(self, message: dict[str, Any]) -> None:
        super().__init__(message)
        self._asked: set[Any] = set()

    def __getitem__(self, name: str) -> Any:
        self._asked.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """Value of a field, or `default`."""
        self._asked.add(name)
        return super().get(name, default)

    def __contains__(self, name: object) -> bool:
        self._asked.add(name)
        return super().__contains__(name)

    def __iter__(self) -> Iterator[str]:
        self._read_all()
        return super().__iter__()

    def keys(self) -> Any:
        """All names; marks all fields as read."""
        self._read_all()
        return super().keys()

    def values(self) -> Any:
        """All values; marks all fields as read."""
        self._read_all()
        return super().values()

    def items(self) -> Any:
        """All fields; marks all as read."""
        self._read_all()
        return super().items()

    def copy(self) -> dict[str, Any]:
        """Copy as a plain dict, which records nothing; marks all fields as read."""
        self._read_all()
        return super().copy()

    def __repr__(self) -> str:
        self._read_all()
        return super().__repr__()

    def _read_all(self) -> None:
        self._asked.update(dict.keys(self))


# jinja2's error messages, which reach the client, must call a message a dict.
TrackedMessage.__module__, TrackedMessage.__name__ = dict.__module__, dict.__name__


def unread(message: TrackedMessage) -> tuple[str, ...]:
    """Names of the fields that the template did not read, in their order."""
    return tuple(name for name in dict.keys(message) if name not in message._asked)
