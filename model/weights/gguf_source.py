"""Tensors of a GGUF file under Hugging Face's names, dequantised when they are taken. Knows no model.

The `gguf` package dequantises: its numpy routines define the format.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...checkpoint.fingerprint import hash_content
from ...checkpoint.gguf.file import GgufFile, StoredTensor
from ...checkpoint.gguf.keys import heads_of
from ...checkpoint.gguf.names import Piece, pieces
from ...checkpoint.int4 import is_gguf_int4
from ...core.errors import CheckpointError
from ..ops.int4 import Int4Matrix, pairs

_SERVED = (
    "F32",
    "F16",
    "BF16",
    "Q8_0",
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "MXFP4",
)


class _Part(NamedTuple):
    """Part of a stored tensor: indices of its first and of its last axis. None: all."""

    rows: range | None
    columns: range | None


_WHOLE = _Part(None, None)


class GgufSource:
    """Implements `PartSource` for one GGUF file."""

    def __init__(self, path: Path) -> None:
        """Read metadata and tensor table, and check that every tensor is inside the file.

        Raises:
            CheckpointError: the file is damaged or truncated, or a tensor's type is not supported; names the tensor.
        """
        self.where = str(path)
        self._file = GgufFile(path)
        _check_tensors(self._file)
        self._pieces = pieces(self._file.architecture, self._file.tensors, heads_of(self._file))

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor, by Hugging Face's name."""
        return {name: piece.shape for name, piece in self._pieces.items()}

    def take(self, name: str) -> Tensor:
        """Read one tensor: float32 if it was quantised, else as stored (if possible, a view of the mapped file)."""
        return self._taken(self._pieces[name], _WHOLE)

    def take_int4(self, name: str) -> Int4Matrix | None:
        """Implements `Int4Source.take_int4`: Q4_0."""
        piece = self._pieces[name]
        stored = self._file.tensors[piece.stored]
        if not is_gguf_int4(piece, stored):
            return None
        numbers, scales = _q4_0(torch.from_numpy(self._rows(stored, piece.expert)))
        if piece.turned_heads:
            head_rows = piece.shape[0] // piece.turned_heads
            numbers, scales = _turned_back(numbers, head_rows), _turned_back(scales, head_rows)
        return Int4Matrix(numbers, scales)

    def take_part(self, name: str, axis: int, part: range) -> Tensor:
        """Implements `PartSource.take_part`. Where rows were reordered or joined, `part` must hold whole heads."""
        rows, columns = (part, None) if axis == 0 else (None, part)
        return self._taken(self._pieces[name], _Part(rows, columns))

    def _taken(self, piece: Piece, part: _Part) -> Tensor:
        if piece.value_part is not None:
            return self._way_up(piece, piece.value_part, part)
        stored = self._file.tensors[piece.stored]
        if len(piece.shape) == 1 and part.rows is not None:  # a vector's numbers are the last axis
            part = _Part(None, part.rows)
        tensor = self._numbers(stored, part, piece.expert)
        if piece.turned_heads:
            tensor = _turned_back(tensor, piece.shape[0] // piece.turned_heads)
        if piece.offset:
            tensor = tensor.float() - piece.offset
        return tensor if part != _WHOLE else tensor.reshape(piece.shape)

    def fingerprint(self) -> bytes:
        """Implements `TensorSource.fingerprint` by `gguf_fingerprint`."""
        return _fingerprint(self._file)

    def _way_up(self, piece: Piece, value_part: str, part: _Part) -> Tensor:
        """Join keys and values per head, as Hugging Face stores them: [heads * (key_width + value_width), latent]."""
        keys, values = self._file.tensors[piece.stored], self._file.tensors[value_part]
        width, heads = keys.shape[2] + values.shape[1], None
        assert part.columns is None, "a latent is never split"
        if part.rows is not None:
            assert part.rows.start % width == 0 == len(part.rows) % width, "rows of whole heads"
            heads = range(part.rows.start // width, part.rows.stop // width)
        ups = self._numbers(keys, _Part(heads, None)).transpose(1, 2)  # stored with rows of key_width
        joined = torch.cat([ups.float(), self._numbers(values, _Part(heads, None)).float()], dim=1)
        return joined.reshape(-1, piece.shape[1])

    def _numbers(self, tensor: StoredTensor, part: _Part, expert: int | None = None) -> Tensor:
        """Read a part of a tensor, or of the tensor of one expert in a stack."""
        name, width, rows = _kind_name(tensor.kind), tensor.shape[-1], self._rows(tensor, expert)
        elements, bytes_ = _block(tensor.kind)
        if part.rows is not None:
            rows = rows[part.rows.start : part.rows.stop]
        columns = range(width) if part.columns is None else part.columns
        first, last = columns.start // elements, -(-columns.stop // elements)  # whole blocks
        rows = rows[..., first * bytes_ : last * bytes_]
        return _decoded(rows, name, tensor.kind).narrow(-1, columns.start - first * elements, len(columns))

    def _rows(self, tensor: StoredTensor, expert: int | None) -> NDArray[np.uint8]:
        """Bytes of a tensor's rows [..., bytes], or of those of one expert in a stack."""
        elements, bytes_ = _block(tensor.kind)
        *lead, width = tensor.shape
        stored = self._bytes[tensor.at : tensor.at + _size(tensor.shape) // elements * bytes_]
        rows = stored.reshape(*lead, width // elements * bytes_)
        return rows if expert is None else rows[expert]

    @cached_property
    def _bytes(self) -> np.memmap[Any, Any]:
        # "c" is copy-on-write: torch needs writable arrays, but a write never reaches the file.
        return np.memmap(self._file.path, dtype=np.uint8, mode="c")


def gguf_fingerprint(path: Path) -> bytes:
    """Fingerprint of the file, 16 bytes: of all its metadata, and of its content as for safetensors files."""
    return _fingerprint(GgufFile(path))


def _fingerprint(file: GgufFile) -> bytes:
    head = file.head()
    hasher = hashlib.blake2b(f"gguf:{file.size_bytes}:{len(head)}".encode() + head, digest_size=16)
    starts = sorted(tensor.at for tensor in file.tensors.values())
    hash_content(hasher, file.path, [range(*ends) for ends in pairwise([*starts, file.size_bytes])])
    return hasher.digest()


def _check_tensors(file: GgufFile) -> None:
    gguf, alignment = _gguf(), 4  # bytes of a float32; files align tensors to 32 or more
    for name, tensor in file.tensors.items():
        kind = _kind_name(tensor.kind)
        if kind not in _SERVED:
            raise CheckpointError(
                f"{file.path}: {name} is {kind}; served: {', '.join(_SERVED)}. Take a file of one of these, e.g. Q4_K_M"
            )
        elements, bytes_ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(tensor.kind)]
        if not tensor.shape or 0 in tensor.shape or tensor.shape[-1] % elements:
            raise CheckpointError(
                f"{file.path}: {name} is {kind} with rows of {tensor.shape[-1:]} numbers; fetch it again"
            )
        end = tensor.at + _size(tensor.shape) // elements * bytes_
        if end > file.size_bytes or tensor.at % alignment:
            raise CheckpointError(
                f"{file.path} is cut short or damaged: {name} ends at byte {end} of {file.size_bytes}; fetch it again"
            )


def _block(kind: int) -> tuple[int, int]:
    """Numbers and bytes of a block of a served type."""
    gguf = _gguf()
    elements, bytes_ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    return int(elements), int(bytes_)


def _q4_0(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers uint8 [rows, columns / 2], in pairs of neighbours, and scales float16 [rows, groups] of blocks of Q4_0.

    A block is a scale and 16 bytes; low halves are its first 16 numbers, high halves the others.
    """
    blocks = rows.view(len(rows), -1, 18)
    halves = blocks[:, :, 2:]
    numbers = torch.cat((halves & 15, halves >> 4), 2).flatten(1)
    return pairs(numbers), blocks[:, :, :2].contiguous().view(torch.float16).squeeze(2)


def _kind_name(kind: int) -> str:
    try:
        return str(_gguf().GGMLQuantizationType(kind).name)
    except ValueError:
        return f"of an unknown type {kind}"


def _decoded(rows: NDArray[np.uint8], name: str, kind: int) -> Tensor:
    """Numbers of rows of bytes [..., bytes] in a served type: [..., numbers]; views where the type is not quantised."""
    if name in ("F32", "F16"):
        return torch.from_numpy(rows.view(np.float32 if name == "F32" else np.float16))
    if name == "BF16":
        return torch.from_numpy(rows.view(np.int16)).view(torch.bfloat16)
    gguf = _gguf()
    elements, bytes_ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    shape = (*rows.shape[:-1], rows.shape[-1] // bytes_ * elements)
    if not rows.size:
        return torch.empty(shape)
    blocks = np.ascontiguousarray(rows).reshape(-1, rows.shape[-1])
    numbers: NDArray[np.float32] = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType(kind))
    return torch.from_numpy(numbers.reshape(shape))


def _turned_back(tensor: Tensor, head_rows: int) -> Tensor:
    """Reorder rows as Hugging Face stores them: per head the first halves of all rotary pairs, then the second."""
    assert len(tensor) % head_rows == 0, "rows of whole heads"
    pairs = tensor.reshape(-1, head_rows // 2, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for side in shape:
        size *= side
    return size


def _gguf() -> Any:
    """Import the `gguf` package when the first GGUF file is opened; machines without such files need not have it."""
    try:
        import gguf
        import gguf.quants
    except ImportError:
        raise CheckpointError("GGUF files need the package gguf; pip install 'twostroke[engine]'") from None
    return gguf
