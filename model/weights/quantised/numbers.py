"""Numbers of few bits, out of words and bytes. Knows no matrix."""

from __future__ import annotations

import torch
from torch import Tensor

# Values of sign, two bits of exponent, one of mantissa. Source: OCP Microscaling Formats 1.0, table 5.
_HALF = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = torch.tensor([*_HALF, *(-value for value in _HALF)])
_WORD_BITS = 32
_BYTES = torch.arange(256, dtype=torch.uint8)
_FLOAT8 = {dtype: _BYTES.view(dtype).float() for dtype in (torch.float8_e4m3fn, torch.float8_e5m2)}
_POWERS = torch.cat((torch.exp2(torch.arange(-127.0, 128.0, dtype=torch.float64)).float(), torch.tensor([torch.nan])))


def floats(stored: Tensor, *, exponents: bool = False) -> Tensor:
    """Convert to float32, without rounding. `exponents`: bytes are powers of two, 2^(byte - 127); 255 is no number."""
    if stored.dtype == torch.float8_e8m0fnu or (exponents and stored.dtype == torch.uint8):
        return looked_up(_POWERS, stored.view(torch.uint8))
    if stored.dtype in _FLOAT8:
        return looked_up(_FLOAT8[stored.dtype], stored.view(torch.uint8))
    return stored.float()


def looked_up(table: Tensor, indices: Tensor) -> Tensor:
    """Values of a table [256 or fewer] at indices uint8 of any shape: float32. Several times faster than indexing."""
    return table.index_select(0, indices.flatten().int()).reshape(indices.shape)


def nibbles(stored: Tensor, *, high_first: bool) -> Tensor:
    """Both halves of each byte [..., n]: uint8 [..., 2 n]."""
    low, high = stored & 15, stored >> 4
    return torch.stack((high, low) if high_first else (low, high), -1).flatten(-2)


def unpacked(words: Tensor, bits: int, part: range) -> Tensor:
    """Unsigned numbers `part` of each row of int32 words [rows, words], lowest bits first: uint8 [rows, part]."""
    first, last = part.start * bits // _WORD_BITS, -(-part.stop * bits // _WORD_BITS)
    kept = words[:, first:last].clone(memory_format=torch.contiguous_format)  # bytes must be neighbours
    if 8 % bits:
        return _across_words(kept, bits, part, first)
    numbers = kept.view(torch.uint8)
    if bits < 8:
        pieces = [numbers >> shift for shift in range(0, 8, bits)]
        numbers = torch.stack(pieces, -1).flatten(1) & ((1 << bits) - 1)
    return numbers[:, part.start - first * _WORD_BITS // bits :][:, : len(part)]


def _across_words(kept: Tensor, bits: int, part: range, first: int) -> Tensor:
    """As `unpacked`, for widths of which a number may begin in one word and end in the next one."""
    wide = torch.nn.functional.pad(kept.long() & 0xFFFFFFFF, (0, 1))
    at = torch.arange(part.start, part.stop) * bits - first * _WORD_BITS
    word, shift = at // _WORD_BITS, at % _WORD_BITS
    pairs = wide[:, word] | (wide[:, word + 1] << _WORD_BITS)  # bits beyond 63 are lost: no number ends there
    return ((pairs >> shift) & ((1 << bits) - 1)).to(torch.uint8)


def of_groups(values: Tensor, size: int, part: range) -> Tensor:
    """Value of the group of `size` columns of each column in `part`: [rows, groups] to [rows, part].

    If one group has all columns of the part, [rows, 1], which broadcasts.
    """
    first, last = part.start // size, -(-part.stop // size)
    kept = values[:, first:last]
    if last - first == 1:
        return kept
    spread = kept.unsqueeze(2).expand(-1, -1, size).flatten(1)
    return spread[:, part.start - first * size :][:, : len(part)]
