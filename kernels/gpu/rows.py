"""Encoding, writing and digesting of rows of keys and values, shared by `store_kv.py` and `rotary_store.py`.

Mathematics: `reference.py: fp8_encode` and `reference_kv.py: row_digests`; bytes and digests equal the definitions'.
Knows planes of one byte per number (byte_codes.py) and of bf16.
"""

# Triton has no types: its kernels are checked by their tests.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import Planes
from .byte_codes import check_codes, e5m2_numbers, encode_e5m2, encode_int8, int8_numbers
from .e4m3 import bf16_bits, decode_e4m3_by_256, encode_e4m3, scale_byte_of, scale_of, scale_times_256

_LARGEST_BF16 = tl.constexpr(3.3895313892515355e38)


@triton.jit
def encode_rows(x, CODE: tl.constexpr):
    """Codes [rows, width], scale bytes [rows] (0 for bf16), decoded numbers, and a mask of rows that are not finite.

    x float32 [rows, width]; codes and bytes are int32. CODE: see `byte_codes.py`.
    """
    amax_bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    refused = amax_bits >= 0x7F800000
    x = tl.where(refused[:, None], 0.0, x)
    if CODE == 2:
        code, byte = encode_e5m2(x, amax_bits, refused)
        rounded = e5m2_numbers(code) * scale_of(byte)[:, None]
    elif CODE == 3:
        code, byte = encode_int8(x, amax_bits, refused)
        rounded = int8_numbers(code) * scale_of(byte)[:, None]
    elif CODE:
        byte = tl.where(refused, 0, scale_byte_of(amax_bits))
        code = encode_e4m3(x, tl.broadcast_to(byte[:, None], x.shape))
        rounded = decode_e4m3_by_256(code) * scale_times_256(byte)[:, None]
    else:
        byte = tl.zeros_like(amax_bits)
        code = bf16_bits(tl.minimum(tl.maximum(x, -_LARGEST_BF16), _LARGEST_BF16))
        rounded = (code << 16).to(tl.float32, bitcast=True)
    return code, byte, rounded, refused


@triton.jit
def write_rows(  # noqa: PLR0917
    code, byte, payload_ptr, scales_ptr, slot, head, column,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_TOKENS: tl.constexpr, CODE: tl.constexpr,
):  # fmt: skip
    """Write one token's rows [heads, width] to its slot; a negative slot is padding."""
    slots = slot + tl.zeros_like(head)
    row = ((slots // BLOCK_TOKENS) * HEADS + head) * BLOCK_TOKENS + slots % BLOCK_TOKENS
    written = (slots >= 0) & (head < HEADS)
    target = payload_ptr + row[:, None] * WIDTH + column[None, :]
    tl.store(target, code.to(payload_ptr.dtype.element_ty), mask=written[:, None] & (column < WIDTH)[None, :])
    if CODE:
        tl.store(scales_ptr + row, byte.to(tl.uint8), mask=written)


@triton.jit
def _mix(x):
    """The finaliser of splitmix64, a bijection of uint64. Source: Steele, Lea and Flood 2014."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def digest_rows(  # noqa: PLR0917
    code, byte, position, layer, component, head, word_keys_ptr, scale_keys_ptr, seeds_ptr,
    WORDS: tl.constexpr, ROWS: tl.constexpr, WIDTH_PADDED: tl.constexpr, CODE: tl.constexpr,
):  # fmt: skip
    """Terms of one token's rows in the digest of its hash block; uint64 [rows]. head: counted in the whole model."""
    PER_WORD: tl.constexpr = 4 if CODE else 2
    parts = tl.reshape(code, (ROWS, WIDTH_PADDED // PER_WORD, PER_WORD))
    shift = tl.arange(0, PER_WORD) * (32 // PER_WORD)
    words = tl.sum(parts << shift[None, None, :], axis=2).to(tl.uint32, bitcast=True).to(tl.uint64)  # [rows, words]
    token = position % 16
    word = tl.arange(0, WIDTH_PADDED // PER_WORD)
    keys = tl.load(word_keys_ptr + token * WORDS + word, mask=word < WORDS, other=0).to(tl.uint64, bitcast=True)
    units = tl.sum(words * keys[None, :], axis=1)
    if CODE:
        units += byte.to(tl.uint64) * tl.load(scale_keys_ptr + token).to(tl.uint64, bitcast=True)
    place = (layer.to(tl.int64) << 48) | (component.to(tl.int64) << 40) | (position // 16)
    places = (place | (head.to(tl.int64) << 24)).to(tl.uint64, bitcast=True)
    multiplier = _mix(places ^ tl.load(seeds_ptr).to(tl.uint64, bitcast=True)) | 1
    addend = _mix(places ^ tl.load(seeds_ptr + 1).to(tl.uint64, bitcast=True)) | 1
    return units * multiplier + addend


def numbers_of(planes: Planes) -> Tensor:
    """The payload as one number per element: uint8 codes of CODE, int16 bits of bf16."""
    return planes.payload if planes.scales is not None else planes.payload.view(torch.int16)


def check_rows(k: Tensor, v: Tensor, slots: Tensor, k_planes: Planes, v_planes: Planes) -> None:
    """Check the arguments that all kernels which store rows share.

    Raises:
        ValueError: names the argument and the requirement.
    """
    tokens = k.shape[0]
    if v.shape != k.shape or v.dtype != k.dtype or k.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"k is {k.dtype} {tuple(k.shape)}, v {v.dtype} {tuple(v.shape)}; must agree, bf16 or float32")
    if k.stride(-1) != 1 or v.stride(-1) != 1:
        raise ValueError(f"the last axis must be dense; strides are {k.stride()} and {v.stride()}")
    if slots.shape != (tokens,) or slots.dtype != torch.int64 or not slots.is_contiguous():
        raise ValueError(f"slots is {slots.dtype} {tuple(slots.shape)}; must be contiguous int64 ({tokens},)")
    for planes in (k_planes, v_planes):
        _check_planes(planes, k.shape[1], k.shape[2])
    check_codes(k_planes, v_planes)
    if k_planes.block_tokens != v_planes.block_tokens or (k_planes.scales is None) != (v_planes.scales is None):
        raise ValueError(
            f"k's blocks hold {k_planes.block_tokens} tokens, v's {v_planes.block_tokens}; these and codecs must agree"
        )


def _check_planes(planes: Planes, heads: int, width: int) -> None:
    num_blocks, plane_heads, block_tokens, row_bytes = planes.payload.shape
    if row_bytes != (2 * width if planes.scales is None else width):
        raise ValueError(f"this kernel stores FP8 or bf16 rows of {width}; the planes hold {row_bytes} bytes per row")
    if plane_heads != heads:
        raise ValueError(f"planes {tuple(planes.payload.shape)} do not fit rows of {heads} heads")
    if planes.scales is not None and planes.scales.shape != (num_blocks, heads, block_tokens):
        raise ValueError(f"scales {tuple(planes.scales.shape)} do not fit the payload {tuple(planes.payload.shape)}")
    if not planes.payload.is_contiguous() or not (planes.scales is None or planes.scales.is_contiguous()):
        raise ValueError("the planes must be contiguous")
