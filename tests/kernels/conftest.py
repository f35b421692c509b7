"""A poisoned paged cache for kernel tests: what nobody wrote is NaN."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from twostroke.kernels import reference
from twostroke.kernels.gpu import launch
from twostroke.kernels.reference import Planes
from twostroke.kernels.reference_codecs import NumberCode

if launch.interpreted():
    from support.session.quick_interpreter import quicken

    quicken()
else:
    from support.session.on_gpu import move_kernels_to_gpu

    move_kernels_to_gpu()

ROW_BYTES = {"fp8": 1, "e5m2": 1, "int8": 1, "bf16": 2, "fp32": 4}
CODES: dict[str, NumberCode] = {"e5m2": "e5m2", "int8": "int8"}


def poisoned(num_blocks: int, heads: int, block_tokens: int, width: int, codec: str = "fp8") -> Planes:
    """Planes of 0xff: NaN in every codec but int8, and an infinite scale."""
    payload = torch.full((num_blocks, heads, block_tokens, width * ROW_BYTES[codec]), 0xFF, dtype=torch.uint8)
    scales = torch.full(payload.shape[:3], 0xFF, dtype=torch.uint8) if ROW_BYTES[codec] == 1 else None
    return Planes(payload, scales, CODES.get(codec))


@dataclass
class Cache:
    """Stored sequences with shuffled blocks, and the numbers that attention must see, in float64."""

    k_planes: Planes
    v_planes: Planes
    block_tables: torch.Tensor  # [num_seqs, max_blocks] int32; entries past a context name no block
    context_lens: torch.Tensor  # [num_seqs] int32
    k: list[torch.Tensor]  # per sequence [context, heads, width] float64, as stored
    v: list[torch.Tensor]

    def attend(
        self,
        sequence: int,
        q: torch.Tensor,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        *,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The oracle: causal float64 attention of the last len(q) positions, [tokens, q_heads, width]."""
        k, v = self.k[sequence], self.v[sequence]
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = torch.einsum("thw,chw->htc", q.double(), k) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        query, key = torch.arange(len(k) - len(q), len(k)).unsqueeze(1), torch.arange(len(k))
        hidden = key > query
        if window is not None:
            hidden |= key <= query - window
        scores = scores.masked_fill(hidden, -torch.inf)
        if sinks is not None:
            sunk = sinks.double().to(scores.device).view(-1, 1, 1).expand(-1, len(q), 1)
            scores = torch.cat((scores, sunk), -1)
        return torch.einsum("htc,chw->thw", scores.softmax(-1)[..., : len(k)], v)


def filled(
    contexts: list[int], *, heads: int = 2, width: int = 64, block_tokens: int = 16, codec: str = "fp8", seed: int = 0
) -> Cache:
    generator = torch.Generator().manual_seed(seed)
    max_blocks = max(1, -(-max(contexts) // block_tokens))
    num_blocks = len(contexts) * max_blocks
    planes = [poisoned(num_blocks, heads, block_tokens, width, codec) for _ in range(2)]
    tables = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed)).view(len(contexts), max_blocks)
    stored: list[tuple[torch.Tensor, torch.Tensor]] = []
    for table, context in zip(tables, contexts, strict=True):
        k, v = (torch.randn(context, heads, width, generator=generator) for _ in range(2))
        v *= torch.exp(3 * torch.randn(context, heads, 1, generator=generator))  # scales that differ by token
        position = torch.arange(context)
        slots = table[position // block_tokens] * block_tokens + position % block_tokens
        out = reference.store_kv(k, v, slots, *planes)
        stored.append((out.k.double(), out.v.double()))
        table[-(-context // block_tokens) :] = 2**30
    return Cache(
        planes[0], planes[1], tables.int(), torch.tensor(contexts, dtype=torch.int32),
        [k for k, _ in stored], [v for _, v in stored],
    )  # fmt: skip


@pytest.fixture
def make_planes() -> Callable[..., Planes]:
    return poisoned


@pytest.fixture
def make_cache() -> Callable[..., Cache]:
    return filled
