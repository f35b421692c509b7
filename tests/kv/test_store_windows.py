"""Blocks without their windowed layers in the store, in host memory and on the wire."""

from dataclasses import replace

import numpy as np
import pytest

from twostroke.core.errors import KvCorrupted
from twostroke.core.request import Epoch
from twostroke.kv.block import BlockId
from twostroke.kv.handover.damage import covers, verify_frame
from twostroke.kv.handover.frames import Frame, FrameLabel, decode_envelope, encode_frame
from twostroke.kv.handover.machine import Label
from twostroke.kv.section import HeldTokens, PlaneBuffer
from twostroke.kv.spec import CODEC_NAMES, WindowedLayers, attention_spec
from twostroke.kv.store.host_store import HostStore
from twostroke.kv.store.store import KvStore

KEY = 99
LAYERS, HEADS, WIDTH = 5, 2, 16
WINDOWED = WindowedLayers((0, 2, 3), 20)
FULL = (1, 4)


def spec_of(codec: str = "fp8"):
    return attention_spec(LAYERS, HEADS, WIDTH, CODEC_NAMES[codec]).with_windowed(WINDOWED)


def make_store(codec: str = "fp8", block_tokens: int = 16, seed: int = 0) -> KvStore:
    """A store full of arbitrary bytes that are finite numbers."""
    store = KvStore(spec_of(codec), 24, block_tokens, digest_key=KEY)
    random = np.random.default_rng(seed)
    for component in store.components:
        component.payload.numpy()[...] = random.integers(0, 0x70, component.payload.shape, np.uint8)
        if component.scales is not None:
            component.scales.numpy()[...] = random.integers(100, 140, component.scales.shape, np.uint8)
    return store


def held(tokens: int, start: int = 0, block_tokens: int = 16, first: int = 3) -> HeldTokens:
    count = -(-tokens // block_tokens)
    table = [BlockId((first + 5 * i) % 24) for i in range(count)]
    return HeldTokens(table, [7 + i for i in range(count)], start, tokens - start)


@pytest.mark.parametrize("codec", ["fp8", "bfloat16", "float32"])
@pytest.mark.parametrize("block_tokens", [16, 64])
def test_full_layers_alone_are_sent_stored_and_verified(codec: str, block_tokens: int):
    source, target = make_store(codec, block_tokens), make_store(codec, block_tokens, seed=1)
    whole, there = held(200, 0, block_tokens), held(200, 0, block_tokens, first=4)
    source.seal(whole)
    sections = source.read_tokens(replace(whole, count=128), without_windows=True)
    assert [(s.component, s.layer_start, s.layer_count) for s in sections] == [
        *[("k", 1, 1), ("k", 4, 1), ("v", 1, 1), ("v", 4, 1)]
    ]
    every = source.read_tokens(replace(whole, count=128))
    for section in sections:
        full = next(s for s in every if s.component == section.component)
        assert np.array_equal(section.payload[0], full.payload[section.layer_start])
        assert np.array_equal(section.digests[0], full.digests[section.layer_start])
    label = FrameLabel(Label("r", 0, Epoch(1, 1)), 1, b"", 0, 128)
    frame = decode_envelope(encode_frame(label, sections, is_last=False))
    assert isinstance(frame, Frame)
    assert verify_frame(frame, KEY, spec_of(codec), windows_from=128)
    assert not verify_frame(frame, KEY, spec_of(codec), windows_from=112), "its windowed layers are awaited"
    assert not verify_frame(frame, KEY, attention_spec(LAYERS, HEADS, WIDTH, CODEC_NAMES[codec]), windows_from=128)

    first, last = replace(there, count=128), replace(there, start=128, count=72)
    target.write_tokens(first, frame.sections)
    target.write_tokens(last, source.read_tokens(replace(whole, start=128, count=72)))
    assert target.verify(there)
    assert target.parts(there) == [(first, True), (last, False)]
    for section in target.read_tokens(first, without_windows=True):
        sent = next(s for s in sections if (s.component, s.layer_start) == (section.component, section.layer_start))
        assert np.array_equal(section.payload, sent.payload)
        assert np.array_equal(section.digests, sent.digests)
    for component in target.components:
        for block in first.block_table[: 128 // block_tokens]:
            assert not component.payload[list(WINDOWED.layers), block].any(), "nothing of an earlier use is left"
            assert component.payload[list(FULL), block].any()


def test_what_is_not_there_is_never_read_for_a_peer():
    store, source = make_store(), make_store()
    source.seal(held(64))
    store.write_tokens(held(32), source.read_tokens(held(32), without_windows=True))
    store.write_tokens(held(64, 32), source.read_tokens(held(64, 32)))
    for wanted in (held(32), held(64), held(32, 16), held(48, 16)):
        with pytest.raises(KvCorrupted, match="without its windowed layers"):
            store.read_tokens(wanted)
    assert len(store.read_tokens(held(64, 32))) == 2
    assert store.read_tokens(held(64), without_windows=True)[0].layer_start == 1


def test_damage_in_a_full_layer_is_seen_and_what_lies_in_a_missing_layer_is_nobodys():
    store, source = make_store(), make_store(seed=2)
    source.seal(held(32))
    store.write_tokens(held(32), source.read_tokens(held(32), without_windows=True))
    block = held(32).block_table[1]
    store.components[0].payload[0, block] += 1
    assert store.verify(held(32))
    store.components[1].payload[4, block, 0, 3, 5] += 1
    assert not store.verify(held(32))
    assert store.verify(held(16))


def test_layers_that_are_computed_later_are_there_again():
    store, source = make_store(), make_store()
    source.seal(held(64))
    for together in (False, True):
        store.write_tokens(held(64), source.read_tokens(held(64), without_windows=True))
        computed = held(64, 32)
        if together:
            store.seal_all([computed])
        else:
            store.seal(computed)
        assert [(part.start, part.count, lacks) for part, lacks in store.parts(held(64))] == [
            (0, 32, True),
            (32, 32, False),
        ]
        assert len(store.read_tokens(computed)) == 2
    store.write_tokens(held(64), source.read_tokens(held(64)))
    assert store.parts(held(64)) == [(held(64), False)]


def test_a_block_that_came_before_the_ones_in_front_of_it_is_computed_with_them():
    store, source = make_store(), make_store()
    source.seal(held(48))
    store.write_tokens(held(48, 16), source.read_tokens(held(48, 16), without_windows=True))
    store.seal_all([held(48)])  # the first block never came
    assert store.parts(held(48)) == [(held(48), False)]
    assert len(store.read_tokens(held(48))) == 2


def test_another_use_of_a_block_lacks_nothing():
    store, source = make_store(), make_store()
    source.seal(held(32))
    store.write_tokens(held(32), source.read_tokens(held(32), without_windows=True))
    again = HeldTokens(held(32).block_table, [50, 51], 0, 32)
    store.seal_all([again])
    assert store.parts(again) == [(again, False)]
    assert store.verify(again)


def test_a_swap_keeps_what_is_missing_missing():
    store, source = make_store(), make_store()
    source.seal(held(77))
    store.write_tokens(held(48), source.read_tokens(held(48), without_windows=True))
    store.write_tokens(held(77, 48), source.read_tokens(held(77, 48)))
    host = HostStore(store, store.on_host(12))
    there = HeldTokens([BlockId(11 - i) for i in range(5)], [3] * 5, 0, 77)
    host.swap_out(held(77), there)
    back = HeldTokens([BlockId(i) for i in (20, 9, 1, 12, 14)], [60] * 5, 0, 77)
    assert host.swap_in(there, back)
    assert [lacks for _, lacks in store.parts(back)] == [True, False]
    with pytest.raises(KvCorrupted):
        store.read_tokens(back)
    for mine, theirs in zip(
        store.read_tokens(replace(back, count=48), without_windows=True),
        source.read_tokens(held(48), without_windows=True),
        strict=True,
    ):
        assert np.array_equal(mine.payload, theirs.payload)


def test_sections_must_be_all_layers_or_all_but_the_windowed_ones():
    store, source = make_store(), make_store()
    source.seal(held(32))
    full = source.read_tokens(held(32), without_windows=True)
    k1, k4, v1, v4 = full
    every = source.read_tokens(held(32))
    for sections in ([k1, v1, v4], [k1, k1, v1, v4], [every[0], v1, v4], [k1, replace(k4, layer_start=2), v1, v4]):
        with pytest.raises(KvCorrupted, match="not each one once"):
            store.write_tokens(held(32), sections)
    assert not covers([k1, replace(k4, layer_start=2), v1, v4], spec_of(), without_windows=True)
    assert not covers([every[0], v1, v4], spec_of(), without_windows=True)
    assert not covers([k1, v1, v4], spec_of(), without_windows=True)
    assert covers(full, spec_of(), without_windows=True)
    assert covers(every, spec_of(), without_windows=True)
    assert not covers(full, spec_of())
    assert not store.is_sealed(held(32))


def test_planes_are_read_into_memory_as_a_frame_needs_them():
    source = make_store()
    source.seal(held(32))
    memory = memoryview(bytearray(1 << 16))
    sections = source.read_tokens(held(32), PlaneBuffer(memory), without_windows=True)
    place = 0
    for section, plain in zip(sections, source.read_tokens(held(32), without_windows=True), strict=True):
        for plane, other in ((section.payload, plain.payload), (section.scales, plain.scales)):
            assert plane is not None
            assert np.array_equal(np.frombuffer(memory, np.uint8, plane.size, place), other.reshape(-1))
            place += plane.size


def test_another_codec_is_translated_and_sealed():
    source, target = make_store("fp8"), make_store("bfloat16", seed=3)
    source.seal(held(32))
    target.write_tokens(held(32), source.read_tokens(held(32), without_windows=True))
    assert target.verify(held(32))
    with pytest.raises(KvCorrupted):
        target.read_tokens(held(32))
