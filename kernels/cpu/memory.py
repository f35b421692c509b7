"""Memory that is read end to end by the kernels: zeroed, aligned, in huge pages where the system has them."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

HUGE_BYTES = 1 << 21


def take_memory(num_bytes: int) -> Tensor:
    """uint8 [num_bytes] of zeros that begins at a page; untouched pages cost nothing.

    Cached blocks lie scattered, and weights are streamed once per step: with small pages, finding the pages takes a
    good part of the time. Small requests get ordinary memory.
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
            pass  # a system without them
    return torch.frombuffer(memory, dtype=torch.uint8)  # which keeps the mapping alive
