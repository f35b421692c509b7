"""Copies several small tensors to the device in one transfer from pinned memory. Knows no step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_ALIGNMENT = 16  # bytes; kernels assume this alignment of addresses


class Arena:
    """Host and device memory of one layout. Write the views in `host`, call `send`, read the views in `device`."""

    def __init__(self, shapes: Sequence[tuple[tuple[int, ...], torch.dtype]], device: torch.device) -> None:
        """`shapes`: shape and dtype of each tensor, in the order of `host` and `device`."""
        sizes = [torch.Size(shape).numel() * dtype.itemsize for shape, dtype in shapes]
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + -(-size // _ALIGNMENT) * _ALIGNMENT)
        self._host = torch.zeros(starts[-1], dtype=torch.uint8, pin_memory=device.type != "cpu")
        self._device = torch.zeros(starts[-1], dtype=torch.uint8, device=device)

        def views(whole: Tensor) -> list[Tensor]:
            return [
                whole[start : start + size].view(dtype).view(shape)
                for start, size, (shape, dtype) in zip(starts, sizes, shapes, strict=False)
            ]

        self.host = views(self._host)
        self.device = views(self._device)

    def send(self) -> None:
        """Start the copy of all tensors on the current stream. Write `host` again only after the stream has done it."""
        self._device.copy_(self._host, non_blocking=True)


def upload(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copy CPU tensors to the device."""
    arena = Arena([(tuple(t.shape), t.dtype) for t in tensors], device)
    for place, tensor in zip(arena.host, tensors, strict=True):
        place.copy_(tensor)
    arena.send()
    return arena.device
