"""FP8 and bf16 arithmetic of the kernels, in integers. The definition is `reference.py: fp8_encode`.

Integers, because sm_80 and gfx942 have no cast to this format and the interpreter's cast loses a carry. Division and
logarithm are not needed: a power of two is an exponent field. Attention decodes the most numbers and uses the GPU's
instruction where it exists (`cast_e4m3`).
"""

# Triton has no types: its kernels are checked by their tests.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl


@triton.jit
def scale_byte_of(amax_bits):
    """The scale byte of a row from the bits of its largest magnitude; int32."""
    above = ((amax_bits & 0x7FFFFF) > 0x600000).to(tl.int32)
    byte = (amax_bits >> 23) - 8 + above
    return tl.minimum(tl.maximum(byte, 11), 246)


@triton.jit
def encode_e4m3(x, scale_byte):
    """The int32 codes of float32 x under a scale byte of x's shape; x finite."""
    scaled = x * ((254 - scale_byte) << 23).to(tl.float32, bitcast=True)
    bits = scaled.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # Normal numbers: cut 20 mantissa bits, rounding to nearest even, and move the bias from 127 to 7.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - 960
    # Below 2**-6 the step is 2**-9, the step of float32 at 2**14: the addition rounds, the low bits are the code.
    small = (magnitude.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) & 0xFF
    code = tl.where(magnitude < 0x3C800000, small, tl.minimum(normal, 0x7E))
    return code | ((bits >> 24) & 0x80)


@triton.jit
def decode_e4m3_by_256(code):
    """The float32 value of int32 codes, divided by 256: their bits are those of a half under another bias.

    Halves keep their subnormals on every target. `scale_times_256` compensates the factor. The codes 0x7f and 0xff,
    which the encoder never writes, decode to 480 and -480.
    """
    half = ((code & 0x80) << 8) | ((code & 0x7F) << 7)
    return half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def scale_times_256(scale_byte):
    """The float32 scale of int32 scale bytes 0..246, times 256."""
    return ((scale_byte + 8) << 23).to(tl.float32, bitcast=True)


_CAST_FOUR = tl.constexpr("""
{
    .reg .b16 codes<2>, half<4>;
    .reg .b32 halves<2>;
    .reg .f32 number<4>;
    mov.b32 {codes0, codes1}, $2;
    cvt.rn.f16x2.e4m3x2 halves0, codes0;
    cvt.rn.f16x2.e4m3x2 halves1, codes1;
    mov.b32 {half0, half1}, halves0;
    mov.b32 {half2, half3}, halves1;
    cvt.f32.f16 number0, half0;
    cvt.f32.f16 number1, half1;
    cvt.f32.f16 number2, half2;
    cvt.f32.f16 number3, half3;
    cvt.rn.bf16x2.f32 $0, number1, number0;
    cvt.rn.bf16x2.f32 $1, number3, number2;
}
""")


@triton.jit
def cast_e4m3(code):
    """The bf16 numbers of uint8 codes, undivided, by the instruction of sm_89 and later; 0x7f and 0xff are NaN.

    In assembly and marked impure, because the compiler's own code is slow: it decodes byte by byte, after the
    conversion to the layout of a dot operand, and converts half to bf16 on a unit of an eighth of the throughput.
    """
    return tl.inline_asm_elementwise(_CAST_FOUR, "=r,=r,r", [code], dtype=tl.bfloat16, is_pure=False, pack=4)


@triton.jit
def scale_of(scale_byte):
    """The float32 scale of int32 scale bytes 1..246; byte 0, whose row is zeros, gives 0."""
    return (scale_byte << 23).to(tl.float32, bitcast=True)


@triton.jit
def bf16_bits(x):
    """The int32 bits of float32 x rounded to bf16, to nearest even; x not NaN. The interpreter's own cast truncates."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """float32 x, rounded to `dtype` (bf16 or float32)."""
    if dtype == tl.bfloat16:
        is_number = (x.to(tl.int32, bitcast=True) & 0x7FFFFFFF) <= 0x7F800000
        x = tl.where(is_number, (bf16_bits(x) << 16).to(tl.float32, bitcast=True), x)
    return x
