"""Interface between the decoder and the ranks of a tensor-parallel group. Knows no process, no network, no model.

All ranks compute the same steps and call the same collectives in the same order, with tensors of the same shape. Every
rank gets the same bits, so all ranks sample the same tokens. A partial result is rounded to the compute dtype before it
is summed: so the number of ranks is part of the numerics class.

    per layer    all_reduce [rows, hidden] after attention's output, and after the feed-forward layer or the experts
    per step     all_reduce [rows] int32: keys and values that were not finite on any rank
    per logits   all_gather [rows, head rows of the rank] float32
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Collectives(Protocol):
    """One rank's end of a group. To be used by one thread at a time, which is the thread of the steps."""

    @property
    def rank(self) -> int:
        """This rank, from 0."""
        ...

    @property
    def size(self) -> int:
        """Number of ranks."""
        ...

    def all_reduce(self, x: Tensor) -> Tensor:
        """Replace x (contiguous; float32, bfloat16 or int32) by the sum over the ranks, by `ordered_sum`; returns x.

        So a number depends on the ranks' numbers at its place only: not on time, nor on the other rows of x.

        Raises:
            RankLost: x is undefined.
        """
        ...

    def all_gather(self, x: Tensor, width: int) -> Tensor:
        """Join the columns of all ranks' x [rows, columns] in rank order: the first `width` of them, contiguous.

        Raises:
            RankLost: as for `all_reduce`.
        """
        ...


class OneRank:
    """The group of a model that one rank computes alone: no sums, no copies."""

    rank = 0
    size = 1

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return x: it is the sum already."""
        return x

    def all_gather(self, x: Tensor, width: int) -> Tensor:
        """Return x [rows, width]: it has all columns already."""
        assert x.shape[1] == width
        return x


ONE_RANK = OneRank()


def ordered_sum(parts: Tensor, out: Tensor) -> Tensor:
    """Sum parts [ranks, ...] into `out` [...], in rank order; returns `out`. It defines `Collectives.all_reduce`.

    ((part 0 + part 1) + part 2) + ... in float32, rounded once to the dtype of `out`; int32 stays int32.
    """
    wide = torch.float32 if parts.is_floating_point() else parts.dtype
    total = parts[0].to(wide, copy=True)
    for part in parts[1:]:
        total += part
    return out.copy_(total)
