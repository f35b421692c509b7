"""Definitions of the one-byte codecs beside e4m3: e5m2, int8, and int8 with a scale per channel. Plain torch.

The terms are those of `reference.py`; `kv/codec.py` says what each codec keeps, and encodes the same bytes in numpy.

`int8_channel` is for keys. Some channels of keys are larger than the others by an order of magnitude, at all tokens
alike, and then one scale per token leaves few levels to the other channels. So a channel has a scale of its own per
block of 16 tokens. Source: KIVI (Liu et al. 2024), which quantises keys per channel and values per token. KIVI keeps
the newest tokens unrounded until their group is full; here a row is written once, and its bytes depend on its own
prefix alone. So the first token of a block, its *anchor*, is stored as int8, and its integers decide the powers of two
by which the channels of the other fifteen are divided; the scale per token covers what the anchor did not foresee.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

ByteCode = Literal["e4m3", "e5m2", "int8", "int8_channel"]
NumberCode = Literal["e4m3", "e5m2", "int8", "int8_channel", "bf16", "fp32"]

ANCHOR_TOKENS = 16
LARGEST_INT8 = 127
LARGEST_E5M2 = 0x7B  # 57344
_LARGEST_COUNTED = 2.0**127  # larger magnitudes count as this: their decoded numbers would be infinite


class Encoded(NamedTuple):
    """Encoded rows."""

    payload: Tensor  # uint8 [..., width]
    scales: Tensor  # uint8 [...]
    non_finite: Tensor  # bool [...]: rows with a NaN or an infinity, which are zeros with scale byte 0


def e5m2_encode(x: Tensor) -> Encoded:
    """Encode rows x [..., width] as e5m2 with one power-of-two scale each.

    The scale is `2**(byte - 127)`, the smallest power of two with `amax <= 57344 * scale`, clamped to bytes 17..239.
    The payload is `x / scale`, exact, rounded to nearest even in integers and saturated at 57344. Decoded numbers are
    exact in bf16 and never subnormal there. The rest as in `reference.fp8_encode`.
    """
    wide = x.float()
    amax_bits = (wide.view(torch.int32) & 0x7FFFFFFF).amax(-1)
    non_finite = amax_bits >= 0x7F800000
    # 57344 is 1.75 * 2**15: the exponent of amax less 15, one more where its mantissa is above 1.75.
    byte = ((amax_bits >> 23) - 15 + ((amax_bits & 0x7FFFFF) > 0x600000).int()).clamp(17, 239)
    scaled = wide * _inverse(byte)
    bits = scaled.view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    # Normal numbers: cut 21 mantissa bits, rounding to nearest even, and move the bias from 127 to 15.
    normal = (((magnitude + 0xFFFFF + ((magnitude >> 21) & 1)) >> 21) - 448).clamp(max=LARGEST_E5M2)
    # Below 2**-14 the step is 2**-16, the step of float32 at 2**7: the addition rounds, the low bits are the code.
    small = (scaled.abs() + 128.0).view(torch.int32) & 0xFF
    code = torch.where(magnitude < 0x38800000, small, normal) | ((bits >> 24) & 0x80)
    return _without(code, byte, non_finite)


def int8_encode(x: Tensor, exponents: Tensor | None = None) -> Encoded:
    """Encode rows x [..., width] as integers -127..127 with one power-of-two scale each.

    `exponents` int32 [..., width]: numbers are divided by their powers of two before. The scale is `2**(byte - 127)`,
    the smallest power of two with `amax <= 127 * scale`, clamped to bytes 11..246. The payload is `x / scale`, rounded
    to nearest even and saturated at 127. Magnitudes above 2**127 count as 2**127. Decoded numbers are exact in bf16.
    A row of zeros has byte 11; a row with a NaN or an infinity is zeros, scale byte 0.
    """
    wide = x.float()
    non_finite = ~torch.isfinite(wide).all(-1)
    wide = wide.clamp(-_LARGEST_COUNTED, _LARGEST_COUNTED)
    if exponents is not None:
        wide = wide * power_of_two(-exponents)
    amax_bits = wide.abs().amax(-1).view(torch.int32)
    # 127 is 1.984375 * 2**6: the exponent of amax less 6, one more where its mantissa is above 1.984375.
    byte = ((amax_bits >> 23) - 6 + ((amax_bits & 0x7FFFFF) > 0x7E0000).int()).clamp(11, 246)
    code = (wide * _inverse(byte)).masked_fill(non_finite.unsqueeze(-1), 0.0)
    return _without(torch.round(code).clamp(-LARGEST_INT8, LARGEST_INT8).int() & 0xFF, byte, non_finite)


def channel_exponents(anchors: Tensor) -> Tensor:
    """Exponents 0..6, int32 [..., width], of the channels of blocks whose anchors are uint8 [..., width].

    A channel's magnitude is the larger one of itself and its partner half a row away, because rotary embedding turns
    such pairs: either may be near zero at one token. With bits(n) the number of significant bits of n, a channel gets
    bits(magnitude) - level - 1, at least 0; the level is the mean of bits over the row, rounded up. So only channels
    far above the others are divided, and in rows without such channels none is.
    """
    magnitude = anchors.contiguous().view(torch.int8).int().abs()
    width = magnitude.shape[-1]
    level = (_significant_bits(magnitude).sum(-1, keepdim=True) + width - 1) // width
    largest = torch.maximum(magnitude, magnitude.roll(width // 2, -1))
    return (_significant_bits(largest) - level - 1).clamp(min=0).int()


def channel_encode(x: Tensor, blocks: Tensor, offsets: Tensor, payload: Tensor) -> tuple[Encoded, Tensor]:
    """Encode keys x [rows, heads, width] that go to tokens `offsets` of `blocks` (int64 [rows]) of a payload plane.

    payload uint8 [num_blocks, heads, block_tokens, width]: rows of anchors are written, those of earlier steps read.
    Returns the rows and their exponents int32 [rows, heads, width]; an anchor's are 0.
    """
    is_anchor = offsets % ANCHOR_TOKENS == 0
    payload[blocks[is_anchor], :, offsets[is_anchor]] = int8_encode(x[is_anchor]).payload
    anchors = payload[blocks, :, offsets - offsets % ANCHOR_TOKENS]
    exponents = channel_exponents(anchors).masked_fill(is_anchor.view(-1, 1, 1), 0)
    return int8_encode(x, exponents), exponents


def byte_numbers(payload: Tensor, code: ByteCode) -> Tensor:
    """Numbers, before their scales, of payload uint8 [..., width], as float32.

    "int8_channel": payload [..., tokens, width], whole blocks of 16 tokens.
    """
    if code == "e4m3":
        return payload.view(torch.float8_e4m3fn).float()
    if code == "e5m2":
        return payload.view(torch.float8_e5m2).float()
    numbers = payload.view(torch.int8).float()
    if code == "int8":
        return numbers
    *lead, tokens, width = payload.shape
    assert tokens % ANCHOR_TOKENS == 0, f"{tokens} tokens are no whole blocks"
    groups = (*lead, tokens // ANCHOR_TOKENS, ANCHOR_TOKENS, width)
    factors = power_of_two(channel_exponents(payload.reshape(groups)[..., :1, :])).expand(groups).clone()
    factors[..., 0, :] = 1.0
    return numbers * factors.reshape(payload.shape)


def power_of_two(exponents: Tensor) -> Tensor:
    """2**exponents as float32; exponents int32 within -126..127."""
    return ((exponents + 127) << 23).view(torch.float32)


def _significant_bits(magnitude: Tensor) -> Tensor:
    """The exponent of the float32 of a number from 0 to 2**24, plus 1; 0 for 0."""
    return ((magnitude.float().view(torch.int32) >> 23) - 126).clamp(min=0)


def _inverse(byte: Tensor) -> Tensor:
    return ((254 - byte) << 23).view(torch.float32).unsqueeze(-1)


def _without(code: Tensor, byte: Tensor, non_finite: Tensor) -> Encoded:
    """Rows as bytes; non-finite ones become zeros."""
    payload = code.masked_fill(non_finite.unsqueeze(-1), 0).to(torch.uint8)
    return Encoded(payload, byte.masked_fill(non_finite, 0).to(torch.uint8), non_finite)
