"""Rotation, store and digest in one pass, in the interpreter: equal to the definition and to the wire's digests."""

from typing import Any

import numpy as np
import pytest
import torch

from twostroke.kernels import reference_kv
from twostroke.kernels.gpu import rotary_store
from twostroke.kernels.gpu.rotary_store import rotary_store_kv
from twostroke.kernels.reference import Planes
from twostroke.kernels.reference_kv import Rotation, Seal, digest_keys
from twostroke.kv import digest as wire

KEY = 0xFEDCBA9876543210


def projection(tokens: int, heads: tuple[int, int], width: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """q, k and v as parts of one fused matrix, over many magnitudes."""
    generator = torch.Generator().manual_seed(tokens * width)
    fused = torch.randn(tokens, heads[0] + 2 * heads[1], width, generator=generator)
    fused *= torch.exp(10 * torch.randn(tokens, heads[0] + 2 * heads[1], 1, generator=generator))
    return list(fused.to(dtype).split([heads[0], heads[1], heads[1]], dim=1))


def rotation(positions: torch.Tensor, half: int) -> Rotation:
    angles = torch.arange(int(positions.max()) + 1).unsqueeze(1) / 100.0 ** (torch.arange(half) / half)
    return Rotation(positions, angles.cos(), angles.sin())


def slots_of(positions: torch.Tensor, block_tokens: int) -> torch.Tensor:
    """Blocks in reverse order, an offset that is the position's."""
    return (len(positions) // block_tokens + 1 - positions // block_tokens) * block_tokens + positions % block_tokens


def assert_equal(mine: Any, other: Any) -> None:
    for a, b in zip(mine, other, strict=True):
        if b is not None:
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = torch.empty

    def poisoned(*args: Any, **options: Any) -> torch.Tensor:
        out = honest(*args, **options)
        return out.fill_(torch.nan if out.is_floating_point() else -7)

    monkeypatch.setattr(rotary_store.torch, "empty", poisoned)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("codec", ["fp8", "bf16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "shape", [(1, (1, 1), 64, 32, 16), (17, (4, 2), 16, 8, 16), (5, (6, 3), 80, 16, 32), (3, (20, 1), 128, 64, 64)]
)
def test_equals_the_definition(
    make_planes: Any, shape: tuple[int, tuple[int, int], int, int, int], dtype: torch.dtype, codec: str
) -> None:
    tokens, heads, width, half, block_tokens = shape
    q, k, v = projection(tokens, heads, width, dtype)
    turn = rotation(torch.arange(tokens), half)
    slots = slots_of(turn.positions, block_tokens)
    blocks = (tokens // block_tokens + 2, heads[1], block_tokens, width, codec)
    ours, theirs = ([make_planes(*blocks) for _ in "kv"] for _ in range(2))
    seal = Seal(digest_keys(KEY, ours[0].payload.shape[-1]), layer=1, first_head=3)
    mine = rotary_store_kv(q, k, v, slots, turn, k_planes=ours[0], v_planes=ours[1], seal=seal)
    other = reference_kv.rotary_store_kv(q, k, v, slots, turn, k_planes=theirs[0], v_planes=theirs[1], seal=seal)
    assert_equal(mine, other)
    for planes, definition in zip(ours, theirs, strict=True):
        assert_equal(planes, definition)


@pytest.mark.usefixtures("poison")
def test_padding_and_rows_that_are_not_finite(make_planes: Any) -> None:
    q, k, v = projection(6, (2, 2), 16, torch.bfloat16)
    k[1, 0, 3], v[1, 1, 0], k[4, 1, 15], q[2, 0, 0] = torch.nan, torch.inf, -torch.inf, torch.nan
    turn, slots = rotation(torch.arange(20, 26), 8), torch.tensor([4, 5, 6, -1, -1, 9])
    ours, theirs = ([make_planes(1, 2, 16, 16) for _ in "kv"] for _ in range(2))
    seal = Seal(digest_keys(0, 16), layer=0)
    mine = rotary_store_kv(q, k, v, slots, turn, k_planes=ours[0], v_planes=ours[1], seal=seal)
    other = reference_kv.rotary_store_kv(q, k, v, slots, turn, k_planes=theirs[0], v_planes=theirs[1], seal=seal)
    assert mine.non_finite.tolist() == [0, 2, 0, 0, 0, 0]
    assert not mine.digests[:, 3:5].any()
    assert_equal([x.nan_to_num(7.0) for x in mine], [x.nan_to_num(7.0) for x in other])
    for planes, definition in zip(ours, theirs, strict=True):
        assert_equal(planes, definition)


@pytest.mark.parametrize(("first", "tokens"), [(0, 4), (25, 7), (47, 1)])
@pytest.mark.parametrize("codec", ["fp8", "bf16"])
def test_digests_sum_to_the_wire_s_in_any_part(make_planes: Any, first: int, tokens: int, codec: str) -> None:
    q, k, v = projection(tokens, (3, 3), 64, torch.bfloat16)
    planes: list[Planes] = [make_planes(1, 3, 16, 64, codec) for _ in "kv"]
    turn = rotation(torch.arange(first, first + tokens), 32)
    seal = Seal(
        digest_keys(KEY, planes[0].payload.shape[-1]), layer=65535, first_head=5, k_component=4, v_component=255
    )
    out = rotary_store_kv(q, k, v, turn.positions % 16, turn, k_planes=planes[0], v_planes=planes[1], seal=seal)
    held = slice(first % 16, first % 16 + tokens)
    for digests, plane, component in zip(out.digests, planes, (4, 255), strict=True):
        scales = None if plane.scales is None else np.ascontiguousarray(plane.scales[0, :, held].numpy())
        place = wire.places(65535, component, np.arange(5, 8), first // 16)
        payload = np.ascontiguousarray(plane.payload[0, :, held].numpy())
        expected = wire.unit_digests(payload, scales, place, KEY, first % 16)
        assert np.array_equal(digests.sum(0).numpy().view(np.uint64), expected)


def test_what_does_not_fit_is_refused_and_nothing_written(make_planes: Any) -> None:
    q, k, v = projection(4, (4, 2), 64, torch.bfloat16)
    planes = [make_planes(1, 2, 16, 64) for _ in "kv"]
    turn, seal = rotation(torch.arange(4), 32), Seal(digest_keys(0, 64), layer=0)

    def run(
        q: torch.Tensor = q, turn: Rotation = turn, seal: Seal = seal, planes: list[Planes] = planes
    ) -> reference_kv.RotaryStored:
        return rotary_store_kv(q, k, v, torch.arange(4), turn, k_planes=planes[0], v_planes=planes[1], seal=seal)

    with pytest.raises(ValueError, match="q is"):
        run(q=q.float())
    with pytest.raises(ValueError, match="positions"):
        run(turn=turn._replace(positions=turn.positions.int()))
    with pytest.raises(ValueError, match="64 wide"):
        run(turn=rotation(torch.arange(4), 40))
    with pytest.raises(ValueError, match="words"):
        run(seal=Seal(digest_keys(0, 128), layer=0))
    with pytest.raises(ValueError, match="FP8 or bf16"):
        run(planes=[make_planes(1, 2, 16, 64, "fp32") for _ in "kv"])
    assert all((plane.payload == 0xFF).all() for plane in planes)
