"""What may happen to stored blocks besides attention: copies of head ranges, and their digests. Plain torch.

The terms are those of `reference.py`. The digest is defined, with its reasons, in `kv/digest.py`, which must give the
same numbers; here it takes its keys and places as tensors.
"""

import torch
from torch import Tensor

from .reference import Planes


def gather_blocks(planes: Planes, blocks: Tensor, first_head: int, last_head: int) -> Planes:
    """Copies of `blocks` [n] int64, heads first_head..last_head - 1, in that order."""
    heads = slice(first_head, last_head)
    return Planes(planes.payload[blocks, heads], None if planes.scales is None else planes.scales[blocks, heads])


def scatter_blocks(planes: Planes, blocks: Tensor, first_head: int, source: Planes) -> None:
    """Write `source`, as `gather_blocks` gives it, into `blocks` from `first_head` on.

    Raises:
        ValueError: `source` has another codec, row size or block size. Nothing was written.
    """
    if (planes.scales is None) != (source.scales is None) or planes.payload.shape[2:] != source.payload.shape[2:]:
        raise ValueError(
            f"the source's blocks are {tuple(source.payload.shape[2:])}, scales {source.scales is not None}; "
            f"the store's are {tuple(planes.payload.shape[2:])}, scales {planes.scales is not None}"
        )
    heads = slice(first_head, first_head + source.payload.shape[1])
    planes.payload[blocks, heads] = source.payload
    if planes.scales is not None and source.scales is not None:
        planes.scales[blocks, heads] = source.scales


def unit_digests(blocks: Planes, word_keys: Tensor, scale_keys: Tensor, multipliers: Tensor, addends: Tensor) -> Tensor:
    """Digests of whole or partial hash blocks; int64 [...] that holds the uint64 of `kv/digest.py`, modulo 2**64.

    blocks: payload uint8 [..., tokens, row_bytes] with row_bytes a multiple of 4, scales [..., tokens] or None;
    word_keys int64 [tokens, row_bytes / 4]; scale_keys int64 [tokens]; multipliers and addends int64, of the leading
    shape.
    """
    words = blocks.payload.contiguous().view(torch.int32).long() & 0xFFFFFFFF
    units = (words * word_keys).sum(dim=(-1, -2))
    if blocks.scales is not None:
        units = units + (blocks.scales.long() * scale_keys).sum(-1)
    return units * multipliers + addends * blocks.payload.shape[-2]
