"""Keys of a quantisation config: read by name; a key that nobody knows is refused. Knows no format."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ...core.errors import CheckpointError

_OFF: tuple[object, ...] = (None, False, [], {}, "")


class Keys:
    """A JSON object of a quantisation config. `where` names the file and the place in it."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.config = config
        self.where = where

    def know(self, changing: Iterable[str], informative: Iterable[str]) -> None:
        """Refuse every other key, unless it is null, false or empty.

        `changing`: keys that change numbers, and that the caller reads. `informative`: keys that do not.
        """
        known = {*changing, *informative}
        for key, value in self.config.items():
            if key not in known and value not in _OFF:
                raise CheckpointError(
                    f"{self.where} sets {key} = {value!r}, which is not known and may change the results; take an "
                    f"export without it (known: {', '.join(sorted(known))})"
                )

    def one_of(self, key: str, values: Iterable[Any], default: Any = None) -> Any:
        """Value of a key, or `default` if it is absent or null. Raises CheckpointError: it is none of `values`."""
        value = self.config.get(key)
        if value is None:
            value = default
        allowed = tuple(values)
        if not any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in allowed):
            told = ", ".join("absent" if v is None else str(v) for v in allowed)
            raise self.wrong(key, value, f"one of {told}; take an export with one of them")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        """Whole number above 0."""
        value = self.config.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.wrong(key, value, "a whole number above 0")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        return bool(self.one_of(key, (True, False), default))

    def names(self, *keys: str) -> tuple[str, ...]:
        """Lists of names of all these keys, joined; absent ones are empty."""
        found: list[str] = []
        for key in keys:
            value = self.config.get(key)
            if value is None:
                continue
            if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
                raise self.wrong(key, value, "a list of names")
            found += value
        return tuple(found)

    def section(self, key: str) -> Keys:
        """A JSON object inside this one; empty if it is absent."""
        value = self.config.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(key, value, "an object")
        return Keys(value or {}, f"{self.where}.{key}")

    def wrong(self, key: str, value: object, must_be: str) -> CheckpointError:
        """Make the error for a wrong value."""
        return CheckpointError(f"{self.where}: {key} is {value!r}; must be {must_be}")

    def pattern(self, text: str) -> re.Pattern[str]:
        """Compile a regular expression of the config. Raises CheckpointError: it is none."""
        try:
            return re.compile(text)
        except re.error as error:
            raise CheckpointError(f"{self.where}: {text!r} is no regular expression ({error})") from None
