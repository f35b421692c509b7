"""e5m2 and int8 arithmetic of the kernels. The definition is `reference_codecs.py`: `e5m2_encode`, `int8_encode`.

A kernel's CODE says what its planes hold: 0 bf16, 1 e4m3 (`e4m3.py`), 2 e5m2, 3 int8. Keys per channel have no kernel.
"""

# Triton has no types: its kernels are checked by their tests.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl

from ..reference import Planes

CODES = {"e4m3": 1, "e5m2": 2, "int8": 3}


@triton.jit
def encode_e5m2(x, amax_bits, refused):
    """Codes [rows, width] and scale bytes [rows] of float32 x; int32. Refused rows are zeros already."""
    byte = (amax_bits >> 23) - 15 + ((amax_bits & 0x7FFFFF) > 0x600000).to(tl.int32)
    byte = tl.where(refused, 0, tl.minimum(tl.maximum(byte, 17), 239))
    scaled = x * tl.broadcast_to(((254 - byte) << 23)[:, None], x.shape).to(tl.float32, bitcast=True)
    bits = scaled.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # Normal numbers: cut 21 mantissa bits, rounding to nearest even, and move the bias from 127 to 15.
    normal = ((magnitude + 0xFFFFF + ((magnitude >> 21) & 1)) >> 21) - 448
    # Below 2**-14 the step is 2**-16, the step of float32 at 2**7: the addition rounds, the low bits are the code.
    small = (magnitude.to(tl.float32, bitcast=True) + 128.0).to(tl.int32, bitcast=True) & 0xFF
    code = tl.where(magnitude < 0x38800000, small, tl.minimum(normal, 0x7B))
    return code | ((bits >> 24) & 0x80), byte


@triton.jit
def encode_int8(x, amax_bits, refused):
    """Codes 0..255 (two's complement) [rows, width] and scale bytes [rows] of float32 x; int32."""
    amax_bits = tl.minimum(amax_bits, 0x7F000000)  # magnitudes above 2**127 count as that
    byte = (amax_bits >> 23) - 6 + ((amax_bits & 0x7FFFFF) > 0x7E0000).to(tl.int32)
    byte = tl.where(refused, 0, tl.minimum(tl.maximum(byte, 11), 246))
    scaled = x * tl.broadcast_to(((254 - byte) << 23)[:, None], x.shape).to(tl.float32, bitcast=True)
    scaled = tl.minimum(tl.maximum(scaled, -127.0), 127.0)
    return (scaled + 12582912.0).to(tl.int32, bitcast=True) & 0xFF, byte  # the sum rounds to nearest even


@triton.jit
def e5m2_numbers(code):
    """The float32 numbers of int32 codes: the upper bytes of halves."""
    return (code << 8).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def int8_numbers(code):
    """The float32 numbers of int32 codes 0..255."""
    return ((code << 24) >> 24).to(tl.float32)


def code_of(planes: Planes) -> int:
    """CODE of planes."""
    return 0 if planes.scales is None else CODES[planes.byte_code]


def check_codes(k_planes: Planes, v_planes: Planes) -> None:
    """Check that a kernel has both codecs. Raises ValueError: it has not; names them."""
    for planes in (k_planes, v_planes):
        if planes.scales is not None and planes.byte_code not in CODES:
            raise ValueError(f"no kernel for planes of {planes.byte_code}; there are {', '.join(CODES)} and bf16")
    if code_of(k_planes) != code_of(v_planes):
        raise ValueError(f"k's planes hold {k_planes.code}, v's {v_planes.code}; codecs must agree")
