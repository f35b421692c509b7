"""Reads the small JSON and text files of a checkpoint, with errors that name the file. Knows no tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core.errors import CheckpointError


def read_text(path: Path) -> str:
    """Read a UTF-8 file.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None


def read_json(path: Path, *, optional: bool = False) -> Mapping[str, Any]:
    """Read a file with one JSON object; empty if an optional file is missing.

    Raises:
        CheckpointError: it is missing, unreadable, or holds no JSON object.
    """
    if optional and not path.exists():
        return {}
    try:
        found = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: holds a JSON {type(found).__name__}; must be an object")
    return found
