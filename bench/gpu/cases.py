"""Every kernel at work: our call, torch's best for the same work, the definition's answer, and what must be moved.

Where torch has no fused counterpart, its entry does less (named in its key) or is the definition itself. torch's
attention reads dense bf16 keys and values, which no serving engine has: it is the bar, not an alternative.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from twostroke.kernels import reference, reference_attention, reference_kv
from twostroke.kernels.gpu import activation, move_tokens, norm, paged_decode, ragged_prefill, rotary_store, store_kv
from twostroke.kernels.reference import Planes
from twostroke.kernels.reference_attention import Chunk
from twostroke.kernels.reference_kv import Rotation, Seal, digest_keys

KEY = 0x0123456789ABCDEF


@dataclass(frozen=True)
class Sizes:
    """How big a run is; `tiny()` is what the interpreter can do."""

    device: str
    tokens: int
    hidden: int
    ffn: int
    q_heads: int
    kv_heads: int
    width: int
    decodes: tuple[tuple[int, int], ...]  # sequences and context of each
    prefills: tuple[tuple[int, int, int], ...]  # sequences, cached prefix and chunk of each
    block_tokens: int = 16

    @classmethod
    def llama_8b(cls) -> Sizes:
        decodes, prefills = (
            ((1, 8192), (16, 2048), (128, 2048), (16, 16384)),
            ((1, 0, 4096), (8, 0, 1024), (1, 8192, 2048)),
        )
        return cls("cuda", 4096, 4096, 14336, 32, 8, 128, decodes, prefills)

    @classmethod
    def tiny(cls) -> Sizes:
        return cls("cpu", 5, 48, 33, 4, 2, 32, ((2, 70),), ((2, 20, 9),))


@dataclass
class Case:
    """One comparison. `expected` are the definition's answers; those of `ours` must be within `tolerance` of them."""

    name: str
    ours: Callable[[], Any]
    expected: Callable[[], Any]
    tolerance: float  # 0 = equal bits
    moved_bytes: int
    flops: int = 0
    theirs: dict[str, Callable[[], Any]] = field(default_factory=dict)
    after: Callable[[], Any] | None = None  # more of our answer: what was written in place


def cases(sizes: Sizes) -> Iterator[Case]:
    """One at a time, so that only one case's memory is held."""
    yield from _norms(sizes)
    yield from _activations(sizes)
    for codec in ("fp8", "bf16"):
        yield _store(sizes, codec)
        yield _rotary_store(sizes, codec)
        for sequences, context in sizes.decodes:
            yield _decode(sizes, codec, sequences, context)
        for sequences, prefix, chunk in sizes.prefills:
            for precise in (True, False):
                yield _prefill(sizes, codec, (sequences, prefix, chunk), precise)
    yield from _moves(sizes)


def _normal(sizes: Sizes, *shape: int) -> Tensor:
    return torch.randn(shape, device=sizes.device).bfloat16()


def _norms(sizes: Sizes) -> Iterator[Case]:
    x, delta, weight = (
        _normal(sizes, sizes.tokens, sizes.hidden),
        _normal(sizes, sizes.tokens, sizes.hidden),
        _normal(sizes, sizes.hidden),
    )
    size = x.numel() * 2
    yield Case(
        "rms_norm", lambda: norm.rms_norm(x, weight, 1e-5), lambda: reference.rms_norm(x, weight, 1e-5), 2**-7,
        2 * size,
        theirs={"F.rms_norm": lambda: F.rms_norm(x, (sizes.hidden,), weight, 1e-5)},
    )  # fmt: skip
    yield Case(
        "add_rms_norm", lambda: norm.add_rms_norm(x, delta, weight, 1e-5),
        lambda: reference.add_rms_norm(x, delta, weight, 1e-5), 2**-7, 4 * size,
        theirs={"x + delta, F.rms_norm": lambda: F.rms_norm(x + delta, (sizes.hidden,), weight, 1e-5)},
    )  # fmt: skip
    heads, per_head = _normal(sizes, sizes.tokens, sizes.q_heads, sizes.width), _normal(sizes, sizes.width)
    yield Case(
        "rms_norm of heads", lambda: norm.rms_norm(heads, per_head, 1e-5),
        lambda: reference.rms_norm(heads, per_head, 1e-5), 2**-7, 4 * heads.numel(),
        theirs={"F.rms_norm": lambda: F.rms_norm(heads, (sizes.width,), per_head, 1e-5)},
    )  # fmt: skip


def _activations(sizes: Sizes) -> Iterator[Case]:
    gate_up = _normal(sizes, sizes.tokens, 2 * sizes.ffn)

    def torch_silu() -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def torch_gelu() -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.gelu(gate, approximate="tanh") * up

    moved = gate_up.numel() * 3
    yield Case(
        "act_mul, silu", lambda: activation.act_mul(gate_up, "silu"), lambda: reference.act_mul(gate_up, "silu"),
        2**-7, moved, theirs={"F.silu * up": torch_silu},
    )  # fmt: skip
    yield Case(
        "act_mul, gelu_tanh", lambda: activation.act_mul(gate_up, "gelu_tanh"),
        lambda: reference.act_mul(gate_up, "gelu_tanh"), 2**-7, moved, theirs={"F.gelu * up": torch_gelu},
    )  # fmt: skip


def _planes(sizes: Sizes, codec: str, *lead: int) -> Planes:
    shape = (*lead, sizes.kv_heads, sizes.block_tokens)
    bytes_per_number = 1 if codec == "fp8" else 2
    payload = torch.zeros((*shape, bytes_per_number * sizes.width), dtype=torch.uint8, device=sizes.device)
    return Planes(payload, torch.full(shape, 127, dtype=torch.uint8, device=sizes.device) if codec == "fp8" else None)


def _row_bytes(sizes: Sizes, codec: str) -> int:
    return sizes.width + 1 if codec == "fp8" else 2 * sizes.width


def _flat(planes: list[Planes]) -> list[Tensor]:
    return [tensor for pair in planes for tensor in pair if tensor is not None]


def _store(sizes: Sizes, codec: str) -> Case:
    k, v = (_normal(sizes, sizes.tokens, sizes.kv_heads, sizes.width) for _ in range(2))
    num_blocks = -(-sizes.tokens // sizes.block_tokens)
    slots = torch.randperm(num_blocks * sizes.block_tokens, device=sizes.device)[: sizes.tokens]
    ours, theirs = ([_planes(sizes, codec, num_blocks) for _ in "kv"] for _ in range(2))

    def expected() -> list[Tensor]:
        return [*reference.store_kv(k, v, slots, *theirs), *_flat(theirs)]

    rows = 2 * sizes.tokens * sizes.kv_heads
    return Case(
        f"store_kv, {codec}", lambda: store_kv.store_kv(k, v, slots, *ours), expected, 0.0,
        rows * (4 * sizes.width + _row_bytes(sizes, codec)), after=lambda: _flat(ours),
    )  # fmt: skip


def _rotary_store(sizes: Sizes, codec: str) -> Case:
    fused = _normal(sizes, sizes.tokens, sizes.q_heads + 2 * sizes.kv_heads, sizes.width)
    q, k, v = fused.split([sizes.q_heads, sizes.kv_heads, sizes.kv_heads], dim=1)
    num_blocks = -(-sizes.tokens // sizes.block_tokens)
    slots = torch.arange(sizes.tokens, device=sizes.device)
    half = sizes.width // 2
    angles = torch.arange(sizes.tokens).unsqueeze(1) / 10000.0 ** (torch.arange(half) / half)
    turn = Rotation(slots, angles.cos().to(sizes.device), angles.sin().to(sizes.device))
    ours, theirs = ([_planes(sizes, codec, num_blocks) for _ in "kv"] for _ in range(2))
    seal = Seal(digest_keys(KEY, ours[0].payload.shape[-1], sizes.device), layer=3)

    def run(where: list[Planes], op: Callable[..., Any]) -> Any:
        return op(q, k, v, slots, turn, k_planes=where[0], v_planes=where[1], seal=seal)

    rows = 2 * sizes.tokens * sizes.kv_heads
    moved = rows * (4 * sizes.width + _row_bytes(sizes, codec) + 8) + 4 * q.numel()
    return Case(
        f"rotary_store_kv, {codec}", lambda: run(ours, rotary_store.rotary_store_kv),
        lambda: [*run(theirs, reference_kv.rotary_store_kv), *_flat(theirs)], 0.0, moved, after=lambda: _flat(ours),
    )  # fmt: skip


@dataclass
class _Filled:
    """Stored sequences in shuffled blocks, and the same keys and values dense, for torch."""

    planes: list[Planes]
    tables: Tensor
    contexts: Tensor
    k: Tensor  # [sequences, context, kv_heads, width] bf16, as stored
    v: Tensor


def _filled(sizes: Sizes, codec: str, sequences: int, context: int) -> _Filled:
    blocks_each = -(-context // sizes.block_tokens)
    planes = [_planes(sizes, codec, sequences * blocks_each) for _ in "kv"]
    tables = torch.randperm(sequences * blocks_each, device=sizes.device).view(sequences, -1)
    position = torch.arange(context, device=sizes.device)
    dense = []
    for table in tables:
        slots = table[position // sizes.block_tokens] * sizes.block_tokens + position % sizes.block_tokens
        k, v = (_normal(sizes, context, sizes.kv_heads, sizes.width) for _ in range(2))
        dense.append(reference.store_kv(k, v, slots, *planes))
    contexts = torch.full((sequences,), context, dtype=torch.int32, device=sizes.device)
    return _Filled(
        planes, tables.int(), contexts, torch.stack([one.k for one in dense]), torch.stack([one.v for one in dense])
    )


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> dict[str, Callable[[], Any]]:
    """torch's backends that take this call: q [n, heads, tokens, width], k and v expanded to q's heads beforehand."""
    found: dict[str, Callable[[], Any]] = {}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION):

        def run(backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)

        try:
            run()
        except RuntimeError:
            continue  # this backend does not take these shapes on this machine
        found[f"SDPA {backend.name.lower().removesuffix('_attention')}, dense bf16"] = run
    return found


def _expanded(rows: Tensor, group: int) -> Tensor:
    return rows.transpose(1, 2).repeat_interleave(group, 1).contiguous()


def _decode(sizes: Sizes, codec: str, sequences: int, context: int) -> Case:
    cache = _filled(sizes, codec, sequences, context)
    group = sizes.q_heads // sizes.kv_heads
    q = _normal(sizes, sequences, sizes.q_heads, sizes.width)
    args = q, *cache.planes, cache.tables, cache.contexts
    scale = sizes.width**-0.5
    theirs = {}
    if sizes.device == "cuda":
        # One query per KV head's group as rows of one matrix: the kindest form for torch, which need not expand.
        rows = q.view(sequences, sizes.kv_heads, group, sizes.width)
        theirs = _sdpa(rows, cache.k.transpose(1, 2).contiguous(), cache.v.transpose(1, 2).contiguous(), None, False)
    rows_read = 2 * sequences * context * sizes.kv_heads
    return Case(
        f"paged_decode_attention, {codec}, {sequences} x {context}",
        lambda: paged_decode.paged_decode_attention(*args, scale=scale),
        lambda: reference_attention.paged_decode_attention(*args, scale=scale), 2e-2,
        rows_read * _row_bytes(sizes, codec), theirs=theirs,
    )  # fmt: skip


def _prefill(sizes: Sizes, codec: str, shape: tuple[int, int, int], precise: bool) -> Case:
    sequences, prefix, count = shape
    context = prefix + count
    cache = _filled(sizes, codec, sequences, context)
    q = _normal(sizes, sequences * count, sizes.q_heads, sizes.width)
    chunk = Chunk(
        *(rows[:, prefix:].reshape(-1, sizes.kv_heads, sizes.width).contiguous() for rows in (cache.k, cache.v))
    )
    starts = torch.arange(sequences + 1, dtype=torch.int32, device=sizes.device) * count
    args = q, *cache.planes, cache.tables, cache.contexts
    options: dict[str, Any] = {"query_starts": starts, "scale": sizes.width**-0.5, "chunk": chunk, "precise": precise}
    theirs = {}
    if sizes.device == "cuda":
        group = sizes.q_heads // sizes.kv_heads
        mask = None
        if prefix:
            mask = torch.ones(count, context, dtype=torch.bool, device=sizes.device).tril(prefix)
        dense = q.view(sequences, count, sizes.q_heads, sizes.width).transpose(1, 2).contiguous()
        theirs = _sdpa(dense, _expanded(cache.k, group), _expanded(cache.v, group), mask, not prefix)
    pairs = sequences * (count * prefix + count * (count + 1) // 2)
    return Case(
        f"ragged_prefill_attention, {codec}, {sequences} x ({prefix} + {count}){'' if precise else ', not precise'}",
        lambda: ragged_prefill.ragged_prefill_attention(*args, **options),
        lambda: reference_attention.ragged_prefill_attention(*args, **options), 2e-2,
        2 * sequences * context * sizes.kv_heads * _row_bytes(sizes, codec) + 4 * q.numel(),
        flops=4 * pairs * sizes.q_heads * sizes.width, theirs=theirs,
    )  # fmt: skip


def _moves(sizes: Sizes) -> Iterator[Case]:
    layers, num_blocks = (2, 5) if sizes.device == "cpu" else (32, 256)
    store, other, target = (_planes(sizes, "fp8", layers, num_blocks) for _ in range(3))
    store.payload.random_(0, 256)
    table = torch.randperm(num_blocks, device=sizes.device)
    tokens, heads = range(3, num_blocks * sizes.block_tokens - 2), range(sizes.kv_heads)
    source = reference_kv.gather_tokens(store, table, tokens, heads)
    moved = 2 * layers * len(heads) * len(tokens) * _row_bytes(sizes, "fp8")

    def scattered() -> list[Tensor]:
        reference_kv.scatter_tokens(other, table, tokens, heads, source)
        return _flat([other])

    yield Case(
        "gather_tokens, fp8", lambda: move_tokens.gather_tokens(store, table, tokens, heads),
        lambda: reference_kv.gather_tokens(store, table, tokens, heads), 0.0, moved,
    )  # fmt: skip
    yield Case(
        "scatter_tokens, fp8", lambda: move_tokens.scatter_tokens(target, table, tokens, heads, source), scattered,
        0.0, moved, after=lambda: _flat([target]),
    )  # fmt: skip
