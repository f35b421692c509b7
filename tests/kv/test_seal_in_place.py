"""Seals taken where the blocks lie are the definition's, for every block size, codec and partial hash block."""

import numpy as np
import pytest

from twostroke.kernels.cpu import library
from twostroke.kernels.cpu.build import NativeUnavailable
from twostroke.kv.digest import frame_digests, places
from twostroke.kv.planes_cpu import CpuPlanes
from twostroke.kv.spec import CODEC_NAMES, HASH_BLOCK_TOKENS, Component

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
    got = planes.digests_in_place(table[starts // block_tokens], starts % block_tokens, tokens, words, KEY)
    assert got is not None
    assert np.array_equal(got, frame_digests(payload, scales, words, KEY, HASH_BLOCK_TOKENS))
