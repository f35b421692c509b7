"""Tensors of one tensor-parallel rank, cut out of a checkpoint. Knows no model beyond its cuts.

Only the rank's numbers are read: from safetensors as views of the mapped file, from GGUF by rows and blocks. A part is
copied only if it is padded or joined of several pieces.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...checkpoint.cuts import rank_cuts
from ...checkpoint.shards import Piece, RankSpec
from .tensors import PartSource, TensorSource
from .weights import check_tensors


def cut_source(source: PartSource, rank: RankSpec) -> TensorSource:
    """The tensors that a rank's spec describes. In a group of one rank they are the source's own.

    Raises:
        CheckpointError: the checkpoint's tensors are not those of the whole model; names the first difference.
    """
    if rank.shard.size == 1:
        return source
    check_tensors(source, rank.whole)
    return RankSource(source, rank)


class RankSource:
    """Implements `TensorSource` for one rank."""

    def __init__(self, source: PartSource, rank: RankSpec) -> None:
        """`source`: a checkpoint with exactly the whole model's tensors."""
        self.where = source.where
        self._source = source
        self._cuts = rank_cuts(rank, source.shapes())
        whole = source.shapes()
        self._shapes = {**whole, **{name: cut.shape(whole[cut.stored]) for name, cut in self._cuts.items()}}

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor of the rank, by Hugging Face's name."""
        return self._shapes

    def take(self, name: str) -> Tensor:
        """Read the rank's part of a tensor, padding included."""
        cut = self._cuts.get(name)
        if cut is None:
            return self._source.take(name)
        pieces = [self._piece(cut.stored, cut.axis, piece) for piece in cut.pieces]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, cut.axis)

    def fingerprint(self) -> bytes:
        """Fingerprint of the whole checkpoint: the same on all ranks."""
        return self._source.fingerprint()

    def _piece(self, stored: str, axis: int, piece: Piece) -> Tensor:
        numbers = self._source.take_part(stored, axis, range(piece.start, piece.stop))
        spare = piece.size - (piece.stop - piece.start)
        if not spare:
            return numbers
        shape = list(numbers.shape)
        shape[axis] = spare
        return torch.cat((numbers, numbers.new_zeros(shape)), axis)
