"""Head ranges that move between stores, and digests equal to the wire's."""

from typing import Any

import numpy as np
import pytest
import torch

from twostroke.kernels.reference import Planes
from twostroke.kernels.reference_kv import gather_blocks, scatter_blocks, unit_digests
from twostroke.kv import digest as wire

KEY = 0xFEDCBA9876543210


def random_planes(num_blocks: int, heads: int, block_tokens: int, row_bytes: int, scaled: bool = True) -> Planes:
    generator = torch.Generator().manual_seed(num_blocks)
    payload = torch.randint(
        0, 256, (num_blocks, heads, block_tokens, row_bytes), generator=generator, dtype=torch.uint8
    )
    scales = torch.randint(0, 256, payload.shape[:3], generator=generator, dtype=torch.uint8)
    return Planes(payload, scales if scaled else None)


@pytest.mark.parametrize("scaled", [True, False])
def test_head_ranges_gathered_from_two_shards_make_the_whole(make_planes: Any, scaled: bool) -> None:
    source = random_planes(9, 4, 16, 32, scaled)
    target = make_planes(6, 4, 16, 32, "fp8" if scaled else "bf16")
    target = target if scaled else Planes(target.payload[..., :32].contiguous(), None)
    there, here = torch.tensor([7, 2, 0]), torch.tensor([5, 1, 3])
    for first, last in ((0, 1), (1, 4)):
        scatter_blocks(target, here, first, gather_blocks(source, there, first, last))
    assert torch.equal(target.payload[here], source.payload[there])
    assert (target.payload[[0, 2, 4]] == 0xFF).all()
    if source.scales is not None:
        assert torch.equal(target.scales[here], source.scales[there])
        assert (target.scales[[0, 2, 4]] == 0xFF).all()


def test_a_source_of_another_shape_or_codec_writes_nothing(make_planes: Any) -> None:
    target = make_planes(2, 2, 16, 32)
    for wrong in (random_planes(1, 2, 32, 32), random_planes(1, 2, 16, 64), random_planes(1, 2, 16, 32, scaled=False)):
        with pytest.raises(ValueError, match="the store's are"):
            scatter_blocks(target, torch.tensor([0]), 0, wrong)
    assert (target.payload == 0xFF).all()


def as_int64(numbers: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(numbers.view(np.int64).copy())


@pytest.mark.parametrize("tokens", [1, 7, 16])
@pytest.mark.parametrize("scaled", [True, False])
def test_digests_equal_the_wire_s(tokens: int, scaled: bool) -> None:
    blocks = random_planes(12, 3, tokens, 64, scaled)
    place = wire.places(5, 1, np.arange(2, 5), np.arange(100, 112)[:, None])
    scales = None if blocks.scales is None else blocks.scales.numpy()
    expected = wire.unit_digests(blocks.payload.numpy(), scales, place, KEY)
    multiplier, addend = wire.place_keys(place, KEY)
    ours = unit_digests(
        blocks,
        as_int64(wire.key_table(KEY, 0, tokens, 16)),
        as_int64(wire.scale_keys(KEY, 0, tokens)),
        as_int64(multiplier),
        as_int64(addend),
    )
    assert np.array_equal(ours.numpy().view(np.uint64), expected)
