"""Finds a checkpoint: the bundled model, a directory, a GGUF file, or a hub name. Opens no tensor."""

from __future__ import annotations

import re
import socket
from pathlib import Path

from ..core.errors import CheckpointError
from .config import BUNDLED
from .gguf.file import GgufFile

_BUNDLED_PLACE = f"/model/{BUNDLED}"
_SNAPSHOT = re.compile(r"/models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<revision>[0-9a-f]{40})/?$")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]  # no pickles


def located(path: str, setting: str = "model.path") -> Path:
    """Return the checkpoint's directory, or its GGUF file. A hub name is downloaded first. `setting` named it.

    Raises:
        CheckpointError: the name exists neither here nor at the hub, has no config.json, or is a file that is no GGUF.
    """
    directory = Path(__file__).resolve().parents[1] / "model" / BUNDLED if path == BUNDLED else Path(path).expanduser()
    if directory.is_file():
        GgufFile(directory)  # raises if it is no GGUF file
        return directory
    if not directory.is_dir():
        directory = _download(path, setting)
    if not (directory / "config.json").is_file():
        files = sorted(file.name for file in directory.glob("*.gguf"))
        remedy = f"name one of its files, e.g. {directory / files[0]}" if files else "name one in Hugging Face's format"
        raise CheckpointError(f"{setting} is {path!r}: no config.json in that directory; {remedy}, or a GGUF file")
    return directory


def located_on_node(directory: str, setting: str = "model.path") -> Path:
    """Return the checkpoint that `located` found as `directory` on another machine, on this one.

    It is at the same place here, or it is the bundled one, or a snapshot of the hub, of which the same revision is
    downloaded. Several processes may call this at once: one of them downloads.

    Raises:
        CheckpointError: it is none of these.
    """
    if Path(directory).exists():
        return Path(directory)
    if directory.endswith(_BUNDLED_PLACE):
        return located(BUNDLED, setting)
    snapshot = _SNAPSHOT.search(directory)
    if snapshot is None:
        raise CheckpointError(
            f"{setting} is {directory!r}, and {socket.gethostname()} has no such directory or file: put it at the "
            "same place on every node, or give a hub name 'owner/model'"
        )
    return _download(f"{snapshot['owner']}/{snapshot['name']}", setting, snapshot["revision"])


def served_name(path: str, name: str | None) -> str:
    """Name of the model for clients: the given name, the hub name, the directory's, or the file's without .gguf."""
    if name:
        return name
    if path == BUNDLED:
        return "twostroke-bundled"
    place = Path(path).expanduser()
    if place.is_file():
        return place.stem
    return Path(path).name if place.is_dir() else path


def _download(path: str, setting: str, revision: str | None = None) -> Path:
    looks_like_a_hub_name = path.count("/") == 1 and not path.startswith((".", "/", "~"))
    if not looks_like_a_hub_name:
        raise CheckpointError(
            f"{setting} is {path!r}: no such directory or file; give one, or a hub name 'owner/model'"
        )
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(path, revision=revision, allow_patterns=_HUB_FILES))
    except Exception as error:  # the hub client has many error classes; all mean the same for the user
        raise CheckpointError(
            f"{setting} is {path!r}: not a directory here, and the hub did not give it: {error}"
        ) from None
