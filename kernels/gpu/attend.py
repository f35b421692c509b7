"""Arithmetic shared by both attention kernels: one tile of keys and values added to a running softmax.

Decode and prefill take keys in tiles of 64 absolute positions, in splits of 256 that have a running maximum each, and
combine the splits in order. So both sum in one order, which does not depend on batch, chunk or table length.
Source: online softmax, Milakov and Gimelshein 2018; FlashAttention, Dao et al. 2022.
Knows planes of one byte per number (byte_codes.py) and of bf16.
"""

# Triton has no types: its kernels are checked by their tests.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import Planes
from .byte_codes import check_codes, e5m2_numbers
from .e4m3 import cast_e4m3, decode_e4m3_by_256, scale_of, scale_times_256

SPLIT_TOKENS = 256
TILE_TOKENS = 64
_LOG2_E = math.log2(math.e)


@triton.jit
def load_stored(  # noqa: PLR0917
    payload_ptr, scales_ptr, row, column, seen, WIDTH: tl.constexpr, CODE: tl.constexpr, CASTS: tl.constexpr
):
    """Load rows of the store: exact bf16 numbers [tokens, width], and their float32 power-of-two scales [tokens].

    CODE: see `byte_codes.py`. CASTS: the GPU decodes e4m3 by an instruction; without it, e4m3 numbers are divided and
    scales multiplied by 256.
    """
    numbers = payload_ptr + row[:, None].to(tl.int64) * WIDTH + column[None, :]
    real = seen[:, None] & (column < WIDTH)[None, :]
    if CODE:
        code = tl.load(numbers, mask=real, other=0)
        byte = tl.load(scales_ptr + row, mask=seen, other=0).to(tl.int32)
        if CODE == 2:
            return e5m2_numbers(code.to(tl.int32)).to(tl.bfloat16), scale_of(byte)
        elif CODE == 3:  # noqa: RET505
            return code.to(tl.int8, bitcast=True).to(tl.float32).to(tl.bfloat16), scale_of(byte)
        elif CASTS:
            return cast_e4m3(code), scale_of(byte)
        else:
            return decode_e4m3_by_256(code.to(tl.int32)).to(tl.bfloat16), scale_times_256(byte)
    else:
        return tl.load(numbers, mask=real, other=0.0), tl.full(row.shape, 1.0, tl.float32)


@triton.jit
def load_scaled(  # noqa: PLR0917
    payload_ptr, scales_ptr, row, column, seen, WIDTH: tl.constexpr, CODE: tl.constexpr, CASTS: tl.constexpr
):
    """Load rows of the store multiplied by their scales: exact in bf16, and equal to the store kernel's scratch."""
    numbers, scale = load_stored(payload_ptr, scales_ptr, row, column, seen, WIDTH, CODE, CASTS)
    if CODE:
        numbers = (numbers.to(tl.float32) * scale[:, None]).to(tl.bfloat16)
    return numbers


@triton.jit
def _operand(x, INTERPRETED: tl.constexpr):
    """x as an operand of `tl.dot`. The interpreter would multiply bit patterns of bf16, so there x becomes float32."""
    if INTERPRETED:
        return x.to(tl.float32)
    else:  # noqa: RET505 - the compiler wants both returns at one depth
        return x


@triton.jit
def _tanh(x):
    decay = tl.exp2(-2.885390081777927 * tl.abs(x))  # exp(-2 * |x|)
    positive = (1.0 - decay) / (1.0 + decay)
    return tl.where(x < 0, -positive, positive)


@triton.jit
def weigh_keys(  # noqa: PLR0917
    q, k, k_scale, seen, top, total, out, score_scale, cap,
    MASKED: tl.constexpr, CAPPED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Weights [rows, tokens] of the next tile, and the running maximum, sum and values rescaled to the new maximum.

    q [rows, width]; k [tokens, width] bf16 with scales [tokens]; seen [rows, tokens], used only if MASKED. Scores are
    in base 2: `score_scale` times the product, or `cap * tanh` of that. A tile of which a row sees no key does not
    change the row's bits.
    """
    k = tl.trans(_operand(k.to(q.dtype), INTERPRETED))
    scores = tl.dot(_operand(q, INTERPRETED), k, input_precision="ieee") * k_scale[None, :] * score_scale
    if CAPPED:
        scores = cap * _tanh(scores)
    if MASKED:
        scores = tl.where(seen, scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, axis=1))
    base = tl.where(higher == float("-inf"), 0.0, higher)  # no key seen yet
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(top - base)
    return weights, higher, total * shrink + tl.sum(weights, axis=1), out * shrink[:, None]


@triton.jit
def add_values(weights, v, v_scale, out, PRECISE: tl.constexpr, INTERPRETED: tl.constexpr):  # noqa: PLR0917
    """`out` plus the weighted values of the tile; v [tokens, width] bf16 with scales [tokens]."""
    weights = weights * v_scale[None, :]
    v = _operand(v, INTERPRETED)
    coarse = weights.to(tl.bfloat16)
    if PRECISE:
        # The relative error of a bf16 weight is 2**-9. Adding its remainder in bf16 reduces it to 2**-17; v is exact.
        fine = (weights - coarse.to(tl.float32)).to(tl.bfloat16)
        out = tl.dot(_operand(fine, INTERPRETED), v, out, input_precision="ieee")
    return tl.dot(_operand(coarse, INTERPRETED), v, out, input_precision="ieee")


@triton.jit
def add_sinks(sinks_ptr, head, real, top, total, out):  # noqa: PLR0917
    """Running sum [rows] and values [rows, width] with the sinks of `head` [rows]: one more score without a value.

    Called last, when a row's splits are combined. The maximum `top` is in base 2 and may be -inf.
    """
    sink = tl.load(sinks_ptr + head, mask=real, other=0.0) * 1.4426950408889634  # log2(e)
    higher = tl.maximum(top, sink)
    shrink = tl.exp2(top - higher)
    return total * shrink + tl.exp2(sink - higher), out * shrink[:, None]


def score_factors(scale: float, softcap: float | None) -> tuple[float, float]:
    """`score_scale` and `cap` of `weigh_keys`, in base 2."""
    return (scale * _LOG2_E, 0.0) if softcap is None else (scale / softcap, softcap * _LOG2_E)


def numbers_of(planes: Planes) -> Tensor:
    """The payload as one number per element: uint8 codes of CODE, or bf16."""
    return planes.payload if planes.scales is not None else planes.payload.view(torch.bfloat16)


def check_sinks(sinks: Tensor | None, q_heads: int) -> None:
    """Check the sinks of heads. Raises ValueError: they are not dense float32 [q_heads]."""
    if sinks is not None and (sinks.dtype != torch.float32 or sinks.shape != (q_heads,) or not sinks.is_contiguous()):
        raise ValueError(f"sinks are {sinks.dtype} {tuple(sinks.shape)}; must be dense float32 ({q_heads},)")


def check_attention(q: Tensor, k_planes: Planes, v_planes: Planes, block_tables: Tensor, context_lens: Tensor) -> None:
    """Check the arguments that both kernels share.

    Raises:
        ValueError: names the argument and the requirement.
    """
    num_seqs, q_heads, width = len(context_lens), q.shape[1], q.shape[2]
    if not q.is_contiguous() or q.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"q is {q.dtype}, strides {q.stride()}; must be contiguous bf16 or float32")
    check_codes(k_planes, v_planes)
    for planes in (k_planes, v_planes):
        if planes.payload.shape[-1] != (2 * width if planes.scales is None else width):
            raise ValueError(
                f"this kernel reads FP8 or bf16 rows of {width}; the planes hold {planes.payload.shape[-1]} bytes"
            )
        if not planes.payload.is_contiguous() or not (planes.scales is None or planes.scales.is_contiguous()):
            raise ValueError("the planes must be contiguous")
    k_shape, v_shape = k_planes.payload.shape, v_planes.payload.shape
    if k_shape[1:] != v_shape[1:] or (k_planes.scales is None) != (v_planes.scales is None) or q_heads % k_shape[1]:
        raise ValueError(f"{q_heads} query heads, K planes {tuple(k_shape)}, V planes {tuple(v_shape)}")
    for name, tensor, shape in (
        ("block_tables", block_tables, (num_seqs, block_tables.shape[-1])),
        ("context_lens", context_lens, (num_seqs,)),
    ):
        if tensor.dtype != torch.int32 or tensor.shape != shape or tensor.stride(-1) != 1:
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}; must be dense int32 {shape}")
