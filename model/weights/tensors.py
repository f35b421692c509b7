"""Sources of a model's tensors, under Hugging Face's names. Knows no model.

Two formats of files: safetensors (checkpoint/safetensors_files.py), perhaps of quantised matrices (`quantised/`) or of
stacked experts (`stacked_source.py`), and GGUF (`gguf_source.py`). No code of a checkpoint runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import Tensor

from ...checkpoint.gguf.file import is_gguf
from ...checkpoint.quantised.plan import quantised_plan
from ...checkpoint.safetensors_files import SafetensorsFiles, safetensors_fingerprint
from ...checkpoint.stacked import stacked_parts
from ..ops.int4 import Int4Matrix
from .gguf_source import GgufSource, gguf_fingerprint
from .quantised.source import QuantisedSource
from .stacked_source import StackedSource


class TensorSource(Protocol):
    """Tensors of a checkpoint. To be used by one thread at a time."""

    where: str
    """Name of the checkpoint in errors."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor, by Hugging Face's name; matrices are [out, in]."""
        ...

    def take(self, name: str) -> Tensor:
        """Read one tensor: float32, bfloat16 or float16, perhaps a view of a mapped file (never write to it).

        Raises:
            CheckpointError: it cannot be read; names file and tensor.
        """
        ...

    def fingerprint(self) -> bytes:
        """Fingerprint of the checkpoint's numbers and shapes, 16 bytes."""
        ...


@runtime_checkable
class Int4Source(Protocol):
    """A source of which some matrices can be taken as stored, in groups of 4-bit numbers."""

    def take_int4(self, name: str) -> Int4Matrix | None:
        """Read one matrix; None: it is stored in another way (checkpoint/int4.py), `take` reads it.

        Raises:
            CheckpointError: as for `TensorSource.take`.
        """
        ...


class PartSource(TensorSource, Protocol):
    """Tensors of a checkpoint's files, of which also parts can be read."""

    def take_part(self, name: str, axis: int, part: range) -> Tensor:
        """Read indices `part` of one axis of a tensor, as `take` does. No other numbers of the tensor are read.

        Quantised numbers are read in whole blocks. `part` may be empty.

        Raises:
            CheckpointError: as for `take`.
        """
        ...


def open_source(path: Path) -> PartSource:
    """Open a checkpoint: a directory with safetensors, or a GGUF file.

    Raises:
        CheckpointError: it is no checkpoint, or it is damaged; names the file.
    """
    if is_gguf(path):
        return GgufSource(path)
    plan = quantised_plan(path)
    files = SafetensorsFiles(path, quantised=plan is not None)
    source: PartSource = files if plan is None else QuantisedSource(files, plan)
    parts = stacked_parts(source.shapes())
    return StackedSource(source, parts) if parts else source


def weights_fingerprint(path: Path) -> bytes:
    """Compute `TensorSource.fingerprint` without opening the tensors."""
    return gguf_fingerprint(path) if is_gguf(path) else safetensors_fingerprint(path)
