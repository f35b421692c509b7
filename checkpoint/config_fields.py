"""Reads a checkpoint's config.json, with typed access to its fields; errors name the field. Knows no model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core.errors import CheckpointError


class Fields:
    """Typed access to a JSON object of a config. Null counts as absent. Wrong values raise CheckpointError."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.config = config
        self.where = where

    def count(self, name: str, default: int | None = None) -> int:
        """Read a whole number above 0."""
        value = self._get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.wrong(name, value, "a whole number above 0")
        return value

    def optional_count(self, name: str, default: int | None = None) -> int | None:
        """Read a whole number above 0. None: the field is null. An absent field has the value `default`."""
        if self.config.get(name, default) is None:
            return None
        return self.count(name, default)

    def whole(self, name: str, default: int | None = None) -> int:
        """Read a whole number of at least 0."""
        value = self._get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self.wrong(name, value, "a whole number")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """Read a number above 0."""
        value = self._get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise self.wrong(name, value, "a number above 0")
        return float(value)

    def optional_number(self, name: str, default: float | None = None) -> float | None:
        """Read a number above 0. None: the field is null. An absent field has the value `default`."""
        if self.config.get(name, default) is None:
            return None
        return self.number(name, default)

    def flag(self, name: str, default: bool = False) -> bool:
        """Read true or false."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, value, "true or false")
        return value

    def numbers(self, name: str, length: int) -> tuple[float, ...]:
        """Read a list of `length` numbers above 0."""
        value = self._get(name, None)
        good = isinstance(value, list) and len(value) == length
        if not good or not all(
            isinstance(x, int | float) and not isinstance(x, bool) and 0 < x < math.inf for x in value
        ):
            raise self.wrong(name, value, f"{length} numbers above 0")
        return tuple(float(x) for x in value)

    def mapping(self, name: str) -> Mapping[str, Any]:
        """Read a JSON object; empty if the field is absent."""
        value = self.config.get(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.wrong(name, value, "an object")
        return value

    def ids(self, name: str) -> tuple[int, ...]:
        """Read token ids: a number, a list, or none if the field is absent."""
        value = self.config.get(name)
        ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise self.wrong(name, value, "token ids")
        return ids

    def refuse(self, *names: str) -> None:
        """Refuse fields that would change the results, unless they are null, false, zero or empty."""
        for name in names:
            if self.config.get(name):
                raise CheckpointError(
                    f"{self.where}: config.json sets {name} = {self.config[name]!r}, which is not served for "
                    f"{self.architecture}; use a checkpoint without it"
                )

    @property
    def architecture(self) -> str:
        """First of the config's architectures, for error messages."""
        names = self.config.get("architectures")
        return str(names[0]) if isinstance(names, list) and names else "this model"

    def wrong(self, name: str, value: object, must_be: str) -> CheckpointError:
        """Make the error for a wrong field."""
        return CheckpointError(f"{self.where}: {name} is {value!r}; must be {must_be}")

    def _get(self, name: str, default: Any) -> Any:
        value = self.config.get(name)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(f"{self.where}: config.json has no {name}; fetch it again")
        return value


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises CheckpointError: the file is missing, or holds none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; give a directory in Hugging Face's format") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); fetch it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object; fetch it again")
    return value
