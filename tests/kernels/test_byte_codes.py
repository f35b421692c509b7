"""The kernels over e5m2 and int8 planes: stored bytes, digests and attention are the definition's."""

from typing import Any

import pytest
import torch

from twostroke.kernels import reference
from twostroke.kernels.gpu.paged_decode import paged_decode_attention
from twostroke.kernels.gpu.ragged_prefill import ragged_prefill_attention
from twostroke.kernels.gpu.rotary_store import rotary_store_kv
from twostroke.kernels.gpu.store_kv import store_kv
from twostroke.kernels.reference import Planes
from twostroke.kernels.reference_kv import Rotation, Seal, digest_keys
from twostroke.kernels.reference_kv import rotary_store_kv as defined

CODECS = pytest.mark.parametrize("codec", ["e5m2", "int8"])


def rows(seed: int, tokens: int = 6) -> torch.Tensor:
    """Keys or values [tokens, 2, 64] of any size, some not finite."""
    x = torch.randn(tokens, 2, 64, generator=torch.Generator().manual_seed(seed))
    x *= torch.logspace(-42, 38, tokens).view(-1, 1, 1)
    x[1, 0] *= torch.logspace(0, -8, 64)  # subnormal codes
    x[2, 1, 5], x[3, 0] = torch.nan, 0.0
    return x


@CODECS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_rows_are_the_definitions(make_planes: Any, codec: str, dtype: torch.dtype) -> None:
    k, v, slots = rows(1).to(dtype), rows(2).to(dtype), torch.tensor([3, 40, 0, 17, -1, 31])
    ours, theirs = ([make_planes(3, 2, 16, 64, codec) for _ in "kv"] for _ in range(2))
    got, wanted = store_kv(k, v, slots, *ours), reference.store_kv(k, v, slots, *theirs)
    for mine, expected in zip((*ours[0][:2], *ours[1][:2]), (*theirs[0][:2], *theirs[1][:2]), strict=True):
        assert torch.equal(mine, expected)
    assert torch.equal(got.non_finite, wanted.non_finite)
    kept = slots >= 0
    assert torch.equal(got.k[kept], wanted.k[kept])
    assert torch.equal(got.v[kept], wanted.v[kept])


@CODECS
def test_rotated_rows_and_their_digests_are_the_definitions(make_planes: Any, codec: str) -> None:
    q, k, v = (torch.randn(5, heads, 64, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 2))
    angles = torch.arange(40).unsqueeze(1) / torch.logspace(0, 3, 32)
    rotation = Rotation(torch.arange(30, 35), angles.cos(), angles.sin())
    slots = torch.arange(14, 19)
    found = []
    for store in (rotary_store_kv, defined):
        planes: list[Planes] = [make_planes(2, 2, 16, 64, codec) for _ in "kv"]
        seal = Seal(digest_keys(7, 64, torch.device("cpu")), 1, 0, 0, 1)
        out = store(q, k, v, slots, rotation, k_planes=planes[0], v_planes=planes[1], seal=seal)
        found.append((*planes[0][:2], *planes[1][:2], out.digests))
    for mine, expected in zip(*found, strict=True):
        assert torch.equal(mine, expected)


@CODECS
def test_attention_is_the_oracles(make_cache: Any, codec: str) -> None:
    cache = make_cache([70, 5], heads=1, width=32, codec=codec)
    q = torch.randn(2, 2, 32, generator=torch.Generator().manual_seed(3))
    decoded = paged_decode_attention(
        q, cache.k_planes, cache.v_planes, cache.block_tables, cache.context_lens, scale=0.2
    )
    for sequence in range(2):
        expected = cache.attend(sequence, q[sequence : sequence + 1], 0.2)[0]
        assert torch.allclose(decoded[sequence].double(), expected, rtol=2.0**-14, atol=2.0**-14 * expected.abs().max())
    starts = torch.tensor([0, 1, 2], dtype=torch.int32)
    prefilled = ragged_prefill_attention(
        q, cache.k_planes, cache.v_planes, cache.block_tables, cache.context_lens, query_starts=starts, scale=0.2
    )
    assert torch.allclose(prefilled, decoded, rtol=2.0**-6, atol=2.0**-6 * float(decoded.abs().max()))


def test_keys_per_channel_and_unlike_codecs_are_refused(make_planes: Any) -> None:
    k = v = torch.zeros(1, 2, 64)
    int8, e5m2 = make_planes(1, 2, 16, 64, "int8"), make_planes(1, 2, 16, 64, "e5m2")
    with pytest.raises(ValueError, match="no kernel for planes of int8_channel"):
        store_kv(k, v, torch.tensor([0]), int8._replace(code="int8_channel"), int8)
    with pytest.raises(ValueError, match="codecs must agree"):
        store_kv(k, v, torch.tensor([0]), int8, e5m2)
    assert (int8.payload == 0xFF).all()
