"""The definitions against independent oracles, and what deterministic mode needs: bits that no batch changes."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import (
    LlamaConfig,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from twostroke.kernels import reference, reference_attention
from twostroke.kernels.reference import Planes

LENGTHS = [1, 15, 16, 17, 63, 64, 65, 500]
CODECS = ["fp8", "bf16", "fp32"]


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_rms_norm_is_llama_s() -> None:
    x, weight = normal(7, 96) * 5, normal(96, seed=1)
    theirs = LlamaRMSNorm(96, eps=1e-5)
    theirs.weight.data = weight
    torch.testing.assert_close(reference.rms_norm(x, weight, 1e-5), theirs(x))
    narrow = reference.rms_norm(x.bfloat16(), weight.bfloat16(), 1e-5)
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), theirs(x), rtol=2e-2, atol=2e-2)


def test_rotary_is_llama_s() -> None:
    config = LlamaConfig(hidden_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    positions = torch.tensor([[0, 1, 5, 4000, 77]])
    cos, sin = LlamaRotaryEmbedding(config)(normal(1), positions)
    q, k = normal(5, 4, 64), normal(5, 2, 64, seed=1)
    theirs = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    ours = reference.rotary(q, k, cos[0, :, :32], sin[0, :, :32])
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other[0].transpose(0, 1))


def test_silu_mul_takes_the_gate_first() -> None:
    gate, up = normal(5, 33), normal(5, 33, seed=1)
    expected = gate.double() / (1 + torch.exp(-gate.double())) * up.double()
    torch.testing.assert_close(reference.silu_mul(torch.cat((gate, up), -1)).double(), expected, rtol=1e-6, atol=1e-6)


def test_pointwise_operations_give_a_row_the_same_bits_in_any_batch(threads: int) -> None:
    x, weight = normal(65, 256), normal(256)
    cos, sin = normal(65, 32).cos(), normal(65, 32).sin()
    q = x.view(65, 4, 64)
    norm, act = reference.rms_norm(x, weight, 1e-5), reference.silu_mul(x)
    turned, _ = reference.rotary(q, q, cos, sin)
    for row in (0, 1, 31, 64):
        one = slice(row, row + 1)
        assert torch.equal(reference.rms_norm(x[one], weight, 1e-5), norm[one])
        assert torch.equal(reference.silu_mul(x[one]), act[one])
        assert torch.equal(reference.rotary(q[one], q[one], cos[one], sin[one])[0], turned[one])


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("block_tokens", [16, 32, 64])
def test_store_writes_its_slots_only_and_returns_what_they_hold(
    make_planes: Any, codec: str, block_tokens: int
) -> None:
    k, v = normal(9, 3, 32), normal(9, 3, 32, seed=1)
    k_planes, v_planes = make_planes(4, 3, block_tokens, 32, codec), make_planes(4, 3, block_tokens, 32, codec)
    slots = torch.randperm(4 * block_tokens, generator=torch.Generator().manual_seed(2))[:9]
    slots[4] = -1
    stored = reference.store_kv(k, v, slots, k_planes, v_planes)
    assert stored.non_finite.tolist() == [0] * 9
    for planes, rounded, given in ((k_planes, stored.k, k), (v_planes, stored.v, v)):
        numbers, scales = reference.decode_rows(planes, 32)
        numbers = numbers if scales is None else numbers * scales.unsqueeze(-1)
        by_slot = numbers.transpose(1, 2).reshape(-1, 3, 32)
        kept = slots >= 0
        assert torch.equal(by_slot[slots[kept]], rounded[kept])
        torch.testing.assert_close(rounded, given, rtol={"fp8": 1 / 15, "bf16": 1 / 250, "fp32": 0}[codec], atol=1e-2)
        others = torch.ones(len(by_slot), dtype=torch.bool).index_fill(0, slots[kept], False)
        assert by_slot[others].isnan().all()


@pytest.mark.parametrize("codec", CODECS)
def test_store_counts_non_finite_rows_by_token_and_stores_them_as_zeros(make_planes: Any, codec: str) -> None:
    k, v = normal(5, 2, 16), normal(5, 2, 16, seed=1)
    k[1, 0, 3], k[1, 1, 0], v[1, 1, 5] = torch.nan, torch.inf, -torch.inf
    v[3, 0, 15] = torch.nan
    k[4, 0, 0] = torch.nan
    stored = reference.store_kv(
        k, v, torch.tensor([0, 1, 2, 3, -1]), make_planes(1, 2, 16, 16, codec), make_planes(1, 2, 16, 16, codec)
    )
    assert stored.non_finite.tolist() == [0, 3, 0, 1, 0]  # the last is padding
    assert not stored.k[1].any()
    assert not stored.v[1, 1].any()
    assert stored.v[1, 0].any()
    assert torch.isfinite(stored.k).all()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("block_tokens", "group"), [(16, 1), (32, 2), (64, 4), (16, 8)])
def test_attention_equals_float64_at_odd_lengths(make_cache: Any, codec: str, block_tokens: int, group: int) -> None:
    cache = make_cache(LENGTHS, block_tokens=block_tokens, codec=codec)
    q = [normal(length, 2 * group, 64, seed=length) for length in LENGTHS]
    starts = torch.tensor([0, *LENGTHS]).cumsum(0)
    tables, contexts = cache.block_tables, cache.context_lens
    whole = reference_attention.ragged_prefill_attention(
        torch.cat(q), cache.k_planes, cache.v_planes, tables, contexts, query_starts=starts, scale=0.125
    )
    newest = torch.stack([rows[-1] for rows in q])
    last = reference_attention.paged_decode_attention(
        newest, cache.k_planes, cache.v_planes, tables, contexts, scale=0.125
    )
    for s in range(len(LENGTHS)):
        expected = cache.attend(s, q[s], 0.125)
        tolerance = 2e-6 * cache.v[s].abs().max().item()
        torch.testing.assert_close(whole[starts[s] : starts[s + 1]].double(), expected, rtol=2e-5, atol=tolerance)
        torch.testing.assert_close(last[s].double(), expected[-1], rtol=2e-5, atol=tolerance)


@pytest.mark.parametrize(("threads", "group"), [(1, 1), (1, 8), (2, 2)], indirect=["threads"])
def test_attention_has_the_same_bits_in_any_batch_chunk_and_block_size(
    make_cache: Any, threads: int, group: int
) -> None:
    lengths = [130, 1, 64, 260, 17]
    by_size = {size: make_cache(lengths, block_tokens=size) for size in (16, 64)}
    q = [normal(length, 2 * group, 64, seed=length) for length in lengths]
    bits: dict[int, list[torch.Tensor]] = {}
    for size, cache in by_size.items():
        bits[size] = [run_chunks(cache, s, q[s], [lengths[s]]) for s in range(len(lengths))]
        # Cut into chunks, and one by one as decode does.
        for cuts in ([1, 129], [64, 66], [7, 16, 41, 66], [129, 1]):
            assert torch.equal(run_chunks(cache, 0, q[0], cuts), bits[size][0])
        for position in (0, 15, 16, 63, 64, 129):
            args = cache.k_planes, cache.v_planes, cache.block_tables[:1], torch.tensor([position + 1])
            alone = reference_attention.paged_decode_attention(q[0][position : position + 1], *args, scale=0.125)
            assert torch.equal(alone[0], bits[size][0][position])
        # In a batch whose longest context is longer than its own.
        newest = torch.stack([rows[-1] for rows in q])
        args = cache.k_planes, cache.v_planes, cache.block_tables, cache.context_lens
        together = reference_attention.paged_decode_attention(newest, *args, scale=0.125)
        assert torch.equal(together, torch.stack([rows[-1] for rows in bits[size]]))
    for small, large in zip(bits[16], bits[64], strict=True):
        assert torch.equal(small, large)


@pytest.mark.parametrize("codec", ["fp8", "bf16"])
@pytest.mark.parametrize(
    ("window", "softcap", "sinks"),
    [(1, None, None), (64, 2.0, None), (100, None, None), (None, 0.5, None), (64, None, (-90.0, 0.0, 2.0, 50.0))],
)
def test_windows_softcaps_and_sinks_equal_float64(
    make_cache: Any, codec: str, window: int | None, softcap: float | None, sinks: tuple[float, ...] | None
) -> None:
    lengths = [1, 65, 200]
    cache = make_cache(lengths, codec=codec)
    q = [3 * normal(length, 4, 64, seed=length) for length in lengths]
    args = cache.k_planes, cache.v_planes, cache.block_tables, cache.context_lens
    sunk = None if sinks is None else torch.tensor(sinks)
    options = {"scale": 0.125, "window": window, "softcap": softcap, "sinks": sunk}
    starts = torch.tensor([0, *lengths]).cumsum(0)
    whole = reference_attention.ragged_prefill_attention(torch.cat(q), *args, query_starts=starts, **options)
    last = reference_attention.paged_decode_attention(torch.stack([rows[-1] for rows in q]), *args, **options)
    for s, rows in enumerate(whole.split(lengths)):
        expected = cache.attend(s, q[s], **options)
        tolerance = 2e-6 * cache.v[s].abs().max().item()
        torch.testing.assert_close(rows.double(), expected, rtol=2e-5, atol=tolerance)
        assert torch.equal(last[s], rows[-1])


def run_chunks(cache: Any, sequence: int, q: torch.Tensor, cuts: list[int]) -> torch.Tensor:
    done, out = 0, []
    for cut in cuts:
        args = cache.k_planes, cache.v_planes, cache.block_tables[sequence : sequence + 1], torch.tensor([done + cut])
        starts = torch.tensor([0, cut])
        out.append(
            reference_attention.ragged_prefill_attention(q[done : done + cut], *args, query_starts=starts, scale=0.125)
        )
        done += cut
    return torch.cat(out)


def test_padding_sequences_give_zeros(make_cache: Any) -> None:
    cache = make_cache([5, 20])
    contexts = torch.tensor([0, 20], dtype=torch.int32)
    args = cache.k_planes, cache.v_planes, cache.block_tables, contexts
    out = reference_attention.paged_decode_attention(normal(2, 2, 64), *args, scale=0.125)
    assert not out[0].any()
    assert out[1].any()
    empty = torch.zeros(0, dtype=torch.int32)
    none = reference_attention.paged_decode_attention(
        normal(0, 2, 64), *args[:2], cache.block_tables[:0], empty, scale=0.125
    )
    assert none.shape == (0, 2, 64)


def test_planes_know_their_block_size(make_planes: Any) -> None:
    planes: Planes = make_planes(2, 3, 32, 8)
    assert planes.block_tokens == 32
