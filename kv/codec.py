"""Encoding of keys and values as bytes, and decoding, in numpy. Knows no store, no model, no network.

Byte for byte equal to `kernels/reference.py`, which defines the same encoding for device code. A *row* is the `width`
numbers of one (token, head). Codecs:

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
* `BF16`: little-endian bfloat16, round to nearest even; finite numbers above the largest bf16 saturate there.
* `FP32`: little-endian float32, as it is.

Non-finite input (any codec): a row with a NaN or an infinity is counted in `Encoded.non_finite` and stored as zeros
(payload and scale byte 0, a scale that no other row has); the caller that stores it must fail the request.
"""

from enum import IntEnum
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]
U32 = NDArray[np.uint32]

MIN_SCALE_BYTE = 11
MAX_SCALE_BYTE = 246
LARGEST_E4M3 = 0x7E  # 448
_LARGEST_BF16 = np.uint32(0x7F7F)
_INFINITY_BITS = np.uint32(0x7F800000)


class Codec(IntEnum):
    """Storage format of a component's rows; the values are part of the wire format and never change."""

    FP8_E4M3 = 1
    BF16 = 2
    FP32 = 3


class Encoded(NamedTuple):
    """Result of `encode`: bytes, and the number of rows with a NaN or an infinity (those are stored as zeros)."""

    payload: U8  # [..., width * payload bytes per number]
    scales: U8 | None  # [...], None where the codec has none
    non_finite: int


def payload_bytes(codec: Codec, width: int) -> int:
    """Payload bytes of one row of `width` numbers."""
    return width * {Codec.FP8_E4M3: 1, Codec.BF16: 2, Codec.FP32: 4}[codec]


def scale_bytes(codec: Codec) -> int:
    """Scale bytes of one row: 1 for fp8, otherwise 0."""
    return 1 if codec is Codec.FP8_E4M3 else 0


def encode(x: F32, codec: Codec) -> Encoded:
    """Encode rows `x` [..., width] float32."""
    x = np.ascontiguousarray(x, dtype=np.float32)
    bits = x.view(np.uint32)
    amax_bits = (bits & np.uint32(0x7FFFFFFF)).max(axis=-1)
    refused = amax_bits >= _INFINITY_BITS
    scales: U8 | None = None
    if codec is Codec.FP8_E4M3:
        scales = _scale_bytes_of(amax_bits)
        payload = _encode_e4m3(x, scales)
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

    Damaged bytes are no error here, because the digest detects them: e4m3's NaN codes decode to NaN.

    Raises:
        ValueError: fp8 without scales.
    """
    if codec is Codec.FP8_E4M3:
        if scales is None:
            raise ValueError("fp8 rows need their scale bytes; got scales=None")
        scale = (scales.astype(np.uint32) << np.uint32(23)).view(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            out: F32 = _e4m3_values()[payload] * scale[..., None]
        return out
    if codec is Codec.BF16:
        words = np.ascontiguousarray(payload).view("<u2").astype(np.uint32)
        return (words << np.uint32(16)).view(np.float32)
    return np.ascontiguousarray(payload).view("<f4").astype(np.float32)


def transcode(payload: U8, scales: U8 | None, from_codec: Codec, to_codec: Codec) -> Encoded:
    """Translate rows of one codec to another. The same codec returns its arguments without a copy.

    From fp8 to bf16 or fp32 and from bf16 to fp32 this is exact. A row that was not finite at the first encoding is
    zeros and stays zeros.
    """
    if from_codec is to_codec:
        return Encoded(payload, scales, 0)
    return encode(decode(payload, scales, from_codec), to_codec)


def _scale_bytes_of(amax_bits: U32) -> U8:
    """Smallest scale byte with `amax <= 448 * 2**e`, from the bits of amax.

    448 is 1.75 * 2**8, so e is the exponent of amax minus 8, and one more if its mantissa is above 1.75.
    """
    exponent = (amax_bits >> np.uint32(23)).astype(np.int32)
    above = (amax_bits & np.uint32(0x7FFFFF)) > np.uint32(0x600000)
    return np.clip(exponent - 8 + above, MIN_SCALE_BYTE, MAX_SCALE_BYTE).astype(np.uint8)


def _encode_e4m3(x: F32, scales: U8) -> U8:
    """Round `x / scale` to e4m3fn by integer arithmetic; the bytes of a non-finite row are undefined."""
    inverse = ((np.uint32(254) - scales.astype(np.uint32)) << np.uint32(23)).view(np.float32)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        scaled = x * inverse[..., None]
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
