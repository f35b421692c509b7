"""Which matrices of a checkpoint CPU kernels multiply as stored, in groups of 4-bit numbers, and their bytes.

Decided by headers. Loaders and plans of memory ask the same functions; all other matrices are decoded.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from .gguf.file import GgufFile, is_gguf
from .gguf.file import StoredTensor as GgufTensor
from .gguf.keys import heads_of
from .gguf.names import Piece, pieces
from .quantised.matrices import AwqMatrix, GptqMatrix, PackedMatrix, StoredMatrix
from .quantised.plan import quantised_plan

GGUF_Q4_0 = 2  # GGML's number of the type: groups of 32 with a scale of float16, zero point 8
_Q4_0_GROUP, _Q4_0_SCALE_BYTES = 32, 2
_LINE_NUMBERS = 8  # kernels/cpu/linear/int4.h: a group is a multiple
_PADDING_BYTES = 4  # per row: panels of 16 rows end their scales with a cache line of 64 bytes
_ORDER_BYTES = 4  # per column of a matrix whose columns are in another order


def stays_int4(matrix: StoredMatrix) -> bool:
    """Return whether a matrix stays in its 4-bit groups."""
    return int4_bytes(matrix) is not None


def int4_bytes(matrix: StoredMatrix) -> int | None:
    """Upper bound of the bytes of a matrix that stays in its 4-bit groups; None: it is decoded."""
    if not isinstance(matrix, PackedMatrix | GptqMatrix | AwqMatrix):
        return None
    bits, index = (4, None) if isinstance(matrix, AwqMatrix) else (matrix.bits, matrix.group_index)
    if bits != 4 or matrix.columns % matrix.group or matrix.group % _LINE_NUMBERS:
        return None
    held = _bytes(matrix.rows, matrix.columns, matrix.group, matrix.scale_bytes + (matrix.zeros is not None))
    return held + (0 if index is None else _ORDER_BYTES * matrix.columns)


def is_gguf_int4(piece: Piece, stored: GgufTensor) -> bool:
    """Return whether a matrix of a GGUF file stays in its 4-bit groups."""
    return stored.kind == GGUF_Q4_0 and len(piece.shape) == 2 and piece.value_part is None


def int4_matrices(path: Path) -> Mapping[str, int]:
    """Bytes of each matrix that stays in its 4-bit groups, by Hugging Face's name.

    Raises:
        CheckpointError: as for `quantised_plan` or `GgufFile`.
    """
    if is_gguf(path):
        file = GgufFile(path)
        found = pieces(file.architecture, file.tensors, heads_of(file))
        stay = {name: piece.shape for name, piece in found.items() if is_gguf_int4(piece, file.tensors[piece.stored])}
        return {name: _bytes(rows, columns, _Q4_0_GROUP, _Q4_0_SCALE_BYTES) for name, (rows, columns) in stay.items()}
    plan = quantised_plan(path)
    held = {} if plan is None else {name: int4_bytes(matrix) for name, matrix in plan.matrices.items()}
    return {name: count for name, count in held.items() if count is not None}


def _bytes(rows: int, columns: int, group: int, of_group: int) -> int:
    return rows * (columns // 2 + columns // group * of_group + _PADDING_BYTES)
