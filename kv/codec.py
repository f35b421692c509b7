"""Encoding of keys and values as bytes, and decoding, in numpy. Knows no store, no model, no network.

Byte for byte equal to `kernels/reference.py` and `kernels/reference_codecs.py`, which define the same encoding for
device code. A *row* is the `width` numbers of one (token, head). Codecs:

* `FP8_E4M3`: one e4m3fn byte per number and one scale byte per row. The scale is a power of two, `2**(byte - 127)`: the
  smallest one with `amax <= 448 * scale`, clamped to bytes 11..246.
    - Payload: round to nearest even of `x / scale` (exact: a power of two).
    - Dequantised numbers are exact in bf16 and never subnormal there: non-zero magnitudes lie in
      `[2**-125, 448 * 2**119]`. Anything in float32's subnormal range rounds to zero, so the bytes do not depend on
      whether a device flushes subnormals.
    - Overflow: only rows whose amax exceeds `448 * 2**119` (1.75 * 2**127) reach the upper clamp; their numbers
      saturate at `448 * scale`. They never become infinite.
    - A row of zeros has byte 11. Zeros keep their sign.
    - Encoding a decoded row again never changes a value (its bytes may change once: a row whose amax was rounded down
      to exactly 224 takes the next smaller scale).
* `FP8_E5M2`: the same with e5m2 numbers: `amax <= 57344 * scale`, bytes 17..239, saturation at `57344 * scale`.
* `INT8`: one signed integer per number, -127..127, and a scale byte as above: `amax <= 127 * scale`, bytes 11..246,
  saturation at `127 * scale`; magnitudes above 2**127 count as 2**127. Dequantised numbers are exact in bf16, and
  encoding them again never changes a value.
* `INT8_CHANNEL` (keys only): as `INT8`, after each channel was divided by `2**exponent`. The exponents of a hash block
  and head are a function of the integers of its first token, the *anchor* (`channel_exponents`), whose own are 0. So
  channels have scales of their own without further bytes, and a token's bytes depend on its own prefix only.
* `BF16`: little-endian bfloat16, round to nearest even; finite numbers above the largest bf16 saturate there.
* `FP32`: little-endian float32, as it is.

Non-finite input (any codec): a row with a NaN or an infinity is counted in `Encoded.non_finite` and stored as zeros
(payload and scale byte 0, a scale that no other row has); the caller that stores it must fail the request.
"""

from __future__ import annotations

from enum import IntEnum
from functools import lru_cache
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from ..kernels.reference_codecs import NumberCode

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]
U32 = NDArray[np.uint32]

MIN_SCALE_BYTE = 11
MAX_SCALE_BYTE = 246
LARGEST_E4M3 = 0x7E  # 448
LARGEST_E5M2 = 0x7B  # 57344
LARGEST_INT8 = 127
ANCHOR_TOKENS = 16  # tokens that share the exponents of their channels: a hash block
_LARGEST_BF16 = np.uint32(0x7F7F)
_INFINITY_BITS = np.uint32(0x7F800000)


class Codec(IntEnum):
    """Storage format of a component's rows; the values are part of the wire format and never change."""

    FP8_E4M3 = 1
    BF16 = 2
    FP32 = 3
    FP8_E5M2 = 4
    INT8 = 5
    INT8_CHANNEL = 6


NUMBER_CODES: Final[dict[Codec, NumberCode]] = {
    Codec.FP8_E4M3: "e4m3",
    Codec.FP8_E5M2: "e5m2",
    Codec.INT8: "int8",
    Codec.INT8_CHANNEL: "int8_channel",
    Codec.BF16: "bf16",
    Codec.FP32: "fp32",
}
"""Names of the codecs in `kernels/`."""


class Encoded(NamedTuple):
    """Result of `encode`: bytes, and the number of rows with a NaN or an infinity (those are stored as zeros)."""

    payload: U8  # [..., width * payload bytes per number]
    scales: U8 | None  # [...], None where the codec has none
    non_finite: int


def payload_bytes(codec: Codec, width: int) -> int:
    """Payload bytes of one row of `width` numbers."""
    return width * {Codec.BF16: 2, Codec.FP32: 4}.get(codec, 1)


def scale_bytes(codec: Codec) -> int:
    """Scale bytes of one row: 1 where a number has one byte, otherwise 0."""
    return 0 if codec in (Codec.BF16, Codec.FP32) else 1


def encode(x: F32, codec: Codec) -> Encoded:
    """Encode rows `x` [..., width] float32; for INT8_CHANNEL [..., tokens, width] from the start of a hash block on."""
    x = np.ascontiguousarray(x, dtype=np.float32)
    bits = x.view(np.uint32)
    amax_bits = (bits & np.uint32(0x7FFFFFFF)).max(axis=-1)
    refused = amax_bits >= _INFINITY_BITS
    scales: U8 | None = None
    if codec is Codec.FP8_E4M3:
        scales = _scale_bytes_of(amax_bits, _E4M3_SCALE)
        payload = _encode_e4m3(x, scales)
    elif codec is Codec.FP8_E5M2:
        scales = _scale_bytes_of(amax_bits, _E5M2_SCALE)
        payload = _encode_e5m2(x, scales)
    elif codec is Codec.INT8:
        payload, scales = _encode_int8(x)
    elif codec is Codec.INT8_CHANNEL:
        payload, scales = _encode_by_channel(x, refused)
    elif codec is Codec.BF16:
        payload = _encode_bf16(bits).view(np.uint8)
    else:
        payload = x.astype("<f4").view(np.uint8)
    if refused.any():
        payload[refused] = 0
        if scales is not None:
            scales[refused] = 0
    return Encoded(payload, scales, int(np.count_nonzero(refused)))


def decode(payload: U8, scales: U8 | None, codec: Codec) -> F32:
    """Decode `payload` [..., row bytes] (and `scales` [...] where the codec has them) to float32 [..., width].

    INT8_CHANNEL: [..., tokens, row bytes] from the start of a hash block on.
    Damaged bytes are no error here, because the digest detects them: e4m3's NaN codes decode to NaN.

    Raises:
        ValueError: no scales, and the codec has them.
    """
    if scale_bytes(codec):
        if scales is None:
            raise ValueError(f"{codec.name} rows need their scale bytes; got scales=None")
        scale = (scales.astype(np.uint32) << np.uint32(23)).view(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            out: F32 = _numbers(payload, codec) * scale[..., None]
        return out
    if codec is Codec.BF16:
        words = np.ascontiguousarray(payload).view("<u2").astype(np.uint32)
        return (words << np.uint32(16)).view(np.float32)
    return np.ascontiguousarray(payload).view("<f4").astype(np.float32)


def transcode(payload: U8, scales: U8 | None, from_codec: Codec, to_codec: Codec) -> Encoded:
    """Translate rows of one codec to another. The same codec returns its arguments without a copy.

    From a codec of one byte to bf16 or fp32 and from bf16 to fp32 this is exact. A row that was not finite at the first
    encoding is zeros and stays zeros.
    """
    if from_codec is to_codec:
        return Encoded(payload, scales, 0)
    return encode(decode(payload, scales, from_codec), to_codec)


def channel_exponents(anchors: U8) -> NDArray[np.int32]:
    """Exponents 0..6 of the channels of a hash block, from the integers [..., width] of its anchor.

    A channel's magnitude is the larger one of itself and its partner half a row away, because rotary embedding turns
    such pairs. With `bits(n)` the number of significant bits of n, it gets `bits(magnitude) - level - 1`, at least 0;
    the level is the mean of `bits` over the row, rounded up. So only channels far above the others are divided.
    """
    magnitude = np.abs(anchors.view(np.int8).astype(np.int32))
    width = magnitude.shape[-1]
    partner = np.roll(magnitude, width // 2, axis=-1)
    level = (_significant_bits(magnitude).sum(axis=-1, keepdims=True) + width - 1) // width
    found: NDArray[np.int32] = np.maximum(_significant_bits(np.maximum(magnitude, partner)) - level - 1, 0)
    return found


def _significant_bits(magnitude: NDArray[np.int32]) -> NDArray[np.int32]:
    exponent: NDArray[np.int32] = np.frexp(magnitude.astype(np.float32))[1]
    return exponent


def _of_tokens(exponents: NDArray[np.int32], tokens: int) -> NDArray[np.int32]:
    """Exponents [..., tokens, width] of rows, from those of their hash blocks; an anchor's are 0."""
    spread = np.repeat(exponents, ANCHOR_TOKENS, axis=-2)[..., :tokens, :]
    spread[..., ::ANCHOR_TOKENS, :] = 0
    return spread


def _numbers(payload: U8, codec: Codec) -> F32:
    """Numbers of rows of one byte per number, before their scales."""
    if codec is Codec.FP8_E4M3:
        return _e4m3_values()[payload]
    if codec is Codec.FP8_E5M2:
        halves = (payload.astype(np.uint16) << np.uint16(8)).view(np.float16)
        return halves.astype(np.float32)
    numbers = np.ascontiguousarray(payload).view(np.int8).astype(np.float32)
    if codec is Codec.INT8:
        return numbers
    exponents = _of_tokens(channel_exponents(np.ascontiguousarray(payload[..., ::ANCHOR_TOKENS, :])), payload.shape[-2])
    scaled: F32 = np.ldexp(numbers, exponents)
    return scaled


class _Scale(NamedTuple):
    """Choice of a row's scale byte. The largest number is `mantissa` times a power of two."""

    exponent: int  # of the largest number
    above: int  # mantissa bits of float32 of the largest number
    least: int = MIN_SCALE_BYTE
    most: int = MAX_SCALE_BYTE


_E4M3_SCALE = _Scale(8, 0x600000)  # 448 = 1.75 * 2**8
_E5M2_SCALE = _Scale(15, 0x600000, 17, 239)  # 57344 = 1.75 * 2**15
_INT8_SCALE = _Scale(6, 0x7E0000)  # 127 = 1.984375 * 2**6


def _scale_bytes_of(amax_bits: U32, kind: _Scale) -> U8:
    """Smallest scale byte with `amax <= largest * 2**e`, from the bits of amax.

    e is the exponent of amax minus that of the largest number, and one more if the mantissa of amax is above its own.
    """
    exponent = (amax_bits >> np.uint32(23)).astype(np.int32)
    above = (amax_bits & np.uint32(0x7FFFFF)) > np.uint32(kind.above)
    return np.clip(exponent - kind.exponent + above, kind.least, kind.most).astype(np.uint8)


def _inverse(scales: U8) -> F32:
    return ((np.uint32(254) - scales.astype(np.uint32)) << np.uint32(23)).view(np.float32)[..., None]


def _encode_int8(x: F32) -> tuple[U8, U8]:
    """Round rows to integers and scale bytes; those of a non-finite row are undefined."""
    x = np.clip(x, -np.float32(2.0**127), np.float32(2.0**127))
    amax = np.ascontiguousarray(np.abs(x).max(axis=-1))
    scales = _scale_bytes_of(amax.view(np.uint32), _INT8_SCALE)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        code = np.clip(np.rint(x * _inverse(scales)), -LARGEST_INT8, LARGEST_INT8)
        return code.astype(np.int8).view(np.uint8), scales


def _encode_by_channel(x: F32, refused: NDArray[np.bool_]) -> tuple[U8, U8]:
    """`_encode_int8` after each channel was divided by its power of two. refused [..., tokens]: non-finite rows."""
    anchors, _ = _encode_int8(np.ascontiguousarray(x[..., ::ANCHOR_TOKENS, :]))
    anchors[refused[..., ::ANCHOR_TOKENS]] = 0
    exponents = _of_tokens(channel_exponents(anchors), x.shape[-2])
    x = np.clip(x, -np.float32(2.0**127), np.float32(2.0**127))
    with np.errstate(under="ignore", invalid="ignore"):
        return _encode_int8(np.ldexp(x, -exponents))


def _encode_e5m2(x: F32, scales: U8) -> U8:
    """Round `x / scale` to e5m2 by integer arithmetic; the bytes of a non-finite row are undefined."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        scaled = x * _inverse(scales)
        bits = scaled.view(np.uint32)
        magnitude = bits & np.uint32(0x7FFFFFFF)
        # Normal numbers: round 21 mantissa bits away, nearest even, and change the exponent bias from 127 to 15.
        normal = (
            (magnitude + np.uint32(0xFFFFF) + ((magnitude >> np.uint32(21)) & np.uint32(1))) >> np.uint32(21)
        ) - 448
        # Below 2**-14 the spacing is 2**-16, that of float32 at 2**7: adding 2**7 rounds; the low bits are the code.
        small = (np.abs(scaled) + np.float32(128)).view(np.uint32) & np.uint32(0xFF)
    code = np.where(magnitude < np.uint32(0x38800000), small, np.minimum(normal, np.uint32(LARGEST_E5M2)))
    signed: U8 = (code | ((bits >> np.uint32(24)) & np.uint32(0x80))).astype(np.uint8)
    return signed


def _encode_e4m3(x: F32, scales: U8) -> U8:
    """Round `x / scale` to e4m3fn by integer arithmetic; the bytes of a non-finite row are undefined."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        scaled = x * _inverse(scales)
        bits = scaled.view(np.uint32)
        magnitude = bits & np.uint32(0x7FFFFFFF)
        # Normal numbers: round 20 mantissa bits away, nearest even, and change the exponent bias from 127 to 7.
        normal = (
            (magnitude + np.uint32(0x7FFFF) + ((magnitude >> np.uint32(20)) & np.uint32(1))) >> np.uint32(20)
        ) - 960
        # Below 2**-6 the spacing is 2**-9, that of float32 at 2**14: adding 2**14 rounds; the low bits are the code.
        small = (np.abs(scaled) + np.float32(16384)).view(np.uint32) & np.uint32(0xFF)
    code = np.where(magnitude < np.uint32(0x3C800000), small, np.minimum(normal, np.uint32(LARGEST_E4M3)))
    signed: U8 = (code | ((bits >> np.uint32(24)) & np.uint32(0x80))).astype(np.uint8)
    return signed


def _encode_bf16(bits: U32) -> NDArray[np.uint16]:
    magnitude = bits & np.uint32(0x7FFFFFFF)
    with np.errstate(over="ignore"):
        rounded = (magnitude + np.uint32(0x7FFF) + ((magnitude >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    sign = (bits >> np.uint32(16)) & np.uint32(0x8000)
    signed: NDArray[np.uint16] = (np.minimum(rounded, _LARGEST_BF16) | sign).astype("<u2")
    return signed


@lru_cache(maxsize=1)
def _e4m3_values() -> F32:
    """The 256 values of e4m3fn; 0x7f and 0xff are NaN."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    value = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    value[(code & 0x7F) == 0x7F] = np.nan
    return np.where(code & 0x80, -value, value).astype(np.float32)
