"""The ragged prefill kernel, in the interpreter, against float64 attention, and bit for bit against itself."""

from typing import Any

import numpy as np
import pytest
import torch

from twostroke.kernels.gpu import launch, ragged_prefill
from twostroke.kernels.gpu.paged_decode import paged_decode_attention
from twostroke.kernels.gpu.ragged_prefill import ragged_prefill_attention
from twostroke.kernels.reference import Planes
from twostroke.kernels.reference_attention import Chunk

NO_BLOCK = 2**30


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = torch.empty
    monkeypatch.setattr(ragged_prefill.torch, "empty", lambda *a, **k: honest(*a, **k).fill_(torch.nan))


def queries(count: int, heads: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, heads, width, generator=torch.Generator().manual_seed(seed))


def chunk_of(cache: Any, counts: list[int], dtype: torch.dtype) -> Chunk:
    """The last `counts` keys and values of each sequence, as the store returned them."""
    k, v = (
        torch.cat([rows[len(rows) - count :] for rows, count in zip(stored, counts, strict=True)]).to(dtype)
        for stored in (cache.k, cache.v)
    )
    return Chunk(k.contiguous(), v.contiguous())


def without_chunks(cache: Any, counts: list[int]) -> tuple[Planes, Planes, torch.Tensor]:
    """Planes and tables of which every position of the chunks is poisoned: only the prefix is there to be read."""
    planes = [
        Planes(p.payload.clone(), None if p.scales is None else p.scales.clone())
        for p in (cache.k_planes, cache.v_planes)
    ]
    tables, block_tokens = cache.block_tables.clone(), cache.k_planes.block_tokens
    for s, count in enumerate(counts):
        for position in range(len(cache.k[s]) - count, len(cache.k[s])):
            block = int(cache.block_tables[s, position // block_tokens])
            for plane in planes:
                plane.payload[block, :, position % block_tokens] = 0xFF
                if plane.scales is not None:
                    plane.scales[block, :, position % block_tokens] = 0xFF
        tables[s, -(-(len(cache.k[s]) - count) // block_tokens) :] = NO_BLOCK
    return planes[0], planes[1], tables


def run(cache: Any, q: list[torch.Tensor], scratch: torch.dtype | None, **options: Any) -> list[torch.Tensor]:
    counts = [len(rows) for rows in q]
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    chunk, (k, v, tables) = None, (cache.k_planes, cache.v_planes, cache.block_tables)
    if scratch is not None:
        chunk, (k, v, tables) = chunk_of(cache, counts, scratch), without_chunks(cache, counts)
    options = {"scale": 0.125} | options
    out = ragged_prefill_attention(
        torch.cat(q), k, v, tables, cache.context_lens, query_starts=starts, chunk=chunk, **options
    )
    return list(out.split(counts))


def relative_error(out: list[torch.Tensor], cache: Any, q: list[torch.Tensor], **options: Any) -> float:
    worst = 0.0
    for s, rows in enumerate(q):
        if len(rows):
            expected = cache.attend(s, rows, **({"scale": 0.125} | options))
            worst = max(worst, ((out[s] - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item())
    return worst


@pytest.mark.parametrize("scratch", [None, torch.bfloat16])
@pytest.mark.parametrize("codec", ["fp8", "bf16"])
@pytest.mark.parametrize(
    "case",
    [([1, 17, 65, 300], [1, 17, 64, 33], 1, 1, 16), ([70, 16], [5, 16], 2, 3, 32), ([130, 40, 9], [0, 7, 1], 1, 4, 64)],
)
def test_equals_float64(
    make_cache: Any, case: tuple[list[int], list[int], int, int, int], codec: str, scratch: torch.dtype | None
) -> None:
    contexts, counts, heads, group, block_tokens = case
    cache = make_cache(contexts, heads=heads, width=32, block_tokens=block_tokens, codec=codec)
    q = [queries(count, heads * group, 32, seed) for seed, count in enumerate(counts)]
    assert relative_error(run(cache, q, scratch), cache, q) < 5e-5
    assert relative_error(run(cache, q, scratch, precise=False), cache, q) < 2e-2


@pytest.mark.parametrize(("window", "softcap"), [(1, None), (20, 2.0), (100, None), (None, 0.5), (280, None)])
@pytest.mark.parametrize("scratch", [None, torch.bfloat16])
def test_windows_and_softcaps(
    make_cache: Any, scratch: torch.dtype | None, window: int | None, softcap: float | None
) -> None:
    cache = make_cache([33, 340], heads=1, width=32)
    q = [3 * queries(count, 2, 32, count) for count in (33, 50)]
    options: dict[str, Any] = {"window": window, "softcap": softcap}
    assert relative_error(run(cache, q, scratch, **options), cache, q, **options) < 5e-5


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("scratch", [None, torch.bfloat16])
def test_sinks_of_every_size(make_cache: Any, scratch: torch.dtype | None, window: int | None) -> None:
    cache = make_cache([33, 340], heads=2, width=32)
    q = [3 * queries(count, 6, 32, count) for count in (33, 50)]
    options: dict[str, Any] = {"window": window, "sinks": torch.tensor([-200.0, 0.0, 3.0, 30.0, -4.0, 1.0])}
    out = run(cache, q, scratch, **options)
    assert relative_error(out, cache, q, **options) < 5e-5
    assert relative_error(run(cache, q, scratch, window=window), cache, q, **options) > 0.1
    assert torch.equal(run(cache, [rows[-1:] for rows in q], scratch, **options)[1][0], out[1][-1])


@pytest.fixture
def even_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter multiplies with BLAS, where the sums of a row depend on its place: nothing of the kernel's."""

    def matmul(a: Any, b: Any, dtype: Any = None) -> Any:
        return np.einsum("ik,kj->ij", a.astype(dtype), b.astype(dtype), optimize=False)

    monkeypatch.setattr(np, "matmul", matmul)


@pytest.mark.usefixtures("even_products")
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("scratch", [None, torch.bfloat16])
def test_a_row_has_the_same_bits_however_its_prompt_was_cut(
    make_cache: Any, scratch: torch.dtype | None, window: int | None
) -> None:
    length = 290
    q = queries(length, 2, 32)
    whole = make_cache([length, 33], heads=1, width=32)
    expected = run(whole, [q, queries(33, 2, 32, 1)], scratch, window=window)[0]
    for start, stop in ((0, 1), (0, 100), (64, 100), (250, 270), (289, 290)):
        other = make_cache([length, 33], heads=1, width=32, block_tokens=64)  # the same numbers in other blocks
        other.k, other.v = [other.k[0][:stop]], [other.v[0][:stop]]
        other.block_tables, other.context_lens = other.block_tables[:1], torch.tensor([stop], dtype=torch.int32)
        assert torch.equal(run(other, [q[start:stop]], scratch, window=window)[0], expected[start:stop])


@pytest.mark.parametrize("codec", ["fp8", "bf16"])
def test_scratch_and_blocks_give_the_same_bits(make_cache: Any, codec: str) -> None:
    cache = make_cache([290], heads=1, width=32, codec=codec)
    q = [queries(200, 2, 32)]
    assert torch.equal(run(cache, q, None)[0], run(cache, q, torch.bfloat16)[0])
    assert torch.equal(run(cache, q, None)[0], run(cache, q, torch.float32)[0])


def test_a_chunk_of_one_is_a_decode_step(make_cache: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of sums is decode's; with as many rows in a product, the bits are, too."""
    monkeypatch.setattr(launch, "prefill", launch.decode)
    cache = make_cache([600, 64, 257], heads=1, width=32)
    q = queries(3, 4, 32)
    for options in ({}, {"window": 290}, {"softcap": 3.0}, {"sinks": torch.tensor([0.0, 3.0, -9.0, 1.0])}):
        args = cache.k_planes, cache.v_planes, cache.block_tables, cache.context_lens
        decoded = paged_decode_attention(q, *args, scale=0.125, **options)
        assert torch.equal(torch.cat(run(cache, list(q.split(1)), torch.bfloat16, **options)), decoded)


def test_what_does_not_fit_is_refused(make_cache: Any) -> None:
    cache = make_cache([5], heads=1, width=32)
    q = queries(5, 2, 32)
    args = cache.k_planes, cache.v_planes, cache.block_tables, cache.context_lens
    starts = torch.tensor([0, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match="query_starts"):
        ragged_prefill_attention(q, *args, query_starts=starts.long(), scale=1.0)
    with pytest.raises(ValueError, match="the chunk's k"):
        ragged_prefill_attention(q, *args, query_starts=starts, scale=1.0, chunk=Chunk(q, q))
    fp32 = make_cache([5], heads=1, width=32, codec="fp32")
    with pytest.raises(ValueError, match="FP8 or bf16"):
        ragged_prefill_attention(q, fp32.k_planes, fp32.v_planes, *args[2:], query_starts=starts, scale=1.0)
