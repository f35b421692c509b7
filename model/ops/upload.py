"""A step's small integer tensors to the device in one copy from pinned memory. Knows no step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_ALIGNMENT = 16  # what kernels assume of an address


class Arena:
    """Host memory and device memory of one layout: write the views of `host`, `send`, read those of `device`."""

    def __init__(self, shapes: Sequence[tuple[tuple[int, ...], torch.dtype]], device: torch.device) -> None:
        """`shapes`: shape and dtype of each tensor, in order."""
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
        """Copy everything, in the order of the stream; `host` may be written again once the stream has come so far."""
        self._device.copy_(self._host, non_blocking=True)


def upload(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copies of CPU tensors on the device."""
    arena = Arena([(tuple(t.shape), t.dtype) for t in tensors], device)
    for place, tensor in zip(arena.host, tensors, strict=True):
        place.copy_(tensor)
    arena.send()
    return arena.device
