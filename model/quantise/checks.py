"""Refuses what cannot be quantised, before anything is computed; and what the work needs of memory and disk."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...checkpoint.config_json import load_spec
from ...checkpoint.gguf.file import is_gguf
from ...checkpoint.layout import Matrix, expected_shapes, is_ignored, layer_layout
from ...checkpoint.quantised.plan import quantised_plan
from ...checkpoint.safetensors_files import SafetensorsFiles, checkpoint_files
from ...checkpoint.spec import ModelSpec
from ...checkpoint.stacked import stacked_parts
from ...core.errors import CheckpointError, ConfigError, DoesNotFit
from ..weights.weights import check_tensors

_FLOAT_BYTES = 4
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Original:
    """A float checkpoint that can be quantised."""

    directory: Path
    spec: ModelSpec
    source: SafetensorsFiles

    @property
    def size_bytes(self) -> int:
        """Size of the files of weights."""
        return sum(file.stat().st_size for file in checkpoint_files(self.directory))

    def widths(self) -> list[tuple[str, int]]:
        """Columns of every matrix that is quantised, by module."""
        return [(name, matrix.columns) for matrix in self._matrices() for name, _ in matrix.parts]

    def ignored(self) -> list[str]:
        """Matrices that stay floats: the head, and routers of experts."""
        found = ["lm_head"]
        for index in range(self.spec.num_layers):
            for matrix in layer_layout(self.spec, index, self.source.shapes()).matrices.values():
                found += [name for name, _ in matrix.parts] if matrix.exact else []
        return found

    def dropped(self) -> list[str]:
        """Tensors that no decoder layer uses, which are left out."""
        expected = expected_shapes(self.spec, self.source.shapes())
        return sorted(name for name in self.source.shapes() if is_ignored(self.spec, name) and name not in expected)

    def _matrices(self) -> Iterator[Matrix]:
        for index in range(self.spec.num_layers):
            layout = layer_layout(self.spec, index, self.source.shapes())
            yield from (matrix for matrix in layout.matrices.values() if not matrix.exact)


def opened(directory: Path) -> Original:
    """Open a checkpoint and check that it is a whole float one.

    Raises:
        CheckpointError: it is damaged, not supported, a GGUF file, quantised already, or has stacks of experts.
    """
    if is_gguf(directory):
        raise CheckpointError(f"IN is {directory}, a GGUF file; give the float checkpoint in Hugging Face's format")
    if quantised_plan(directory) is not None:
        raise CheckpointError(
            f"IN is {directory}, whose config.json has a quantization_config: it is quantised already; give the float "
            "checkpoint that it was made of"
        )
    spec, source = load_spec(directory), SafetensorsFiles(directory)
    if spec.delta is not None:
        raise CheckpointError(
            f"IN is {directory}, and {spec.architecture} has recurrent layers, which are not quantised here yet; serve "
            "it with --quantization int8, or take a quantised export of it"
        )
    if any(not part.is_whole for part in stacked_parts(source.shapes()).values()):
        raise CheckpointError(
            f"IN is {directory}, whose experts are stacked with biases ({spec.architecture}): no loader reads them "
            "quantised one by one; take its MXFP4 release, or serve it with --quantization int8"
        )
    check_tensors(source, spec)
    return Original(directory, spec, source)


def refuse_taken(out: Path) -> None:
    """Refuse a name that something has. Raises ConfigError."""
    if out.exists() or out.is_symlink():
        raise ConfigError(f"OUT is {out}, which exists; give a new name, or remove it")
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"OUT is {out}, and {out.absolute().parent} is no folder; make it first")


def needed_memory(original: Original, calibration_tokens: int, evaluation_tokens: int) -> int:
    """Upper bound of the memory that the largest step needs, in bytes.

    A layer in float32 is held as loaded, folded, and quantised, with one matrix under way; each product's inputs as a
    matrix [in, in], twice while one is factored; three residual streams, and a layer's result for one of them.
    """
    spec, layer_numbers, squares, widest = original.spec, 0, 0, 0
    for index in range(spec.num_layers):
        matrices = list(layer_layout(spec, index, original.source.shapes()).matrices.values())
        layer_numbers = max(layer_numbers, sum(m.rows * m.columns for m in matrices))
        squares = max(squares, sum(m.columns**2 for m in matrices))
        widest = max(widest, *(m.columns**2 for m in matrices))
    streams = (2 * calibration_tokens + 4 * evaluation_tokens) * spec.hidden_size
    table = spec.vocab_size * spec.hidden_size
    return _FLOAT_BYTES * (max(5 * layer_numbers, 2 * table) + 2 * squares + 3 * widest + streams) + 256 * _MIB


def check_room(original: Original, out: Path, memory_bytes: int, state_bytes: int, needed_bytes: int) -> None:
    """Compare needs with what is there. `state_bytes`: of a kept state, of which two are there at times.

    Raises:
        DoesNotFit: memory or disk is too small; shows both numbers.
    """
    if needed_bytes > memory_bytes:
        raise DoesNotFit(
            f"one layer at a time needs {needed_bytes / _MIB:,.0f} MiB, and {memory_bytes / _MIB:,.0f} MiB are free or "
            "allowed by --memory; give fewer --calibration-tokens, or take a larger machine"
        )
    disk = original.size_bytes + 2 * state_bytes
    free = shutil.disk_usage(out.absolute().parent).free
    if disk > free:
        raise DoesNotFit(
            f"OUT and the kept state need up to {disk / _MIB:,.0f} MiB in {out.absolute().parent}, and "
            f"{free / _MIB:,.0f} MiB are free; make room, or give another OUT"
        )
