"""Typed access to the architecture keys of a GGUF file, with a check that all were read. Knows no family."""

from __future__ import annotations

import struct
from typing import Any

from ...core.errors import CheckpointError
from .file import GgufFile, StoredArray
from .names import Heads

_HARMLESS = frozenset(
    {
        "vocab_size",
        "rope.scaling.finetuned",
        "tensor_data_layout",
        "rope.scaling.original_context_length",
        "attention.layer_norm_epsilon",  # for layer norms, which no served family has
        "expert_used_count",  # dense models may have it as 0
        "expert_count",
    }
)


class Keys:
    """Architecture keys of one file; records which keys were read."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.prefix = file.architecture + "."
        self._read: set[str] = set()

    def has(self, name: str) -> bool:
        """Return whether the file has the key."""
        return self.prefix + name in self.file.metadata

    def number(self, name: str, default: Any = None) -> Any:
        """Read a number, or an array with the same number for all layers.

        Raises:
            CheckpointError: it is missing without a default, or layers differ.
        """
        self._read.add(name)
        found = self.file.metadata.get(self.prefix + name, default)
        if isinstance(found, StoredArray):
            values = set(self.file.numbers(self.prefix + name))
            if len(values) != 1:
                raise self.wrong(name, f"{sorted(values)[:8]}, by layer", "the same for all layers")
            found = values.pop()
        if found is None:
            raise CheckpointError(f"{self.file.path}: {self.prefix}{name} is missing; fetch or convert the file again")
        if isinstance(found, bool | str):
            raise self.wrong(name, found, "a number")
        return _shortest(found) if isinstance(found, float) else found

    def optional(self, name: str) -> Any:
        """Read a number; None if it is missing or 0."""
        return self.number(name, 0) or None

    def neutral(self, **values: float) -> None:
        """Refuse keys with a value other than 0 or the given one, which has no effect."""
        for name, value in values.items():
            if self.number(name, value) not in (0, value):
                raise self.wrong(name, self.number(name), f"{value:g} for this architecture")

    def flag(self, name: str, default: bool = False) -> bool:
        """Read true or false."""
        self._read.add(name)
        return self.file.flag(self.prefix + name, default)

    def text(self, name: str, default: str) -> str:
        """Read a string."""
        self._read.add(name)
        found = self.file.metadata.get(self.prefix + name, default)
        if not isinstance(found, str):
            raise self.wrong(name, found, "a string")
        return found

    def wrong(self, name: str, value: object, must_be: str) -> CheckpointError:
        """Make the error for a wrong key."""
        return CheckpointError(f"{self.file.path}: {self.prefix}{name} is {value!r}; served: {must_be}")

    def check_all_read(self) -> None:
        """Refuse unknown keys, because they could change the results."""
        for key, value in self.file.metadata.items():
            name = key.removeprefix(self.prefix)
            if key.startswith(self.prefix) and name not in self._read and name not in _HARMLESS and value:
                shown = "an array" if isinstance(value, StoredArray) else repr(value)
                raise CheckpointError(
                    f"{self.file.path}: {key} is {shown}, which is not served for this architecture; "
                    "take a checkpoint without it, or its safetensors"
                )


def heads_of(file: GgufFile) -> Heads:
    """Read the numbers of query heads and key heads."""
    keys = Keys(file)
    queries = keys.number("attention.head_count")
    return Heads(queries, keys.number("attention.head_count_kv", queries))


def _shortest(value: float) -> float:
    """Decimal number with the fewest digits that gives this float32, as a config.json has it."""
    for digits in range(6, 9):
        short = float(f"{value:.{digits}g}")
        if struct.unpack("<f", struct.pack("<f", short)) == (value,):
            return short
    return value
