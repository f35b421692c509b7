"""Reads a GGUF file's metadata and the places of its tensors. Knows no model, no vocabulary, no tensor's numbers.

The `gguf` package's own reader wraps every string of a vocabulary in several arrays (20 s and 600 MiB for one of
128,000 tokens) and trusts the file. Here arrays are read on demand, and lengths are checked first.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ...core.errors import CheckpointError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4
_STRING, _ARRAY = 8, 9
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

Scalar = int | float | bool | str


@dataclass(frozen=True, slots=True)
class StoredArray:
    """Place of an array in the metadata; its elements are read on demand."""

    kind: int
    count: int
    at: int  # offset of its first element


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Place of a tensor in the file. `shape` has torch's order: rows first."""

    shape: tuple[int, ...]
    kind: int  # GGML's number of the tensor type
    at: int  # offset in the file


class GgufFile:
    """Metadata and tensor table of one file. Lengths are checked before they are used."""

    def __init__(self, path: str | Path) -> None:
        """Read metadata and tensor table.

        Raises:
            CheckpointError: it is no GGUF, or of another version or byte order, truncated, damaged, or one of several
                parts.
        """
        self.path = Path(path)
        self.metadata: dict[str, Scalar | StoredArray] = {}
        self.tensors: dict[str, StoredTensor] = {}
        with self._opened() as bytes_:
            self.size_bytes = len(bytes_)
            reader = _Reader(bytes_, self.path)
            num_tensors, num_entries = reader.start()
            for _ in range(num_entries):
                key = reader.string()
                if key in self.metadata:
                    reader.damaged(f"names {key} twice")
                self.metadata[key] = reader.value(reader.number("I"))
            tensors = [reader.tensor() for _ in range(num_tensors)]
            alignment = self.metadata.get("general.alignment", 32)
            if not isinstance(alignment, int) or alignment < 1:
                reader.damaged(f"has general.alignment {alignment!r}")
            self.data_at = -(-reader.at // alignment) * alignment
            for name, shape, kind, offset in tensors:
                if name in self.tensors:
                    reader.damaged(f"holds {name} twice")
                self.tensors[name] = StoredTensor(shape, kind, self.data_at + offset)
        parts = self.metadata.get("split.count", 0)
        if isinstance(parts, int) and parts > 1:
            raise CheckpointError(
                f"{self.path} is one of {parts} parts; put them together first: llama-gguf-split --merge FIRST_PART OUT"
            )

    @property
    def architecture(self) -> str:
        """Name of the model's architecture; keys of its metadata begin with it."""
        return self.text("general.architecture")

    def text(self, key: str) -> str:
        """Read a string that must exist.

        Raises:
            CheckpointError: it is missing or no string.
        """
        found = self.metadata.get(key)
        if not isinstance(found, str):
            raise CheckpointError(f"{self.path}: {key} is {found!r}; must be a string: fetch or convert the file again")
        return found

    def flag(self, key: str, default: bool) -> bool:
        """Read true or false."""
        found = self.metadata.get(key, default)
        if not isinstance(found, bool):
            raise CheckpointError(f"{self.path}: {key} is {found!r}; must be true or false")
        return found

    def strings(self, key: str) -> list[str]:
        """Read an array of strings; empty if it is missing. Invalid UTF-8 becomes replacement characters.

        Raises:
            CheckpointError: the value has another type.
        """
        array = self._array(key)
        if array is None:
            return []
        if array.kind != _STRING:
            raise CheckpointError(f"{self.path}: {key} holds no strings; fetch or convert the file again")
        with self._opened() as bytes_:
            reader = _Reader(bytes_, self.path, array.at)
            return [reader.string() for _ in range(array.count)]

    def numbers(self, key: str) -> list[Any]:
        """Read an array of numbers; empty if it is missing.

        Raises:
            CheckpointError: the value has another type.
        """
        array = self._array(key)
        if array is None:
            return []
        if array.kind not in _FORMATS:
            raise CheckpointError(f"{self.path}: {key} holds no numbers; fetch or convert the file again")
        with self._opened() as bytes_:
            return list(struct.unpack_from(f"<{array.count}{_FORMATS[array.kind]}", bytes_, array.at))

    def head(self) -> bytes:
        """All bytes before the first tensor."""
        with self._opened() as bytes_:
            return bytes_[: self.data_at]

    def _array(self, key: str) -> StoredArray | None:
        found = self.metadata.get(key)
        if found is None or isinstance(found, StoredArray):
            return found
        raise CheckpointError(f"{self.path}: {key} is {found!r}; must be an array")

    def _opened(self) -> mmap.mmap:
        try:
            with self.path.open("rb") as file:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # an empty file cannot be mapped
            raise CheckpointError(f"{self.path} cannot be read ({error}); fetch it again") from None


def is_gguf(path: str | Path) -> bool:
    """Return whether the path is a file: a checkpoint that is a file must be GGUF."""
    return Path(path).is_file()


class _Reader:
    """Sequential reader of the header, the metadata and the tensor table."""

    def __init__(self, bytes_: mmap.mmap, path: Path, at: int = 0) -> None:
        self._bytes = bytes_
        self._path = path
        self.at = at

    def damaged(self, how: str) -> NoReturn:
        raise CheckpointError(f"{self._path} {how}; fetch it again")

    def start(self) -> tuple[int, int]:
        """Read the file's start: number of tensors, number of metadata entries."""
        found = self._bytes[:4]
        if found != _MAGIC:
            self.damaged(f"is no GGUF file (it begins with {found!r})")
        self.at = 4
        version = self.number("I")
        if version & 0xFFFF == 0:
            raise CheckpointError(f"{self._path} is a big-endian GGUF file; convert it to little-endian")
        if version not in _VERSIONS:
            raise CheckpointError(f"{self._path} is of GGUF version {version}; served: 2 and 3. Convert it again")
        return self.number("Q"), self.number("Q")

    def number(self, format_: str) -> Any:
        self._need(struct.calcsize(format_))
        (found,) = struct.unpack_from("<" + format_, self._bytes, self.at)
        self.at += struct.calcsize(format_)
        return found

    def string(self) -> str:
        length = self.number("Q")
        self._need(length)
        self.at += length
        return self._bytes[self.at - length : self.at].decode("utf-8", "replace")

    def value(self, kind: int) -> Scalar | StoredArray:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._skipped_array()
        if kind not in _FORMATS:
            self.damaged(f"has metadata of an unknown type {kind}")
        found: Scalar = self.number(_FORMATS[kind])
        return found

    def _skipped_array(self) -> StoredArray:
        kind, count = self.number("I"), self.number("Q")
        array = StoredArray(kind, count, self.at)
        if kind == _STRING:
            for _ in range(count):
                length = self.number("Q")
                self._need(length)
                self.at += length
        elif kind in _FORMATS:
            size_bytes = count * struct.calcsize(_FORMATS[kind])
            self._need(size_bytes)
            self.at += size_bytes
        else:
            self.damaged(f"has an array of type {kind} in its metadata")
        return array

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Read a tensor's entry: name, shape, type, offset after `data_at`."""
        name, num_dimensions = self.string(), self.number("I")
        if num_dimensions > _MAX_DIMENSIONS:
            self.damaged(f"gives {name} {num_dimensions} dimensions")
        shape = tuple(self.number("Q") for _ in range(num_dimensions))[::-1]
        return name, shape, self.number("I"), self.number("Q")

    def _need(self, size_bytes: int) -> None:
        if self.at + size_bytes > len(self._bytes):
            self.damaged(f"is cut short or damaged ({len(self._bytes)} bytes)")
