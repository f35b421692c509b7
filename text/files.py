"""The small files beside a checkpoint's weights: JSON read with errors that name the file. Knows no tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core.errors import CheckpointError

SPECIAL_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


def read_text(path: Path) -> str:
    """A UTF-8 file.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None


def read_json(path: Path, *, optional: bool = False) -> Mapping[str, Any]:
    """A file with one JSON object; empty where an optional file is missing.

    Raises:
        CheckpointError: it is missing, unreadable, or holds something else.
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


def special_tokens(directory: Path) -> dict[str, str]:
    """The special tokens by their names ("bos_token": "<s>"), as tokenizer and chat template know them."""
    tokens: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):  # the later one wins
        path = directory / name
        for key, value in read_json(path, optional=True).items():
            if key not in SPECIAL_NAMES or value is None:
                continue
            content = value.get("content") if isinstance(value, dict) else value
            if not isinstance(content, str):
                raise CheckpointError(f"{path}: {key} is {value!r}; must be a string, or an object with content")
            tokens[key] = content
    return tokens
