"""Definitions of a step's operations in plain torch; tests compare every kernel with them.

Knows only tensors. Arithmetic is float32; results have the dtype of the inputs.

Terms. A physical *block* holds `block_tokens` (16, 32 or 64) tokens of one layer and one component ("k" or "v"). Its
numbers are in a payload plane `uint8 [num_blocks, heads, block_tokens, row_bytes]` (head-major inside the block, so
that a range of heads is contiguous) and, where a number has one byte, a scale plane `uint8 [num_blocks, heads,
block_tokens]`. A *row* is the `width` (head_dim) numbers of one (token, head). A *slot* is `block * block_tokens +
offset`. Without a `code`, planes with scales are fp8 (e4m3); else row bytes per number decide, 2 = bf16, 4 = fp32.

Attention is in `reference_attention.py`; digests, gather and scatter of stored blocks are in `reference_kv.py`; the
codecs beside e4m3 are in `reference_codecs.py`.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .reference_codecs import ByteCode, NumberCode, byte_numbers, channel_encode, e5m2_encode, int8_encode, power_of_two

MIN_SCALE_BYTE = 11
MAX_SCALE_BYTE = 246
LARGEST_E4M3 = 0x7E  # 448

Activation = Literal["silu", "gelu_tanh", "clamped_swiglu"]
CLAMPED_LIMIT, CLAMPED_SLOPE = 7.0, 1.702  # of "clamped_swiglu"


class Planes(NamedTuple):
    """The planes of one layer and component of the store, or blocks gathered from it."""

    payload: Tensor  # [num_blocks, heads, block_tokens, row_bytes] uint8
    scales: Tensor | None  # [num_blocks, heads, block_tokens] uint8, where a number has one byte
    code: NumberCode | None = None

    @property
    def byte_code(self) -> ByteCode:
        """Code of planes with scales."""
        match self.code:
            case None | "bf16" | "fp32":
                return "e4m3"
            case code:
                return code

    def width_like(self, other: "Planes", width: int) -> int:
        """Numbers per row; without a code, as many bytes per number as in `other`, whose rows have `width`."""
        row_bytes = self.payload.shape[-1]
        if self.scales is not None:
            return row_bytes
        if self.code is not None:
            return row_bytes // (2 if self.code == "bf16" else 4)
        return row_bytes * width // other.payload.shape[-1]

    @property
    def block_tokens(self) -> int:
        """Tokens in one physical block."""
        return self.payload.shape[2]


class Stored(NamedTuple):
    """Result of `store_kv`: keys and values as the cache now holds them, and the tokens to refuse."""

    k: Tensor  # [num_tokens, heads, width] in k's dtype
    v: Tensor  # [num_tokens, heads, width] in v's dtype
    non_finite: Tensor  # [num_tokens] int32: rows of this token (heads of k and of v) with a NaN or an infinity


class Normed(NamedTuple):
    """Result of `add_rms_norm`."""

    residual: Tensor  # [..., width] x + delta, rounded to x's dtype
    normed: Tensor  # [..., width] the residual, normalised


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, unit_offset: bool = False) -> Tensor:
    """`x / sqrt(mean(x**2) + eps) * weight` over the last axis; rounded once, at the end.

    x [..., width], weight [width]: hidden rows or heads (qk-norm). `unit_offset`: the factor is 1 + weight (Gemma).
    Source: Zhang and Sennrich 2019.
    """
    wide, factor = x.float(), weight.float()
    if unit_offset:
        factor = 1.0 + factor
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * factor).to(x.dtype)


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float, *, unit_offset: bool = False) -> Normed:
    """Add a layer's output to the residual stream, round the sum to x's dtype, and normalise the rounded sum."""
    residual = (x.float() + delta.float()).to(x.dtype)
    return Normed(residual, rms_norm(residual, weight, eps, unit_offset=unit_offset))


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate number i of each row with number i + w, for i < w; numbers from 2 * w on are unchanged.

    q [num_tokens, q_heads, head_dim], k [num_tokens, kv_heads, head_dim]; cos and sin [num_tokens, w] float32, of
    position times inverse frequency (the first half of what Hugging Face passes); 2 * w <= head_dim. This is the order
    in which Hugging Face checkpoints are stored. Source: RoFormer (Su et al. 2021).
    """
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    low, high = x[..., :half].float(), x[..., half : 2 * half].float()
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned = torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)
    return torch.cat((turned.to(x.dtype), x[..., 2 * half :]), dim=-1)


def act_mul(gate_up: Tensor, activation: Activation) -> Tensor:
    """`activation(gate) * up` of gate_up [..., 2 * ffn], gate first; [..., ffn]. Rounded once, at the end.

    "clamped_swiglu": gate is at most the limit, up within plus and minus it; gate * sigmoid(slope * gate) * (up + 1).
    Source: SwiGLU and GEGLU, Shazeer 2020; "gelu_tanh" is the tanh form of Hendrycks and Gimpel 2016; the clamped form
    is gpt-oss's (2025).
    """
    gate, up = gate_up.float().chunk(2, dim=-1)
    if activation == "clamped_swiglu":
        gate, up = gate.clamp(max=CLAMPED_LIMIT), up.clamp(-CLAMPED_LIMIT, CLAMPED_LIMIT)
        return (gate * torch.sigmoid(CLAMPED_SLOPE * gate) * (up + 1)).to(gate_up.dtype)
    if activation == "silu":
        active = torch.nn.functional.silu(gate)
    else:
        active = torch.nn.functional.gelu(gate, approximate="tanh")
    return (active * up).to(gate_up.dtype)


def silu_mul(gate_up: Tensor) -> Tensor:
    """`act_mul` with "silu"."""
    return act_mul(gate_up, "silu")


def fp8_encode(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Encode rows x [..., width] as e4m3fn with one power-of-two scale each.

    Returns payload uint8 [..., width], scales uint8 [...] and non_finite bool [...].

    The scale is `2**(byte - 127)`, the smallest power of two with `amax <= 448 * scale`, clamped to bytes 11..246,
    found on the bits of amax. The payload is `x / scale`, exact, rounded to nearest even in integers and saturated at
    448 (only rows with amax above `448 * 2**119` saturate). Decoded numbers are exact in bf16 and never subnormal
    there: non-zero magnitudes lie in [2**-125, 448 * 2**119], and float32 subnormals become zero, so the bytes do not
    depend on a device's flush mode. A row of zeros has byte 11. A row with a NaN or an infinity is zeros, scale
    byte 0. Encoding decoded numbers never changes a value.
    """
    wide = x.float()
    amax_bits = (wide.view(torch.int32) & 0x7FFFFFFF).amax(-1)
    non_finite = amax_bits >= 0x7F800000
    # 448 is 1.75 * 2**8: the exponent of amax less 8, one more where its mantissa is above 1.75.
    byte = ((amax_bits >> 23) - 8 + ((amax_bits & 0x7FFFFF) > 0x600000).int()).clamp(MIN_SCALE_BYTE, MAX_SCALE_BYTE)
    scaled = wide * ((254 - byte) << 23).view(torch.float32).unsqueeze(-1)
    bits = scaled.view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    # Normal numbers: cut 20 mantissa bits, rounding to nearest even, and move the bias from 127 to 7.
    normal = (((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - 960).clamp(max=LARGEST_E4M3)
    # Below 2**-6 the step is 2**-9, the step of float32 at 2**14: the addition rounds, the low bits are the code.
    small = (scaled.abs() + 16384.0).view(torch.int32) & 0xFF
    code = torch.where(magnitude < 0x3C800000, small, normal) | ((bits >> 24) & 0x80)
    payload = code.masked_fill(non_finite.unsqueeze(-1), 0).to(torch.uint8)
    return payload, byte.masked_fill(non_finite, 0).to(torch.uint8), non_finite


def fp8_decode(payload: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers of payload uint8 [..., width] with scales uint8 [...]: exact in bfloat16 and float32."""
    return (payload.view(torch.float8_e4m3fn).float() * fp8_scales(scales).unsqueeze(-1)).to(dtype)


def fp8_scales(scales: Tensor) -> Tensor:
    """The float32 powers of two that scale bytes stand for."""
    return (scales.int() << 23).view(torch.float32)


def store_kv(k: Tensor, v: Tensor, slots: Tensor, k_planes: Planes, v_planes: Planes) -> Stored:
    """Quantise keys and values, write them to the store, and return them as stored.

    k and v [num_tokens, heads, width] float32 or bfloat16; slots [num_tokens] int64, all different; a negative slot is
    padding: it is neither written nor counted. A row with a NaN or an infinity is stored as zeros, and
    counted for its token in `non_finite`: the caller must fail that token's request.
    """
    k_rounded, k_bad = _store(k, slots, k_planes)
    v_rounded, v_bad = _store(v, slots, v_planes)
    non_finite = (k_bad.sum(-1) + v_bad.sum(-1)).masked_fill(slots < 0, 0)
    return Stored(k_rounded, v_rounded, non_finite.to(torch.int32))


def _store(x: Tensor, slots: Tensor, planes: Planes) -> tuple[Tensor, Tensor]:
    if planes.byte_code == "int8_channel":
        return _store_by_channel(x, slots, planes)
    payload, scales, non_finite = encode_rows(x, planes)
    kept = slots >= 0
    blocks = torch.div(slots[kept], planes.block_tokens, rounding_mode="floor")
    offsets = slots[kept] % planes.block_tokens
    planes.payload[blocks, :, offsets] = payload[kept]
    if planes.scales is not None and scales is not None:
        planes.scales[blocks, :, offsets] = scales[kept]
    raw, scale = decode_rows(Planes(payload, scales, planes.code), x.shape[-1])
    return (raw if scale is None else raw * scale.unsqueeze(-1)).to(x.dtype), non_finite


def _store_by_channel(x: Tensor, slots: Tensor, planes: Planes) -> tuple[Tensor, Tensor]:
    kept = slots >= 0
    blocks = torch.div(slots[kept], planes.block_tokens, rounding_mode="floor")
    offsets = slots[kept] % planes.block_tokens
    encoded, exponents = channel_encode(x[kept], blocks, offsets, planes.payload)
    planes.payload[blocks, :, offsets] = encoded.payload
    assert planes.scales is not None
    planes.scales[blocks, :, offsets] = encoded.scales
    raw = byte_numbers(encoded.payload, "int8") * power_of_two(exponents)
    rounded, non_finite = torch.zeros_like(x), torch.zeros(x.shape[:-1], dtype=torch.bool, device=x.device)
    rounded[kept] = (raw * fp8_scales(encoded.scales).unsqueeze(-1)).to(x.dtype)
    non_finite[kept] = encoded.non_finite
    return rounded, non_finite


def encode_rows(x: Tensor, planes: Planes) -> tuple[Tensor, Tensor | None, Tensor]:
    """Encode rows x [..., width] in the codec of `planes`: payload, scales, and a mask of rows that are not finite.

    Rows that are not finite become zeros. fp8 as in `fp8_encode`; bf16 saturates at its largest number. Rows of
    "int8_channel" need their places: `reference_codecs.channel_encode`.
    """
    if planes.scales is not None:
        if planes.byte_code == "e5m2":
            return e5m2_encode(x)
        return fp8_encode(x) if planes.byte_code == "e4m3" else int8_encode(x)
    non_finite = ~torch.isfinite(x).all(-1)
    numbers = x.float().masked_fill(non_finite.unsqueeze(-1), 0.0)
    if planes.payload.shape[-1] == 2 * x.shape[-1]:
        largest = torch.finfo(torch.bfloat16).max
        return numbers.clamp(-largest, largest).to(torch.bfloat16).view(torch.uint8), None, non_finite
    return numbers.view(torch.uint8), None, non_finite


def decode_rows(planes: Planes, width: int) -> tuple[Tensor, Tensor | None]:
    """Payload [..., row_bytes] as float32 [..., width] before scaling, and the float32 scales [...], if there are some.

    "int8_channel": payload [..., tokens, row_bytes], whole blocks of 16 tokens.
    """
    if planes.scales is not None:
        return byte_numbers(planes.payload, planes.byte_code), fp8_scales(planes.scales)
    if planes.payload.shape[-1] == 2 * width:
        return planes.payload.view(torch.bfloat16).float(), None
    return planes.payload.view(torch.float32), None
