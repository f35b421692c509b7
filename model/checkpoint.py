"""Where a checkpoint lies: the bundled model, a directory, or a hub name. Opens no tensor."""

from __future__ import annotations

from pathlib import Path

from ..core.errors import CheckpointError
from .config import BUNDLED

_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]  # never pickles


def resolve(path: str) -> Path:
    """The checkpoint's directory; a hub name is downloaded first.

    Raises:
        CheckpointError: nothing of that name here or at the hub, or no config.json in it.
    """
    directory = Path(__file__).resolve().parent / BUNDLED if path == BUNDLED else Path(path).expanduser()
    if not directory.is_dir():
        directory = _download(path)
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"model.path is {path!r}: no config.json there; name a directory in Hugging Face format")
    return directory


def served_name(path: str, name: str | None) -> str:
    """What clients call the model: the given name, the hub name, or the directory's."""
    if name:
        return name
    return "twostroke-bundled" if path == BUNDLED else (Path(path).name if Path(path).expanduser().is_dir() else path)


def _download(path: str) -> Path:
    looks_like_a_hub_name = path.count("/") == 1 and not path.startswith((".", "/", "~"))
    if not looks_like_a_hub_name:
        raise CheckpointError(
            f"model.path is {path!r}: no such directory; give a directory or a hub name 'owner/model'"
        )
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(path, allow_patterns=_HUB_FILES))
    except Exception as error:  # the hub client raises a dozen kinds; each means the same to the user
        raise CheckpointError(
            f"model.path is {path!r}: not a directory here, and the hub did not give it: {error}"
        ) from None
