"""Sequences in planes of the cache, as the CPU kernels' tests want them."""

from collections.abc import Sequence

import torch

from twostroke.kernels.reference import Planes
from twostroke.kv.block import BlockId
from twostroke.model.ops.native_ops import NativeOps
from twostroke.model.ops.torch_ops import TorchOps

BLOCK = 16
NUM_BLOCKS = 96


def planes(heads: int, width: int, codec: str) -> Planes:
    """Poisoned: what was never written reads as NaN or as huge numbers."""
    size = {"fp8": 1, "bf16": 2, "fp32": 4}[codec] * width
    payload = torch.full((NUM_BLOCKS, heads, BLOCK, size), 0xFF if codec != "fp8" else 0x7E, dtype=torch.uint8)
    scales = torch.full((NUM_BLOCKS, heads, BLOCK), 200, dtype=torch.uint8) if codec == "fp8" else None
    return Planes(payload, scales)


class Cache:
    """Sequences whose tokens are stored, in scattered blocks of poisoned planes."""

    def __init__(self, ops: NativeOps | TorchOps, lengths: Sequence[int], parts: Sequence[torch.Tensor], codec: str):
        numbers = iter(torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(5)).tolist())
        self.tables = [tuple(BlockId(next(numbers)) for _ in range(-(-n // BLOCK))) for n in lengths]
        self.planes = [planes(p.shape[1], p.shape[2], codec) for p in parts]
        slots = [
            table[i // BLOCK] * BLOCK + i % BLOCK
            for table, n in zip(self.tables, lengths, strict=True)
            for i in range(n)
        ]
        ops.write(parts, self.planes, torch.tensor(slots))
