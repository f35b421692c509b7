"""Inputs of one layer in one step, besides its weights. Knows no model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from ...kernels.reference import Planes
from ...kernels.reference_kv import Rotation
from .seam import AttentionKind, Ops

if TYPE_CHECKING:
    from ...kv.store.planes_device import StepBirths
    from ..adapters.loaded import LayerChanges


class LayerStep(NamedTuple):
    """Arguments of a layer's attention."""

    ops: Ops
    cos: Tensor  # [rows, rotary width / 2] float32, for each row's position
    sin: Tensor
    planes: tuple[Planes, ...]  # planes of this layer, one per component of the cache
    slots: Tensor  # [rows] int64
    layout: Any  # result of `ops.lay_out`
    kind: AttentionKind
    layer: int
    rotation: Rotation  # tables of cos and sin, by position
    births: StepBirths | None  # receives a device's digests of stored rows
    changes: LayerChanges  # of the rows that have an adapter
