"""Implements `PartSource` over a checkpoint that stacks its experts: each expert's tensors by names of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from ...checkpoint.stacked import StackedPart

if TYPE_CHECKING:
    from ..ops.int4 import Int4Matrix
    from .tensors import PartSource


class StackedSource:
    """Tensors of another source, with its stacks of experts taken apart. Parts are views of the mapped file."""

    def __init__(self, below: PartSource, parts: Mapping[str, StackedPart]) -> None:
        """`parts`: result of `stacked_parts` for the source."""
        self.where = below.where
        self._below = below
        self._parts = parts
        stacks = {part.stored for part in parts.values()}
        self._shapes = {name: tuple(shape) for name, shape in below.shapes().items() if name not in stacks}
        self._shapes.update({name: part.shape for name, part in parts.items()})

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor, by our name."""
        return self._shapes

    def take(self, name: str) -> Tensor:
        """Read one tensor."""
        part = self._parts.get(name)
        return self._below.take(name) if part is None else self._expert(part)

    def take_int4(self, name: str) -> Int4Matrix | None:
        """Implements `Int4Source.take_int4`, if the other source does; experts of a stack are no such matrices."""
        take = getattr(self._below, "take_int4", None)
        return None if take is None or name in self._parts else take(name)

    def take_part(self, name: str, axis: int, part: range) -> Tensor:
        """Implements `PartSource.take_part`: of a stack, a view, of which only used pages are read."""
        place = self._parts.get(name)
        if place is None:
            return self._below.take_part(name, axis, part)
        return self._expert(place).narrow(axis, part.start, len(part))

    def fingerprint(self) -> bytes:
        """Fingerprint of the checkpoint."""
        return self._below.fingerprint()

    def _expert(self, part: StackedPart) -> Tensor:
        whole = self._below.take_part(part.stored, 0, range(part.expert, part.expert + 1))[0]
        return whole if part.is_whole else whole[..., part.first :: part.step].t()
