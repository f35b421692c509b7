"""Zeroed, aligned memory for the kernels, in huge pages where the system has them."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

HUGE_BYTES = 1 << 21


def take_memory(num_bytes: int) -> Tensor:
    """uint8 [num_bytes] of zeros, aligned to a page; untouched pages take no memory.

    Cached blocks are scattered and weights are streamed once per step: with small pages, address translation takes a
    large part of the time. Requests below `HUGE_BYTES` get ordinary memory, aligned to 64 bytes.
    """
    if num_bytes < HUGE_BYTES:
        whole = torch.zeros(num_bytes + 64, dtype=torch.uint8)
        start = -whole.data_ptr() % 64
        return whole[start : start + num_bytes]
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            pass  # the system has no huge pages
    return torch.frombuffer(memory, dtype=torch.uint8)  # the tensor keeps the mapping alive
