"""Seals taken where the blocks lie are the definition's, for every block size, codec and partial hash block."""

import numpy as np
import pytest
import torch

from twostroke.kernels.cpu import library
from twostroke.kernels.cpu.build import NativeUnavailable
from twostroke.kv.digest import frame_digests, places
from twostroke.kv.section import HeldTokens
from twostroke.kv.spec import CODEC_NAMES, HASH_BLOCK_TOKENS, Component, attention_spec
from twostroke.kv.store.planes_cpu import CpuPlanes, HashBlocks
from twostroke.kv.store.store import KvStore

LAYERS, NUM_BLOCKS, KEY = 3, 7, 0xFEDCBA9876543210


@pytest.mark.parametrize("codec", CODEC_NAMES)
@pytest.mark.parametrize("block_tokens", [16, 32, 64])
@pytest.mark.parametrize("width", [8, 24])
def test_equals_the_definition(codec: str, block_tokens: int, width: int) -> None:
    try:
        library.load()
    except NativeUnavailable as error:
        pytest.skip(str(error))
    component = Component("k", 2, width, CODEC_NAMES[codec])
    planes = CpuPlanes(component, LAYERS, NUM_BLOCKS, block_tokens)
    random = np.random.default_rng(block_tokens + width)
    planes.payload_view[:] = random.integers(0, 256, planes.payload_view.shape, np.uint8)
    if planes.scales_view is not None:
        planes.scales_view[:] = random.integers(0, 256, planes.scales_view.shape, np.uint8)
    table = random.permutation(NUM_BLOCKS)[:3]
    count = 2 * block_tokens + 21 % block_tokens  # the last hash block is partial
    starts = np.arange(0, count, HASH_BLOCK_TOKENS)
    words = places(np.arange(LAYERS)[:, None, None], 0, np.arange(2)[:, None], np.arange(5, 5 + len(starts)))
    payload, scales = planes.gather(table, range(count))
    tokens = np.minimum(count - starts, HASH_BLOCK_TOKENS)
    parts = HashBlocks(table[starts // block_tokens], starts % block_tokens, tokens)
    wanted = frame_digests(payload, scales, words, KEY, HASH_BLOCK_TOKENS)
    assert np.array_equal(planes.digests_in_place(parts, words, KEY), wanted)
    copied, copied_scales, digests = planes.take_in_place(parts, words, KEY)
    assert np.array_equal(digests, wanted)
    assert np.array_equal(copied, payload)
    assert scales is None or np.array_equal(copied_scales, scales)
    target = CpuPlanes(component, LAYERS, NUM_BLOCKS, block_tokens)
    expected = target.payload_view.copy()
    assert target.put_in_place(parts, (copied, copied_scales))
    assert np.array_equal(target.gather(table, range(count))[0], payload)
    assert scales is None or np.array_equal(target.gather(table, range(count))[1], scales)
    others = [block for block in range(NUM_BLOCKS) if block not in table]
    assert np.array_equal(target.payload_view[:, others], expected[:, others])
    assert not target.put_in_place(parts, (copied[:, ::-1], copied_scales))  # not contiguous


@pytest.mark.parametrize("block_tokens", [16, 32])
def test_sealing_several_ranges_at_once_is_sealing_each(block_tokens: int) -> None:
    spec = attention_spec(2, 2, 16, CODEC_NAMES["fp8"])
    stores = [KvStore(spec, 12, block_tokens, digest_key=KEY) for _ in range(2)]
    random = np.random.default_rng(3)
    bytes_of = [random.integers(0, 120, c.payload_view.shape, np.uint8) for c in stores[0].components]  # type: ignore[union-attr]
    for store in stores:
        for component, numbers in zip(store.components, bytes_of, strict=True):
            component.payload.copy_(torch.from_numpy(numbers))
    tables = ([1, 2, 3], [7, 5], [9], [4, 6])
    first = [HeldTokens(t, [3] * len(t), 0, n) for t, n in zip(tables, (40, 16, 5, 32), strict=True)]
    then = [
        HeldTokens(t, [3] * len(t), start, n)
        for t, start, n in ((tables[0], 32, 16), (tables[1], 16, 9), (tables[2], 0, 16))
    ]
    for ranges in (first, then):
        stores[0].seal_all(ranges)
        for held in ranges:
            stores[1].seal(held)
    for mine, theirs in zip(stores[0].components, stores[1].components, strict=True):
        assert np.array_equal(mine.digests, theirs.digests)
    for held in (*first[3:], HeldTokens(tables[0], [3] * 3, 0, 48), HeldTokens(tables[2], [3], 0, 16)):
        assert stores[0].verify(held)
        stores[0].components[0].payload[:, held.block_table[0], 0, 1] ^= 1
        assert not stores[0].verify(held)


@pytest.mark.parametrize("block", [12, 1 << 40, -1])
def test_a_block_that_the_store_has_not_is_never_written(block: int) -> None:
    store = KvStore(attention_spec(2, 2, 16, CODEC_NAMES["fp8"]), 12, 16, digest_key=KEY)
    if store._sealer is None:
        pytest.skip("no native kernels here")
    with pytest.raises(IndexError, match="12 blocks"):
        store._sealer.seal([(3, 0, 1, 0, 16), (block, 0, 1, 1, 16)])
    assert (store._sealed_generation == -1).all()
