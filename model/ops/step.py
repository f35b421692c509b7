"""What one layer of one step computes with, beside its weights. Knows no model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from ...kernels.reference import Planes
from ...kernels.reference_kv import Rotation
from .seam import AttentionKind, Ops

if TYPE_CHECKING:
    from ...kv.store.planes_device import StepBirths


class LayerStep(NamedTuple):
    """Handed from the decoder to a layer's attention."""

    ops: Ops
    cos: Tensor  # [rows, rotary width / 2] float32, of each row's position
    sin: Tensor
    planes: tuple[Planes, ...]  # of this layer, one per component of the cache
    slots: Tensor  # [rows] int64
    layout: Any  # of `ops.lay_out`
    kind: AttentionKind
    layer: int
    rotation: Rotation  # cos and sin again, by position
    births: StepBirths | None  # where a device leaves the digests of what it stores
