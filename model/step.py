"""What one layer of one step computes with, beside its weights. Knows no model."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ..kernels.reference import Planes
from .ops import AttentionKind, Ops


class LayerStep(NamedTuple):
    """Handed from the decoder to a layer's attention."""

    ops: Ops
    cos: Tensor  # [rows, rotary width / 2] float32, of each row's position
    sin: Tensor
    planes: tuple[Planes, ...]  # of this layer, one per component of the cache
    slots: Tensor  # [rows] int64
    layout: Any  # of `ops.lay_out`
    kind: AttentionKind
