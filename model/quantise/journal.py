"""The folder in which a quantised checkpoint grows, until it is whole and gets its name.

Files get their names when they are complete, `progress.json` names what is done after it is on the disk, and the
folder is renamed last. So a killed run goes on at its last layer, and no half of a checkpoint looks whole.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from ...core.errors import ConfigError

_PROGRESS, _LOCK, DIGESTS = "progress.json", "lock", "SHA256SUMS"
_CHUNK_BYTES = 4 << 20


@dataclass(slots=True)
class Progress:
    """What is done. `notes`: plain values of the job, by layer."""

    key: str  # digest of all that decides the result
    layers: int = 0
    digests: dict[str, str] = field(default_factory=dict)  # SHA-256 of finished files, by name
    names: dict[str, list[str]] = field(default_factory=dict)  # tensors of each file of weights
    num_bytes: int = 0  # of the tensors
    notes: list[dict[str, Any]] = field(default_factory=list)


class Journal:
    """A partial checkpoint beside `out`. One process at a time."""

    def __init__(self, out: Path, key: str) -> None:
        """Take the work of a killed run up, or begin. `key`: the same for the same result only.

        Raises:
            ConfigError: another process works on it, other settings began it, or a finished file was changed.
        """
        self.out = out
        self.folder = out.with_name(out.name + ".partial")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / _LOCK).open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise ConfigError(f"{self.folder} is in use by another run; wait for it, or give another OUT") from None
        try:
            self.progress = self._read(key)
        except BaseException:
            self._lock.close()
            raise

    def close(self) -> None:
        """Let another process have the folder."""
        self._lock.close()

    def _read(self, key: str) -> Progress:
        file = self.folder / _PROGRESS
        remedy = f"remove {self.folder} to begin anew"
        if not file.is_file():
            return Progress(key)
        try:
            progress = Progress(**json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{file} is damaged ({error}); {remedy}") from None
        if progress.key != key:
            raise ConfigError(
                f"{self.folder} was begun with another checkpoint, text, setting or version; {remedy}, or give the same"
            )
        for name, digest in progress.digests.items():
            if not (self.folder / name).is_file() or digest_of(self.folder / name) != digest:
                raise ConfigError(f"{self.folder / name} is not as it was written; {remedy}")
        return progress

    def state(self) -> dict[str, Tensor]:
        """Tensors that the last finished layer left."""
        return load_file(self.folder / _state(self.progress.layers))

    def add_weights(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write a file of weights. It counts after the next `finish_layer`."""
        with self._new(name) as path:
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata={"format": "pt"})
        self._count(name)
        self.progress.names[name] = list(tensors)
        self.progress.num_bytes += sum(tensor.nbytes for tensor in tensors.values())

    def finish_layer(self, state: Mapping[str, Tensor], note: dict[str, Any]) -> None:
        """Keep what the next layer needs; from now on a killed run goes on after this one."""
        before = _state(self.progress.layers)
        after = _state(self.progress.layers + 1)
        with self._new(after) as path:
            save_file(dict(state), path)
        self.progress.layers += 1
        self.progress.notes.append(note)
        with self._new(_PROGRESS) as path:
            path.write_text(json.dumps(_plain(self.progress)), encoding="utf-8")
        (self.folder / before).unlink(missing_ok=True)

    def add_text(self, name: str, text: str) -> None:
        """Write a small file of the finished checkpoint."""
        with self._new(name) as path:
            path.write_text(text, encoding="utf-8")
        self._count(name)

    def copy(self, file: Path) -> None:
        """Copy a small file of the original."""
        with self._new(file.name) as path:
            shutil.copyfile(file, path)
        self._count(file.name)

    def publish(self) -> None:
        """Write the list of digests, and give the folder the checkpoint's name.

        Raises:
            ConfigError: the name was taken meanwhile.
        """
        lines = [f"{digest}  {name}\n" for name, digest in sorted(self.progress.digests.items())]
        with self._new(DIGESTS) as path:
            path.write_text("".join(lines), encoding="utf-8")
        for path in self.folder.iterdir():
            if path.name not in self.progress.digests and path.name != DIGESTS:
                path.unlink()
        try:
            self.folder.rename(self.out)
        except OSError as error:
            raise ConfigError(f"{self.folder} is complete and cannot become {self.out} ({error}); rename it") from None
        _sync(self.out.parent)
        self.close()

    def _count(self, name: str) -> None:
        self.progress.digests[name] = digest_of(self.folder / name)

    @contextlib.contextmanager
    def _new(self, name: str) -> Iterator[Path]:
        """A path to write to, which gets its name when its bytes are on the disk."""
        path = self.folder / f"{name}.new"
        yield path
        _sync(path)
        path.rename(self.folder / name)
        _sync(self.folder)


def digest_of(path: Path) -> str:
    """SHA-256 of a file's content."""
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            hasher.update(chunk)
    return hasher.hexdigest()


def _state(layers: int) -> str:
    return f"state-{layers}.safetensors"


def _plain(progress: Progress) -> dict[str, Any]:
    return {name: getattr(progress, name) for name in Progress.__slots__}


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
