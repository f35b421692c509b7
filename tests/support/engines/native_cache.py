"""Sequences in planes of the cache, as the CPU kernels' tests want them."""

from collections.abc import Sequence

import torch

from twostroke.kernels.reference import Planes
from twostroke.kernels.reference_codecs import NumberCode
from twostroke.kv.block import BlockId
from twostroke.model.ops.native_ops import NativeOps
from twostroke.model.ops.torch_ops import TorchOps

BLOCK = 16
NUM_BLOCKS = 96


CODES: dict[str, NumberCode] = {
    "fp8": "e4m3", "e5m2": "e5m2", "int8": "int8", "channel": "int8_channel", "bf16": "bf16", "fp32": "fp32",
}  # fmt: skip


def planes(heads: int, width: int, codec: str) -> Planes:
    """Poisoned: what was never written reads as NaN or as huge numbers."""
    size = {"bf16": 2, "fp32": 4}.get(codec, 1) * width
    is_bytes = size == width
    payload = torch.full((NUM_BLOCKS, heads, BLOCK, size), 0x7E if is_bytes else 0xFF, dtype=torch.uint8)
    scales = torch.full((NUM_BLOCKS, heads, BLOCK), 200, dtype=torch.uint8) if is_bytes else None
    return Planes(payload, scales, CODES[codec])


class Cache:
    """Sequences whose tokens are stored, in scattered blocks of poisoned planes. `codec`: of all parts, or one each."""

    def __init__(self, ops: NativeOps | TorchOps, lengths: Sequence[int], parts: Sequence[torch.Tensor], codec: str):
        numbers = iter(torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(5)).tolist())
        self.tables = [tuple(BlockId(next(numbers)) for _ in range(-(-n // BLOCK))) for n in lengths]
        codecs = codec.split("/") if "/" in codec else [codec] * len(parts)
        self.planes = [planes(p.shape[1], p.shape[2], name) for p, name in zip(parts, codecs, strict=True)]
        slots = [
            table[i // BLOCK] * BLOCK + i % BLOCK
            for table, n in zip(self.tables, lengths, strict=True)
            for i in range(n)
        ]
        ops.write(parts, self.planes, torch.tensor(slots))
