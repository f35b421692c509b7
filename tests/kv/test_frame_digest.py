"""Digests of planes on their way: the kernels' are the definition's, bit for bit."""

import numpy as np
import pytest

from twostroke.kernels.cpu import library as native
from twostroke.kernels.cpu.build import NativeUnavailable
from twostroke.kv import frame_digest
from twostroke.kv.digest import frame_digests, places
from twostroke.kv.frame_digest import section_digests

KEY = 0x1F3D5B79A2C4E680


@pytest.fixture
def library():
    try:
        return native.load()
    except NativeUnavailable as reason:
        pytest.skip(str(reason))


def planes(shape, *, is_scaled):
    random = np.random.default_rng(1)
    payload = random.integers(0, 256, shape, np.uint8)
    return payload, random.integers(0, 256, shape[:-1], np.uint8) if is_scaled else None


def place_of(layers, heads, tokens, first=5):
    blocks = first + np.arange(-(-tokens // 16))
    return places(np.arange(layers)[:, None, None], 1, np.arange(heads)[:, None], blocks)


@pytest.mark.parametrize("is_scaled", [True, False])
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 64, 100])
@pytest.mark.parametrize("row_bytes", [4, 12, 128])
def test_kernels_and_definition_agree(library, row_bytes, tokens, is_scaled):
    payload, scales = planes((3, 2, tokens, row_bytes), is_scaled=is_scaled)
    place = place_of(3, 2, tokens)
    expected = frame_digests(payload, scales, place, KEY, 16)
    np.testing.assert_array_equal(section_digests(payload, scales, place, KEY), expected)
    payload[2, 1, -1, -1] ^= 1
    changed = section_digests(payload, scales, place, KEY) != expected
    assert changed[2, 1, -1]
    assert changed.sum() == 1


def test_rows_that_the_kernels_cannot_read_are_digested_too(library):
    for payload, scales in (planes((2, 2, 20, 111), is_scaled=True), planes((2, 2, 40, 8), is_scaled=False)):
        part = payload[:, :, : payload.shape[2] // 2]  # not contiguous
        place = place_of(2, 2, part.shape[2])
        part_scales = None if scales is None else scales[:, :, : part.shape[2]]
        expected = frame_digests(np.ascontiguousarray(part), part_scales, place, KEY, 16)
        np.testing.assert_array_equal(section_digests(part, part_scales, place, KEY), expected)


def test_nothing_is_built_for_a_hand_over(monkeypatch):
    class Loader:
        def __call__(self):
            raise AssertionError("it would wait for a compiler")

        def cache_info(self):
            return type("Info", (), {"currsize": 0})

    monkeypatch.setattr(frame_digest.native, "load", Loader())
    payload, scales = planes((1, 1, 20, 8), is_scaled=True)
    place = place_of(1, 1, 20)
    expected = frame_digests(payload, scales, place, KEY, 16)
    np.testing.assert_array_equal(section_digests(payload, scales, place, KEY), expected)
