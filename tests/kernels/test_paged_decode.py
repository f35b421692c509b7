"""The paged decode kernel, in the interpreter, against float64 attention on what the cache holds."""

from typing import Any

import pytest
import torch

from twostroke.kernels import reference_attention
from twostroke.kernels.gpu import launch, paged_decode
from twostroke.kernels.gpu.paged_decode import paged_decode_attention

LENGTHS = [1, 15, 16, 17, 63, 64, 65, 500]


def queries(count: int, heads: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(count, heads, width, generator=torch.Generator().manual_seed(count * heads)).to(dtype)


def run(cache: Any, q: torch.Tensor, scale: float = 0.125, **options: Any) -> torch.Tensor:
    args = cache.k_planes, cache.v_planes, cache.block_tables, cache.context_lens
    return paged_decode_attention(q, *args, scale=scale, **options)


def relative_error(out: torch.Tensor, cache: Any, q: torch.Tensor, scale: float = 0.125, **options: Any) -> float:
    """Largest over sequences and heads of the error's norm over the oracle's."""
    worst = 0.0
    for s in range(len(q)):
        expected = cache.attend(s, q[s : s + 1], scale, **options)[0]
        worst = max(worst, ((out[s].double() - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item())
    return worst


@pytest.mark.parametrize(("block_tokens", "heads", "group"), [(16, 2, 1), (32, 1, 2), (64, 2, 4), (16, 1, 8)])
def test_equals_float64_at_odd_lengths(make_cache: Any, block_tokens: int, heads: int, group: int) -> None:
    cache = make_cache(LENGTHS, heads=heads, block_tokens=block_tokens)
    q = queries(len(LENGTHS), heads * group, 64, torch.bfloat16)
    wide = run(cache, q.float())
    assert relative_error(wide, cache, q) < 3e-5
    narrow = run(cache, q)
    if launch.interpreted():
        cut = (wide.view(torch.int32) & -0x10000).view(torch.float32).bfloat16()  # how the interpreter makes bf16
        assert ((narrow == cut) | (narrow == wide.bfloat16())).all()
    else:  # rounds to nearest; tensor cores, which take bf16 alone, sum in another order
        assert relative_error(narrow, cache, q) < 2**-8
        assert (narrow == wide.bfloat16()).double().mean() > 0.99


@pytest.mark.parametrize(("width", "group"), [(80, 3), (128, 1)])
def test_widths_and_groups_that_are_no_power_of_two(make_cache: Any, width: int, group: int) -> None:
    cache = make_cache([33, 257], heads=1, width=width)
    q = queries(2, group, width, torch.float32)
    assert relative_error(run(cache, q, 0.1), cache, q, 0.1) < 3e-5


@pytest.mark.parametrize(("window", "softcap"), [(1, None), (64, 2.0), (256, None), (300, 0.5), (None, 5.0)])
@pytest.mark.parametrize("codec", ["fp8", "bf16"])
def test_windows_and_softcaps_over_both_codecs(
    make_cache: Any, codec: str, window: int | None, softcap: float | None
) -> None:
    cache = make_cache([1, 65, 257, 600], heads=1, width=32, codec=codec)
    q = 3 * queries(4, 2, 32, torch.float32)
    out = run(cache, q, 0.2, window=window, softcap=softcap)
    assert relative_error(out, cache, q, 0.2, window=window, softcap=softcap) < 5e-5


@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("codec", ["fp8", "bf16"])
def test_sinks_of_every_size(make_cache: Any, codec: str, window: int | None) -> None:
    cache = make_cache([1, 65, 257, 600], heads=2, width=32, codec=codec)
    q = 3 * queries(4, 6, 32, torch.float32)
    options = {"window": window, "sinks": torch.tensor([-200.0, 0.0, 3.0, 30.0, -4.0, 1.0])}
    out = run(cache, q, 0.2, **options)
    assert relative_error(out, cache, q, 0.2, **options) < 5e-5
    defined = reference_attention.paged_decode_attention(
        q, cache.k_planes, cache.v_planes, cache.block_tables, cache.context_lens, scale=0.2, **options
    )
    assert relative_error(defined, cache, q, 0.2, **options) < 5e-5
    assert relative_error(run(cache, q, 0.2, window=window), cache, q, 0.2, **options) > 0.1
    for s in range(4):  # the same bits in any batch
        args = cache.k_planes, cache.v_planes, cache.block_tables[s : s + 1], cache.context_lens[s : s + 1]
        assert torch.equal(paged_decode_attention(q[s : s + 1], *args, scale=0.2, **options)[0], out[s])
    cache.context_lens[0] = 0
    assert not run(cache, q, 0.2, **options)[0].any()


def test_agrees_with_the_reference_under_large_scores(make_cache: Any) -> None:
    cache = make_cache([300, 64])
    q = 30 * queries(2, 2, 64, torch.float32)
    expected = reference_attention.paged_decode_attention(
        q, cache.k_planes, cache.v_planes, cache.block_tables, cache.context_lens, scale=0.125
    )
    torch.testing.assert_close(run(cache, q), expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_a_row_has_the_same_bits_in_any_batch(make_cache: Any) -> None:
    cache = make_cache([300, 17, 500, 64], heads=1)
    q = queries(4, 2, 64, torch.bfloat16)
    together = run(cache, q)
    for s in range(4):
        one = slice(s, s + 1)
        blocks = -(-int(cache.context_lens[s]) // 16)  # a shorter table means fewer splits in the grid
        args = cache.k_planes, cache.v_planes, cache.block_tables[one, :blocks].contiguous(), cache.context_lens[one]
        assert torch.equal(paged_decode_attention(q[one], *args, scale=0.125)[0], together[s])


def test_every_number_of_the_output_is_written(make_cache: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make_cache([65, 300])
    cache.context_lens[0] = 0  # padding
    q = queries(2, 4, 64, torch.float32)
    honest = torch.empty
    monkeypatch.setattr(paged_decode.torch, "empty", lambda *a, **k: honest(*a, **k).fill_(torch.nan))
    for window in (None, 20):
        out = run(cache, q, window=window)
        assert not out[0].any()
        assert torch.isfinite(out[1]).all()
        assert out[1].any()


def test_what_does_not_fit_is_refused(make_cache: Any) -> None:
    cache = make_cache([5], codec="fp32")
    with pytest.raises(ValueError, match="FP8"):
        run(cache, queries(1, 2, 64, torch.float32))
    cache = make_cache([5])
    with pytest.raises(ValueError, match="query heads"):
        run(cache, queries(1, 3, 64, torch.float32))
    with pytest.raises(ValueError, match="contiguous"):
        run(cache, queries(1, 2, 64, torch.float16))
    with pytest.raises(ValueError, match=r"sinks are torch.float32 \(3,\)"):
        run(cache, queries(1, 2, 64, torch.float32), sinks=torch.zeros(3))
    cache.context_lens = cache.context_lens.long()
    with pytest.raises(ValueError, match="context_lens"):
        run(cache, queries(1, 2, 64, torch.float32))
