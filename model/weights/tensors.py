"""Where a model's numbers come from, by Hugging Face's names. Knows no model.

Two formats: safetensors (`safetensors_files.py`) and GGUF (`gguf_source.py`). Nothing of a checkpoint is ever executed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

from ...checkpoint.gguf.file import is_gguf
from ...checkpoint.safetensors_files import SafetensorsFiles, safetensors_fingerprint
from .gguf_source import GgufSource, gguf_fingerprint


class TensorSource(Protocol):
    """A checkpoint's tensors. One thread at a time."""

    where: str
    """What errors call the checkpoint."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's shape, by Hugging Face's name; matrices are [out, in]."""
        ...

    def take(self, name: str) -> Tensor:
        """One tensor: float32, bfloat16 or float16, perhaps a view of a mapped file (never write to it).

        Raises:
            CheckpointError: it cannot be read; names file and tensor.
        """
        ...

    def fingerprint(self) -> bytes:
        """16 bytes that name the checkpoint's numbers and shape."""
        ...


def open_source(path: Path) -> TensorSource:
    """Open a checkpoint: a directory with safetensors, or a GGUF file.

    Raises:
        CheckpointError: it is none, or damaged; names the file.
    """
    return GgufSource(path) if is_gguf(path) else SafetensorsFiles(path)


def weights_fingerprint(path: Path) -> bytes:
    """`TensorSource.fingerprint` without opening the tensors."""
    return gguf_fingerprint(path) if is_gguf(path) else safetensors_fingerprint(path)
