"""Which equalities of bits hold on this machine, beyond those that the kernels promise. Facts for a numerics class."""

from __future__ import annotations

import torch

from twostroke.kernels import reference
from twostroke.kernels.gpu.paged_decode import paged_decode_attention
from twostroke.kernels.gpu.ragged_prefill import ragged_prefill_attention
from twostroke.kernels.reference import Planes
from twostroke.kernels.reference_attention import Chunk

_BLOCK_TOKENS, _HEADS, _GROUP, _WIDTH = 16, 1, 2, 128


def shared_bits(device: str) -> dict[str, bool]:
    """Compare one prompt's attention in one chunk, in two, and its last row as a decode step, bit for bit."""
    length, cut = (90, 37) if device == "cpu" else (3000, 1111)
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(length, _HEADS, _WIDTH, generator=generator).bfloat16().to(device) for _ in range(2))
    q = torch.randn(length, _HEADS * _GROUP, _WIDTH, generator=generator).bfloat16().to(device)
    blocks = -(-length // _BLOCK_TOKENS)
    shape = (blocks, _HEADS, _BLOCK_TOKENS)
    planes = [
        Planes(
            torch.zeros((*shape, _WIDTH), dtype=torch.uint8, device=device),
            torch.zeros(shape, dtype=torch.uint8, device=device),
        )
        for _ in "kv"
    ]
    stored = reference.store_kv(k, v, torch.arange(length, device=device), *planes)
    table = torch.arange(blocks, dtype=torch.int32, device=device).unsqueeze(0)

    def attend(first: int, last: int, scratch: bool = True) -> torch.Tensor:
        chunk = Chunk(stored.k[first:last].contiguous(), stored.v[first:last].contiguous()) if scratch else None
        starts, context = (torch.tensor(n, dtype=torch.int32, device=device) for n in ([0, last - first], [last]))
        args = q[first:last].contiguous(), *planes, table, context
        return ragged_prefill_attention(*args, query_starts=starts, scale=0.1, chunk=chunk)

    whole = attend(0, length)
    context = torch.tensor([length], dtype=torch.int32, device=device)
    decoded = paged_decode_attention(q[-1:].contiguous(), *planes, table, context, scale=0.1)
    return {
        "a prompt in two chunks has the bits of one in one": torch.equal(
            torch.cat((attend(0, cut), attend(cut, length))), whole
        ),
        "a chunk read from blocks has the bits of one read from scratch": torch.equal(attend(0, length, False), whole),
        "a chunk of one has the bits of the row in its chunk": torch.equal(attend(length - 1, length), whole[-1:]),
        "a decode step has the bits of the row in its chunk": torch.equal(decoded, whole[-1:]),
    }
