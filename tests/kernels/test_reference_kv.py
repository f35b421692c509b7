"""Token ranges that move between stores, and digests equal to the wire's."""

from typing import Any

import numpy as np
import pytest
import torch

from twostroke.kernels import reference
from twostroke.kernels.reference import Planes
from twostroke.kernels.reference_kv import (
    Rotation,
    Seal,
    digest_keys,
    gather_tokens,
    rotary_store_kv,
    row_digests,
    scatter_tokens,
)
from twostroke.kv import digest as wire

KEYS = [0, 5, 0xFEDCBA9876543210]


def random_store(layers: int, num_blocks: int, heads: int, row_bytes: int, scaled: bool = True) -> Planes:
    generator = torch.Generator().manual_seed(num_blocks)
    shape = (layers, num_blocks, heads, 16, row_bytes)
    payload = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    scales = torch.randint(0, 256, shape[:-1], generator=generator, dtype=torch.uint8)
    return Planes(payload, scales if scaled else None)


@pytest.mark.parametrize("scaled", [True, False])
def test_head_ranges_of_a_token_range_make_the_whole_elsewhere(scaled: bool) -> None:
    source, target = random_store(3, 9, 4, 32, scaled), random_store(3, 6, 4, 32, scaled)
    before = target.payload.clone()
    there, here, tokens = torch.tensor([7, 2, 0]), torch.tensor([5, 1, 3]), range(5, 37)
    for heads in (range(1), range(1, 4)):
        part = gather_tokens(source, there, tokens, heads)
        assert part.payload.shape == (3, len(heads), 32, 32)
        scatter_tokens(target, here, tokens, heads, part)
    for position in range(48):
        ours = target.payload[:, here[position // 16], :, position % 16]
        theirs = source.payload[:, there[position // 16], :, position % 16]
        old = before[:, here[position // 16], :, position % 16]
        assert torch.equal(ours, theirs if position in tokens else old)
        if source.scales is not None and target.scales is not None and position in tokens:
            moved = target.scales[:, here[position // 16], :, position % 16]
            assert torch.equal(moved, source.scales[:, there[position // 16], :, position % 16])
    assert torch.equal(target.payload[:, [0, 2, 4]], before[:, [0, 2, 4]])


def test_a_source_of_another_shape_or_codec_writes_nothing() -> None:
    target = random_store(2, 2, 2, 32)
    before = target.payload.clone()
    for wrong in (random_store(1, 1, 2, 32), random_store(2, 1, 2, 64), random_store(2, 1, 2, 32, scaled=False)):
        part = gather_tokens(wrong, torch.tensor([0]), range(16), range(2))
        with pytest.raises(ValueError, match="the ranges ask for"):
            scatter_tokens(target, torch.tensor([0]), range(16), range(2), part)
    assert torch.equal(target.payload, before)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("row_bytes", [16, 64, 30])
def test_digest_keys_are_the_wire_s(key: int, row_bytes: int) -> None:
    keys, words = digest_keys(key, row_bytes), -(-row_bytes // 4)
    assert np.array_equal(keys.words.numpy().view(np.uint64), wire.key_table(key, 0, 16, words))
    assert np.array_equal(keys.scales.numpy().view(np.uint64), wire.scale_keys(key, 0, 16))


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize(("first", "tokens"), [(0, 16), (32, 16), (48, 7), (23, 5), (31, 1)])
@pytest.mark.parametrize(("row_bytes", "scaled"), [(64, True), (30, True), (64, False)])
def test_row_digests_sum_to_the_wire_s_unit(key: int, first: int, tokens: int, row_bytes: int, scaled: bool) -> None:
    generator = torch.Generator().manual_seed(tokens)
    payload = torch.randint(0, 256, (tokens, 3, row_bytes), generator=generator, dtype=torch.uint8)
    scales = torch.randint(0, 256, (tokens, 3), generator=generator, dtype=torch.uint8) if scaled else None
    seal = Seal(digest_keys(key, row_bytes), layer=300, first_head=2)
    ours = row_digests(Planes(payload, scales), torch.arange(first, first + tokens), seal, component=1).sum(0)
    there = None if scales is None else np.ascontiguousarray(scales.numpy().T)
    place = wire.places(300, 1, np.arange(2, 5), first // 16)
    rows = np.ascontiguousarray(payload.numpy().transpose(1, 0, 2))
    assert np.array_equal(ours.numpy().view(np.uint64), wire.unit_digests(rows, there, place, key, first % 16))


@pytest.mark.parametrize("codec", ["fp8", "bf16", "fp32"])
def test_one_pass_is_rotary_then_store_then_the_digests_of_what_was_stored(make_planes: Any, codec: str) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(9, heads, 32, generator=generator).bfloat16() for heads in (4, 2, 2))
    angles = torch.randn(40, 12, generator=generator)
    positions, slots = torch.arange(14, 23), torch.tensor([14, 15, 32, 33, 34, -1, 36, 37, 38])
    rotation = Rotation(positions, angles.cos(), angles.sin())
    planes, others = ([make_planes(3, 2, 16, 32, codec) for _ in "kv"] for _ in range(2))
    seal = Seal(digest_keys(7, planes[0].payload.shape[-1]), layer=1)
    out = rotary_store_kv(q, k, v, slots, rotation, k_planes=planes[0], v_planes=planes[1], seal=seal)
    turned = reference.rotary(q, k, rotation.cos[positions], rotation.sin[positions])
    stored = reference.store_kv(turned[1], v, slots, *others)
    assert torch.equal(out.q, turned[0])
    assert torch.equal(out.q[..., 24:], q[..., 24:])  # a rotation of 24 of 32 numbers
    assert torch.equal(out.k, stored.k)
    assert torch.equal(out.v, stored.v)
    assert not out.digests[:, 5].any()
    for component, plane in enumerate(planes):
        assert torch.equal(plane.payload, others[component].payload)
        held = np.ascontiguousarray(plane.payload[2, :, :7].numpy())  # positions 16 to 22; 19 is padding
        scales = None if plane.scales is None else np.ascontiguousarray(plane.scales[2, :, :7].numpy())
        expected = np.zeros(2, np.uint64)
        for first, last in ((0, 3), (4, 7)):
            part = None if scales is None else np.ascontiguousarray(scales[:, first:last])
            rows = np.ascontiguousarray(held[:, first:last])
            expected += wire.unit_digests(rows, part, wire.places(1, component, np.arange(2), 1), 7, first)
        assert np.array_equal(out.digests[component, 2:].sum(0).numpy().view(np.uint64), expected)
