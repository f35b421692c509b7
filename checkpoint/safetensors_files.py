"""Finds, checks, maps and fingerprints the safetensors files of a checkpoint. Never unpickles.

Names are those of a text model alone: `model.language_model.`, as checkpoints with a vision part begin their names, is
read as `model.`.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from ..core.errors import CheckpointError
from .fingerprint import hash_content

if TYPE_CHECKING:
    from torch import Tensor

_DTYPE_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_FLOATS = tuple(_DTYPE_NAMES)
_QUANTISED = (*_FLOATS, "F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "I16", "I32", "I64", "BOOL")
QUANTISATION_FILE = "hf_quant_config.json"  # of ModelOpt; says what stored tensors mean
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_SINGLE_FILES = ("model.safetensors", "medusa_lm_head.safetensors")
_CHUNK_BYTES = 4 << 20
MAX_HEADER_BYTES = 100_000_000  # as in the library of the format
_NESTED, _PLAIN = "model.language_model.", "model."


class SafetensorsFiles:
    """Implements `PartSource` for one file, or for shards with an index. Tensors are views of the mapped files."""

    def __init__(self, directory: Path, *, quantised: bool = False) -> None:
        """Read all headers. `quantised`: tensors may also be integers or floats of 8 bits.

        Raises:
            CheckpointError: a file or tensor, which it names, is missing, damaged, truncated, or of a wrong dtype.
        """
        self.where = str(directory)
        self._directory = directory
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._path_by_name: dict[str, Path] = {}
        self._stored_by_name: dict[str, str] = {}  # name in its file
        self._handles: dict[Path, Any] = {}
        served = _QUANTISED if quantised else _FLOATS
        for path in checkpoint_files(directory):
            for name, entry in read_header(path)[1].items():
                if name in self._path_by_name:
                    raise CheckpointError(
                        f"{path} holds {name}, and so does {self._path_by_name[name]}; fetch it again"
                    )
                if entry["dtype"] not in served:
                    raise CheckpointError(_not_served(path, name, entry["dtype"], served))
                self._shapes[name] = tuple(entry["shape"])
                self._path_by_name[name] = path
                self._stored_by_name[name] = entry["stored_as"]

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor, by name."""
        return self._shapes

    def take(self, name: str) -> Tensor:
        """Read one tensor, as a view of its mapped file. Raises CheckpointError if it cannot be read."""
        path = self._path_by_name[name]
        try:
            if path not in self._handles:
                self._handles[path] = safe_open(path, framework="pt", device="cpu")
            tensor: Tensor = self._handles[path].get_tensor(self._stored_by_name[name])
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: {name} cannot be read ({error}); fetch the file again") from None
        return tensor

    def take_part(self, name: str, axis: int, part: range) -> Tensor:
        """Implements `PartSource.take_part`: a view of the mapped file, of which only used pages are read."""
        return self.take(name).narrow(axis, part.start, len(part))

    def fingerprint(self) -> bytes:
        """Implements `TensorSource.fingerprint` by `safetensors_fingerprint`."""
        return safetensors_fingerprint(self._directory)


def _not_served(path: Path, name: str, dtype: str, served: tuple[str, ...]) -> str:
    remedy = ""
    if dtype in _QUANTISED:
        remedy = "; a quantised checkpoint says so in config.json's quantization_config: fetch config.json again"
    return f"{path}: {name} is {dtype}; served: {', '.join(served)}{remedy}"


def stored_dtype(path: Path, name: str) -> str | None:
    """Dtype of a tensor in its file ("float32", "bfloat16", "float16"). None: not safetensors, or no such tensor.

    Raises:
        CheckpointError: as for `checkpoint_files`, or a header is damaged.
    """
    if not path.is_dir():
        return None
    for file in checkpoint_files(path):
        entry = read_header(file)[1].get(name)
        if entry is not None:
            return _DTYPE_NAMES.get(entry["dtype"])
    return None


def differ(directory: Path, first: str, second: str) -> bool:
    """Return whether a checkpoint has both tensors with different content. Reads both, once per process.

    False if it has no files; loading them raises the error.

    Raises:
        CheckpointError: a header is damaged.
    """
    try:
        files = checkpoint_files(directory)
    except CheckpointError:
        return False
    return _differ(tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in files), first, second)


@functools.cache
def _differ(files: tuple[tuple[Path, int, int], ...], first: str, second: str) -> bool:
    places = []
    for path, _, _ in files:
        raw, header = read_header(path)
        places += [(path, 8 + len(raw), header[name]) for name in (first, second) if name in header]
    if len(places) < 2:
        return False
    (_, _, one), (_, _, other) = places
    if (one["dtype"], one["shape"]) != (other["dtype"], other["shape"]):
        return True
    pairs = zip(*(_chunks(path, at, *entry["data_offsets"]) for path, at, entry in places), strict=True)
    return any(a != b for a, b in pairs)


def _chunks(path: Path, at: int, start: int, end: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(at + start)
        for left in range(end - start, 0, -_CHUNK_BYTES):
            yield file.read(min(left, _CHUNK_BYTES))


def checkpoint_files(directory: Path) -> tuple[Path, ...]:
    """Find the safetensors files of a checkpoint, sorted by name.

    Raises:
        CheckpointError: there are none (pickled weights are refused with a remedy), or the index names a file that is
            missing or in another folder.
    """
    index_file = directory / "model.safetensors.index.json"
    if index_file.exists():
        return _indexed_files(index_file)
    for name in _SINGLE_FILES:
        if (directory / name).exists():
            return (directory / name,)
    if directory.is_dir():
        pickled = sorted(path.name for path in directory.iterdir() if path.suffix in _PICKLED)
        if pickled:
            raise CheckpointError(
                f"{directory / pickled[0]} is a pickle, which can run code when it is read; "
                "convert it: AutoModelForCausalLM.from_pretrained(...).save_pretrained(..., safe_serialization=True)"
            )
    raise CheckpointError(
        f"{directory / _SINGLE_FILES[0]} is missing; give a directory with model.safetensors or its shards and index"
    )


def _indexed_files(index_file: Path) -> tuple[Path, ...]:
    try:
        names = set(json.loads(index_file.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index_file} is no index of shards ({error!r}); fetch it again") from None
    files = []
    for name in sorted(str(name) for name in names):
        path = index_file.parent / name
        if Path(name).name != name or path.suffix != ".safetensors":
            raise CheckpointError(f"{index_file} names {name!r}; shards are .safetensors files beside it")
        if not path.exists():
            raise CheckpointError(f"{path} is named by the index but missing; fetch it")
        files.append(path)
    return tuple(files)


def read_header(path: Path, max_bytes: int = MAX_HEADER_BYTES) -> tuple[bytes, dict[str, Any]]:
    """Read the header of a safetensors file, raw and parsed, and check the file's length against it.

    Parsed, it has the text model's names; `stored_as` is a tensor's name in the file. `max_bytes`: of the header; while
    it is parsed no other thread runs.

    Raises:
        CheckpointError: the file is truncated or no safetensors.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise CheckpointError(f"{path} is cut short or no safetensors ({size} bytes); fetch it again")
        if length > max_bytes:
            raise CheckpointError(f"{path} has a header of {length} bytes; {max_bytes} at most")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        header = {_text_name(name): {**entry, "stored_as": name} for name, entry in header.items()}
        end = max((_end_of(entry["data_offsets"]) for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise CheckpointError(f"{path} has a damaged header ({error!r}); fetch it again") from None
    if size != 8 + length + end:
        raise CheckpointError(f"{path} has {size} bytes where its header asks for {8 + length + end}; fetch it again")
    return raw, header


def _end_of(offsets: Any) -> int:
    """End of a tensor's place.

    Raises:
        ValueError: the place is none.
    """
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(offset) is int for offset in offsets):
        raise ValueError(f"data_offsets is {str(offsets)[:60]}")
    return int(offsets[1])


def _text_name(name: str) -> str:
    return _PLAIN + name.removeprefix(_NESTED) if name.startswith(_NESTED) else name


def safetensors_fingerprint(directory: Path) -> bytes:
    """Fingerprint of a checkpoint, 16 bytes: of its configs, and of every file's name, size, header and content.

    The content of large files is sampled; fingerprint.py describes the limits of this.
    """
    hasher = hashlib.blake2b((directory / "config.json").read_bytes(), digest_size=16)
    if (beside := directory / QUANTISATION_FILE).is_file():
        hasher.update(beside.read_bytes())
    for path in checkpoint_files(directory):
        raw, header = read_header(path)
        hasher.update(f"{path.name}:{path.stat().st_size}:{len(raw)}".encode() + raw)
        places = [entry["data_offsets"] for entry in header.values()]
        first = 8 + len(raw)
        hash_content(hasher, path, [range(first + start, first + end) for start, end in places])
    return hasher.digest()
