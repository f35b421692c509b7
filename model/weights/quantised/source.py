"""Implements `PartSource` and `Int4Source` over a checkpoint of quantised matrices: decoded when taken, or as stored.

A part is cut from the stored tensors, so a rank decodes its own rows and columns only, also inside a block of scales.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ....checkpoint.quantised.plan import QuantisedPlan
from ....checkpoint.safetensors_files import SafetensorsFiles
from ...ops.int4 import Int4Matrix
from .decode import Decoder
from .int4 import read_int4


class QuantisedSource:
    """Tensors of a quantised checkpoint under the names of a float one. Decoded matrices are float32."""

    def __init__(self, files: SafetensorsFiles, plan: QuantisedPlan) -> None:
        """`plan`: of the same files."""
        self.where = files.where
        self._files = files
        self._plan = plan
        self._shapes = plan.shapes()
        self._decoder = Decoder(files.take)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor, by Hugging Face's name."""
        return self._shapes

    def take(self, name: str) -> Tensor:
        """Read one tensor: float32 if it was quantised, else a view of its file."""
        matrix = self._plan.matrices.get(name)
        if matrix is None:
            return self._files.take(name)
        return self._decoder.decode(matrix, range(matrix.rows), range(matrix.columns))

    def take_int4(self, name: str) -> Int4Matrix | None:
        """Implements `Int4Source.take_int4`."""
        matrix = self._plan.matrices.get(name)
        return None if matrix is None else read_int4(self._files.take, matrix)

    def take_part(self, name: str, axis: int, part: range) -> Tensor:
        """Implements `PartSource.take_part`. Only the stored numbers of the part are decoded."""
        matrix = self._plan.matrices.get(name)
        if matrix is None:
            return self._files.take_part(name, axis, part)
        rows, columns = (part, range(matrix.columns)) if axis == 0 else (range(matrix.rows), part)
        return self._decoder.decode(matrix, rows, columns)

    def fingerprint(self) -> bytes:
        """Fingerprint of the checkpoint: of the stored tensors and of the config that says what they mean."""
        return self._files.fingerprint()
