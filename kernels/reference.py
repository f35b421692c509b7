"""What every operation of a step means, in plain torch: the definition that each kernel is held against.

Knows tensors and nothing else. Arithmetic inside is float32; results come back in the dtype of the inputs.

Terms. A physical *block* holds `block_tokens` (16, 32 or 64) tokens of one layer and one component ("k" or "v"). Its
numbers lie in a payload plane `uint8 [num_blocks, heads, block_tokens, row_bytes]` (head-major inside the block, so
that a range of heads is contiguous) and, for fp8, a scale plane `uint8 [num_blocks, heads, block_tokens]`. A *row* is
the `width` (head_dim) numbers of one (token, head). A *slot* is `block * block_tokens + offset`.
The codec shows in the planes: scales present = fp8; else the row bytes over the width, 2 = bf16, 4 = fp32.
"""

from typing import NamedTuple

import torch
from torch import Tensor

MIN_SCALE_BYTE = 11
MAX_SCALE_BYTE = 246
LARGEST_E4M3 = 0x7E  # 448
KEY_TILE = 64  # absolute positions that attention sums together; every block size divides it
QUERY_TILE = 16


class Planes(NamedTuple):
    """One layer's and component's part of the store, or blocks gathered from it."""

    payload: Tensor  # [num_blocks, heads, block_tokens, row_bytes] uint8
    scales: Tensor | None  # [num_blocks, heads, block_tokens] uint8, fp8 only

    @property
    def block_tokens(self) -> int:
        """Tokens in one physical block."""
        return self.payload.shape[2]


class Stored(NamedTuple):
    """What `store_kv` returns: the keys and values as the cache now holds them, and the tokens that must be refused."""

    k: Tensor  # [num_tokens, heads, width] in k's dtype
    v: Tensor  # [num_tokens, heads, width] in v's dtype
    non_finite: Tensor  # [num_tokens] int32: rows of this token (heads of k and of v) with a NaN or an infinity


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x**2) + eps) * weight` over the last axis; rounded once, at the end.

    Source: Zhang and Sennrich 2019.
    """
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate number i of each row with number i + head_dim / 2 (the order Hugging Face checkpoints are stored in).

    q [num_tokens, q_heads, head_dim], k [num_tokens, kv_heads, head_dim]; cos and sin [num_tokens, head_dim / 2]
    float32, of position times inverse frequency (the first half of what Hugging Face passes).
    Source: RoFormer (Su et al. 2021).
    """
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.float().chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x.dtype)


def silu_mul(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` of gate_up [..., 2 * ffn], gate first; [..., ffn]."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)


def fp8_encode(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Encode rows x [..., width] as e4m3fn with one power-of-two scale each.

    Returns payload uint8 [..., width], scales uint8 [...] and non_finite bool [...].

    The scale is `2**(byte - 127)`, the smallest power of two with `amax <= 448 * scale`, clamped to bytes 11..246,
    found on the bits of amax. The payload is `x / scale`, exact, rounded to nearest even in integers and saturated at
    448 (which only rows with amax above `448 * 2**119` meet). Decoded numbers are exact in bf16 and never subnormal
    there: non-zero magnitudes lie in [2**-125, 448 * 2**119], and what is subnormal in float32 becomes zero, so no
    device's flush mode shows in the bytes. A row of zeros has byte 11. A row with a NaN or an infinity is zeros, scale
    byte 0. Encoding what was decoded never changes a value.
    """
    wide = x.float()
    amax_bits = (wide.view(torch.int32) & 0x7FFFFFFF).amax(-1)
    non_finite = amax_bits >= 0x7F800000
    # 448 is 1.75 * 2**8: the exponent of amax less 8, one more where its mantissa is above 1.75.
    byte = ((amax_bits >> 23) - 8 + ((amax_bits & 0x7FFFFF) > 0x600000).int()).clamp(MIN_SCALE_BYTE, MAX_SCALE_BYTE)
    scaled = wide * ((254 - byte) << 23).view(torch.float32).unsqueeze(-1)
    bits = scaled.view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    # Normal numbers: cut 20 mantissa bits, nearest even, and move the bias from 127 to 7.
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
    """Scale bytes as the float32 powers of two that they mean."""
    return (scales.int() << 23).view(torch.float32)


def store_kv(k: Tensor, v: Tensor, slots: Tensor, k_planes: Planes, v_planes: Planes) -> Stored:
    """Quantise keys and values, write them into the store, and return them as the store holds them.

    k and v [num_tokens, heads, width] float32 or bfloat16; slots [num_tokens] int64, all different; a negative slot is
    padding, for which nothing is written and nothing counted. A row with a NaN or an infinity is stored as zeros, and
    counted for its token in `non_finite`: the caller must fail that token's request.
    """
    k_rounded, k_bad = _store(k, slots, k_planes)
    v_rounded, v_bad = _store(v, slots, v_planes)
    non_finite = (k_bad.sum(-1) + v_bad.sum(-1)).masked_fill(slots < 0, 0)
    return Stored(k_rounded, v_rounded, non_finite.to(torch.int32))


def _store(x: Tensor, slots: Tensor, planes: Planes) -> tuple[Tensor, Tensor]:
    payload, scales, non_finite = _encode(x, planes)
    kept = slots >= 0
    blocks = torch.div(slots[kept], planes.block_tokens, rounding_mode="floor")
    offsets = slots[kept] % planes.block_tokens
    planes.payload[blocks, :, offsets] = payload[kept]
    if planes.scales is not None and scales is not None:
        planes.scales[blocks, :, offsets] = scales[kept]
    raw, scale = decode_rows(Planes(payload, scales), x.shape[-1])
    return (raw if scale is None else raw * scale.unsqueeze(-1)).to(x.dtype), non_finite


def _encode(x: Tensor, planes: Planes) -> tuple[Tensor, Tensor | None, Tensor]:
    """Rows x [..., width] in the codec of `planes`; see `fp8_encode`. bf16 saturates at its largest number."""
    if planes.scales is not None:
        return fp8_encode(x)
    non_finite = ~torch.isfinite(x).all(-1)
    numbers = x.float().masked_fill(non_finite.unsqueeze(-1), 0.0)
    if planes.payload.shape[-1] == 2 * x.shape[-1]:
        largest = torch.finfo(torch.bfloat16).max
        return numbers.clamp(-largest, largest).to(torch.bfloat16).view(torch.uint8), None, non_finite
    return numbers.view(torch.uint8), None, non_finite


def decode_rows(planes: Planes, width: int) -> tuple[Tensor, Tensor | None]:
    """Payload [..., row_bytes] as float32 [..., width] before scaling, and the float32 scales [...] of fp8 rows."""
    if planes.scales is not None:
        return planes.payload.view(torch.float8_e4m3fn).float(), fp8_scales(planes.scales)
    if planes.payload.shape[-1] == 2 * width:
        return planes.payload.view(torch.bfloat16).float(), None
    return planes.payload.view(torch.float32), None


def paged_decode_attention(
    q: Tensor, k_planes: Planes, v_planes: Planes, block_tables: Tensor, context_lens: Tensor, *, scale: float
) -> Tensor:
    """Attention of each sequence's newest token to what the cache holds.

    q [num_seqs, q_heads, width] with q_heads a multiple of the planes' heads (head h reads KV head h // group);
    block_tables [num_seqs, max_blocks] integer block ids, of which the first ceil(context / block_tokens) are read;
    context_lens [num_seqs] counts the newest token, which is already stored; 0 is padding and gives zeros.
    Returns [num_seqs, q_heads, width] in q's dtype. Bytes beyond a context are never read for their value.

    The result of a row depends on its own sequence only, bit for bit: keys are taken in tiles of 64 absolute positions
    and summed in that order, queries in tiles of 16 absolute positions, of a shape that no batch changes; prefill and
    decode share it. K scales multiply score columns and V scales probability columns.
    Source: paged attention, Kwon et al. 2023; splits over keys, Flash-Decoding (Dao et al. 2023).
    """
    group = q.shape[1] // k_planes.payload.shape[1]
    contexts = context_lens.to(torch.int64)
    rows = (contexts - 1).clamp(min=0) % QUERY_TILE
    tile = q.new_zeros((q.shape[0], QUERY_TILE, q.shape[1], q.shape[2]), dtype=torch.float32)
    tile[torch.arange(q.shape[0], device=q.device), rows] = q.float()
    longest = int(contexts.max()) if len(contexts) else 0
    keys, values = (_key_tiles(p, block_tables, contexts, longest, q.shape[-1]) for p in (k_planes, v_planes))
    out = _attend(_QueryTiles(tile, (contexts - 1).clamp(min=0) - rows, contexts), keys, values, group, scale)
    return out[torch.arange(q.shape[0], device=q.device), rows].to(q.dtype)


def ragged_prefill_attention(
    q: Tensor,
    k_planes: Planes,
    v_planes: Planes,
    block_tables: Tensor,
    context_lens: Tensor,
    *,
    query_starts: Tensor,
    scale: float,
) -> Tensor:
    """Causal attention of several sequences' newest chunks, back to back in q, to what the cache holds.

    q [num_tokens, q_heads, width]; query_starts [num_seqs + 1] from 0 to num_tokens; the queries of sequence s are the
    last `query_starts[s + 1] - query_starts[s]` of its context_lens[s] positions, all stored already. A chunk of one is
    a decode step: the rest is as in `paged_decode_attention`, the bits too, however a prompt was cut into chunks.
    """
    group = q.shape[1] // k_planes.payload.shape[1]
    out = torch.empty_like(q)
    starts = query_starts.tolist()
    for s, context in enumerate(context_lens.tolist()):
        first, last = starts[s], starts[s + 1]
        if first == last:
            continue
        contexts = context_lens[s : s + 1].to(torch.int64)
        keys, values = (
            _key_tiles(p, block_tables[s : s + 1], contexts, context, q.shape[-1]) for p in (k_planes, v_planes)
        )
        position, token = context - (last - first), first
        while token < last:
            row = position % QUERY_TILE
            count = min(QUERY_TILE - row, last - token)
            tile = q.new_zeros((1, QUERY_TILE, q.shape[1], q.shape[2]), dtype=torch.float32)
            tile[0, row : row + count] = q[token : token + count].float()
            seen = (position + count - 1) // KEY_TILE + 1
            queries = _QueryTiles(tile, contexts.new_full((1,), position - row), contexts)
            done = _attend(queries, keys.first(seen), values.first(seen), group, scale)
            out[token : token + count] = done[0, row : row + count].to(q.dtype)
            position, token = position + count, token + count
    return out


class _QueryTiles(NamedTuple):
    numbers: Tensor  # [n, QUERY_TILE, q_heads, width] float32, zeros where there is no query
    first_positions: Tensor  # [n] int64, multiples of QUERY_TILE
    contexts: Tensor  # [n] int64


class _KeyTiles(NamedTuple):
    numbers: Tensor  # [n, tiles, kv_heads, KEY_TILE, width] float32 before scaling, zeros beyond the context
    scales: Tensor | None  # [n, tiles, kv_heads, KEY_TILE] float32

    def first(self, tiles: int) -> "_KeyTiles":
        return _KeyTiles(self.numbers[:, :tiles], None if self.scales is None else self.scales[:, :tiles])


def _key_tiles(planes: Planes, block_tables: Tensor, contexts: Tensor, longest: int, width: int) -> _KeyTiles:
    """The first `longest` tokens of each sequence, in tiles of absolute position."""
    num_tiles = max(1, -(-longest // KEY_TILE))
    tables = block_tables[:, : -(-longest // planes.block_tokens)].long()
    missing = num_tiles * KEY_TILE // planes.block_tokens - tables.shape[1]
    tables = torch.nn.functional.pad(tables, (0, missing))
    positions = torch.arange(num_tiles * KEY_TILE, device=tables.device).view(num_tiles, 1, KEY_TILE)
    beyond = positions >= contexts.view(-1, 1, 1, 1)  # [n, tiles, 1, KEY_TILE]
    # What a table says past its context is arbitrary: read block 0 there, and nothing of it.
    first_positions = torch.arange(tables.shape[1], device=tables.device) * planes.block_tokens
    tables = tables.masked_fill(first_positions >= contexts.view(-1, 1), 0)

    def tiled(plane: Tensor) -> Tensor:
        gathered = plane[tables]  # [n, blocks, kv_heads, block_tokens, ...]
        heads, rest = gathered.shape[2], gathered.shape[4:]
        parts = gathered.view(
            len(tables), num_tiles, KEY_TILE // planes.block_tokens, heads, planes.block_tokens, *rest
        ).transpose(2, 3)
        return parts.reshape(len(tables), num_tiles, heads, KEY_TILE, *rest)

    raw = Planes(tiled(planes.payload), None if planes.scales is None else tiled(planes.scales))
    numbers, scales = decode_rows(raw, width)
    return _KeyTiles(
        numbers.masked_fill(beyond.unsqueeze(-1), 0.0), None if scales is None else scales.masked_fill(beyond, 1.0)
    )


def _attend(queries: _QueryTiles, keys: _KeyTiles, values: _KeyTiles, group: int, scale: float) -> Tensor:
    """Softmax attention of query tiles to key tiles; [n, QUERY_TILE, q_heads, width] float32."""
    n, num_tiles, heads, _, width = keys.numbers.shape
    device = keys.numbers.device
    rows = queries.numbers.view(n, QUERY_TILE, heads, group, width).transpose(1, 2)
    rows = rows.reshape(n, 1, heads, QUERY_TILE * group, width)
    scores = torch.matmul(rows, keys.numbers.transpose(-1, -2))  # [n, tiles, heads, rows, KEY_TILE]
    if keys.scales is not None:
        scores *= keys.scales.unsqueeze(-2)
    key_positions = torch.arange(num_tiles * KEY_TILE, device=device).view(num_tiles, 1, 1, KEY_TILE)
    row_positions = torch.arange(QUERY_TILE, device=device).repeat_interleave(group).view(-1, 1)
    row_positions = queries.first_positions.view(n, 1, 1, 1, 1) + row_positions
    hidden = (key_positions > row_positions) | (key_positions >= queries.contexts.view(n, 1, 1, 1, 1))
    scores = (scores * scale).masked_fill(hidden, -torch.inf)
    # The maximum has no order; everything that is summed over tiles is summed in theirs, where absent tiles add 0.
    top = scores.amax(dim=(1, 4), keepdim=True).clamp(min=torch.finfo(torch.float32).min)
    weights = torch.exp(scores - top)
    total = _sum_in_order(weights.sum(-1, keepdim=True))
    if values.scales is not None:
        weights *= values.scales.unsqueeze(-2)
    out = _sum_in_order(torch.matmul(weights, values.numbers)) / total.masked_fill(total == 0, 1.0)
    return out.view(n, heads, QUERY_TILE, group, width).transpose(1, 2).reshape(n, QUERY_TILE, heads * group, width)


def _sum_in_order(parts: Tensor) -> Tensor:
    """Sum over axis 1, first to last."""
    total = parts[:, 0].clone()
    for tile in range(1, parts.shape[1]):
        total += parts[:, tile]
    return total
