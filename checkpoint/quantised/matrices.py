"""How a matrix [rows, columns] is stored by each format. Knows names and shapes of its tensors, no numbers.

A tensor is named by its full name. A scale, and a zero point if there is one, counts for a group of numbers. The value
of a number q is (q - zero) * scale, in float32; `model/weights/quantised/` decodes.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

_TENSORS = frozenset({"weight", "scale", "zeros", "group_index", "global_scale", "table", "nested"})


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """What all formats have."""

    rows: int
    columns: int
    weight: str

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the tensors that hold the matrix."""
        names = (getattr(self, field.name) for field in fields(self) if field.name in _TENSORS)
        return tuple(name for name in names if name is not None)


@dataclass(frozen=True, slots=True)
class ScaledMatrix(StoredMatrix):
    """FP8 or int8: a byte per number [rows, columns].

    `block`: rows and columns that share a scale; scales are [rows / block rows, columns / block columns], rounded up.
    """

    scale: str
    block: tuple[int, int]
    zeros: str | None = None  # int8, in the scales' shape
    divisor: int = 1  # LLM.int8() stores each row's largest magnitude, which is 127 steps


@dataclass(frozen=True, slots=True)
class PackedMatrix(StoredMatrix):
    """compressed-tensors' pack-quantized: `bits` per number, row by row in int32 words, lowest bits first.

    Numbers are stored plus 2^(bits - 1). Zero points [rows, groups] are packed in the same way along the rows.
    """

    scale: str  # [rows, groups]
    bits: int
    group: int  # columns that share a scale
    zeros: str | None = None
    group_index: str | None = None  # int32 [columns]: group of each column
    scale_bytes: int = 4  # of one scale


@dataclass(frozen=True, slots=True)
class GptqMatrix(StoredMatrix):
    """GPTQ: `bits` per number, column by column in int32 words, lowest bits first: [columns * bits / 32, rows].

    Zero points [groups, rows] are packed along the rows, minus `zero_offset`.
    """

    scale: str  # [groups, rows]
    zeros: str
    bits: int
    group: int
    zero_offset: int  # 1: the format's first version
    group_index: str | None = None
    scale_bytes: int = 4


@dataclass(frozen=True, slots=True)
class AwqMatrix(StoredMatrix):
    """AWQ's gemm form: 4 bits per number; eight rows share an int32 word: [columns, rows / 8], in `AWQ_ORDER`."""

    scale: str  # [groups, rows]
    zeros: str | None  # packed like the weight: [groups, rows / 8]; None: 8 everywhere
    group: int
    scale_bytes: int = 4


AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # row of a word's eight that its bits 4i to 4i + 3 hold


@dataclass(frozen=True, slots=True)
class Float4Matrix(StoredMatrix):
    """MXFP4 and NVFP4: numbers e2m1, two per byte, the first in the low bits: [rows, columns / 2].

    `group` columns share a scale: a power of two (MXFP4), or e4m3, which a scale of the whole tensor
    multiplies or divides.
    """

    scale: str  # [rows, columns / group]
    group: int
    global_scale: str | None = None
    divides: bool = False


@dataclass(frozen=True, slots=True)
class StackedFloat4Matrix(StoredMatrix):
    """gpt-oss's MXFP4: rows of one expert in a stack [experts, all rows, groups, 16] of bytes, packed as MXFP4 is.

    A group of 32 columns shares a scale, a power of two. The matrix has rows `first`, `first + step`, … of the expert.
    """

    scale: str  # [experts, all rows, groups]
    expert: int
    first: int
    step: int


@dataclass(frozen=True, slots=True)
class TableMatrix(StoredMatrix):
    """bitsandbytes' 4 bits: indices of a table of 16 values, the first in a byte's high bits, in one flat row.

    `block` numbers in a row share a magnitude. With `nested` the magnitudes are stored as indices of a table of 256
    values, of which `nested_block` share a magnitude, minus an offset.
    """

    scale: str  # magnitudes: float32, or uint8 indices
    table: str
    block: int
    nested: str | None = None  # magnitudes of the magnitudes
    nested_table: str | None = None
    nested_block: int = 0
    offset: float = 0.0
