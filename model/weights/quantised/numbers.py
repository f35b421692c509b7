"""Numbers of few bits, out of words and bytes. Knows no matrix."""

from __future__ import annotations

import torch
from torch import Tensor

# Values of sign, two bits of exponent, one of mantissa. Source: OCP Microscaling Formats 1.0, table 5.
_HALF = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = torch.tensor([*_HALF, *(-value for value in _HALF)])
_WORD_BITS = 32


def floats(stored: Tensor, *, exponents: bool = False) -> Tensor:
    """Convert to float32, without rounding. `exponents`: bytes are powers of two, 2^(byte - 127); 255 is no number."""
    if stored.dtype == torch.float8_e8m0fnu:
        stored, exponents = stored.view(torch.uint8), True
    if exponents and stored.dtype == torch.uint8:
        powers = torch.exp2(torch.arange(-127, 128, dtype=torch.float64)).float()
        return torch.cat((powers, powers.new_full((1,), torch.nan)))[stored.long()]
    return stored.float()


def nibbles(stored: Tensor, *, high_first: bool) -> Tensor:
    """Both halves of each byte [..., n], as indices: int64 [..., 2 n]."""
    low, high = stored & 15, stored >> 4
    pair = (high, low) if high_first else (low, high)
    return torch.stack(pair, -1).flatten(-2).long()


def unpacked(words: Tensor, bits: int, part: range) -> Tensor:
    """Unsigned numbers `part` of each row of int32 words [rows, words], lowest bits first: int32 [rows, part].

    A number may begin in one word and end in the next one.
    """
    first, last = part.start * bits // _WORD_BITS, -(-part.stop * bits // _WORD_BITS)
    kept = words[:, first:last].long() & 0xFFFFFFFF
    kept = torch.nn.functional.pad(kept, (0, 1))
    at = torch.arange(part.start, part.stop) * bits - first * _WORD_BITS
    word, shift = at // _WORD_BITS, at % _WORD_BITS
    pairs = kept[:, word] | (
        kept[:, word + 1] << _WORD_BITS
    )  # bits beyond 63 are lost, and not needed: shift + bits <= 40
    return ((pairs >> shift) & ((1 << bits) - 1)).int()
