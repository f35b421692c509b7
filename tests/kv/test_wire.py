"""Envelopes and frames: what goes in comes out, and no damaged bytes do anything but raise WireError."""

import struct
import zlib
from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from twostroke.core.request import Epoch
from twostroke.kv.codec import Codec, payload_bytes, scale_bytes
from twostroke.kv.digest import frame_digests, places
from twostroke.kv.handover.damage import covers, damaged_ranges, verify_frame
from twostroke.kv.handover.frames import (
    Frame,
    FrameLabel,
    SectionData,
    WireError,
    decode_envelope,
    encode_frame,
    encode_message,
    tokens_per_frame,
)
from twostroke.kv.handover.machine import Label
from twostroke.kv.spec import attention_spec
from twostroke.protos import handover_pb2 as pb

KEY = 0x0123456789ABCDEF
LABEL = Label("request-1", 2, Epoch(7, 3))
quick = settings(max_examples=300, deadline=None, derandomize=True)


def section(
    component: str = "k", *, tokens: int = 40, start: int = 16, layers: int = 2, heads: int = 2, codec=Codec.FP8_E4M3
) -> SectionData:
    """A section of random rows, sealed as a store would; width 8."""
    random = np.random.default_rng(abs(hash((component == "k", tokens, start))))
    row_bytes = payload_bytes(codec, 8)
    payload = random.integers(0, 256, (layers, heads, tokens, row_bytes), np.uint8)
    scales = random.integers(1, 255, (layers, heads, tokens), np.uint8) if scale_bytes(codec) else None
    blocks = start // 16 + np.arange(-(-tokens // 16))
    place = places(np.arange(layers)[:, None, None], "kv".index(component), np.arange(heads)[:, None], blocks)
    digests = frame_digests(payload, scales, place, KEY, 16)
    return SectionData("main", component, 0, layers, 0, heads, int(codec), row_bytes, payload, scales, digests)


def frame_bytes(sections=None, *, tokens: int = 40, start: int = 16, is_last: bool = True) -> bytes:
    sections = sections or [section("k", tokens=tokens, start=start), section("v", tokens=tokens, start=start)]
    return encode_frame(FrameLabel(LABEL, 9, b"class", start, tokens), sections, is_last=is_last)


def resealed(envelope: bytes, change) -> bytes:
    """The frame with its header changed and the checksum made right: only the checks of meaning can object."""
    length = struct.unpack_from("<I", envelope, 4)[0]
    header = pb.FrameHeader.FromString(envelope[12 : 12 + length])
    planes = envelope[-(-(12 + length) // 16) * 16 :]
    change(header)
    body = header.SerializeToString()
    head = b"TK" + bytes([1, 2]) + struct.pack("<I", len(body))
    start = head + struct.pack("<I", zlib.crc32(head + body)) + body
    return start + bytes(-len(start) % 16) + planes


@pytest.mark.parametrize(
    "message",
    [
        LABEL.up(1, pb.Open(prompt_ids=range(100), frame_slots=4)),
        LABEL.up(2, pb.Bind()),
        LABEL.down(1, pb.FirstToken(token_id=0)),
        LABEL.down(2, pb.HandoverBeat()),
    ],
)
def test_a_message_comes_back_as_itself_and_of_its_direction(message):
    back = decode_envelope(encode_message(message))
    assert type(back) is type(message)
    assert back == message


@pytest.mark.parametrize("codec", list(Codec))
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 64])
def test_a_frame_comes_back_as_views_and_its_digests_hold(codec, tokens):
    sections = [section("k", tokens=tokens, codec=codec), section("v", tokens=tokens, codec=codec)]
    envelope = frame_bytes(sections, tokens=tokens)
    frame = decode_envelope(envelope)
    assert isinstance(frame, Frame)
    assert Label.of(frame.header) == LABEL
    assert (frame.header.sequence, frame.header.token_start, frame.header.token_count) == (9, 16, tokens)
    whole = np.frombuffer(envelope, np.uint8)
    for mine, theirs in zip(sections, frame.sections, strict=True):
        np.testing.assert_array_equal(mine.payload, theirs.payload)
        np.testing.assert_array_equal(mine.digests, theirs.digests)
        assert (mine.scales is None) == (theirs.scales is None)
        assert np.shares_memory(theirs.payload, whole)
        assert (theirs.payload.ctypes.data - whole.ctypes.data) % 16 == 0
    assert verify_frame(frame, KEY, attention_spec(2, 2, 8, int(codec)))
    assert not verify_frame(frame, KEY + 1)


def test_names_the_damaged_token_ranges():
    sections = [section("k", tokens=72), section("v", tokens=72)]
    for part, token in ((0, 17), (1, 33), (1, 71)):
        sections[part].payload[1, 0, token, 3] ^= 4
    assert damaged_ranges(sections, 16, 72, KEY) == [(32, 32), (80, 8)]
    assert sections[0].scales is not None
    sections[0].scales[0, 1, 0] ^= 1
    assert damaged_ranges(sections, 16, 72, KEY) == [(16, 48), (80, 8)]
    sections[0].digests[0, 0, 3] += np.uint64(1)
    assert damaged_ranges(sections, 16, 72, KEY) == [(16, 72)]


def test_a_frame_in_another_place_is_damaged():
    def move(header):
        header.token_start = 32

    moved = decode_envelope(resealed(frame_bytes(), move))
    assert isinstance(moved, Frame)
    assert damaged_ranges(moved.sections, 32, 40, KEY) == [(32, 40)]

    def swap(header):
        header.sections[0].component, header.sections[1].component = "v", "k"

    swapped = decode_envelope(resealed(frame_bytes(), swap))
    assert not verify_frame(swapped, KEY)


def test_every_flipped_bit_is_seen():
    envelope = frame_bytes([section("k", tokens=17, layers=1, heads=1)], tokens=17)
    for place in range(len(envelope)):
        damaged = bytearray(envelope)
        damaged[place] ^= 1 << (place % 8)
        try:
            frame = decode_envelope(bytes(damaged))
        except WireError:
            continue
        assert isinstance(frame, Frame)
        gap = len(envelope) - len(frame.planes) <= place
        # Only padding between planes may change unseen: nobody reads it.
        assert not verify_frame(frame, KEY) or (gap and 17 * 8 <= place - (len(envelope) - len(frame.planes)) < 144)


@pytest.mark.parametrize("make", [frame_bytes, lambda: encode_message(LABEL.down(1, pb.FirstToken(token_id=77)))])
def test_every_truncation_and_extension_is_refused(make):
    envelope = make()
    for length in range(len(envelope)):
        with pytest.raises(WireError):
            decode_envelope(envelope[:length])
    for extra in (b"\0", bytes(16), b"TK"):
        with pytest.raises(WireError):
            decode_envelope(envelope + extra)


def first(header):
    return header.sections[0]


@pytest.mark.parametrize(
    "change",
    [
        lambda h: setattr(h, "token_start", 8),
        lambda h: setattr(h, "token_start", 2**32 - 16),
        lambda h: setattr(h, "token_count", 0),
        lambda h: setattr(h, "token_count", 41),
        lambda h: setattr(h, "token_count", 2**32 - 1),
        lambda h: h.ClearField("sections"),
        lambda h: h.sections.pop(),
        lambda h: setattr(first(h), "layer_count", 0),
        lambda h: setattr(first(h), "layer_count", 2**32 - 1),
        lambda h: setattr(first(h), "layer_start", 2**32 - 1),
        lambda h: setattr(first(h), "head_start", 1 << 16),
        lambda h: setattr(first(h), "codec", 0),
        lambda h: setattr(first(h), "codec", 2),
        lambda h: setattr(first(h), "row_bytes", 0),
        lambda h: setattr(first(h), "row_bytes", 2**31),
        lambda h: setattr(first(h), "payload_offset", 16),
        lambda h: setattr(first(h), "payload_offset", 2**64 - 16),
        lambda h: setattr(first(h), "payload_bytes", 2**63),
        lambda h: setattr(first(h), "scale_bytes", 0),
        lambda h: setattr(h.sections[1], "payload_offset", first(h).payload_offset),
        lambda h: setattr(h.sections[1], "component", "k"),
        lambda h: first(h).digests.pop(),
        lambda h: h.identities.append(b"short"),
        lambda h: h.identities.extend([bytes(16)] * 3),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(change):
    decode_envelope(resealed(frame_bytes(), lambda header: None))
    with pytest.raises(WireError):
        decode_envelope(resealed(frame_bytes(), change))


def test_refuses_other_versions_kinds_sizes_and_empty_messages():
    envelope = encode_message(LABEL.up(1, pb.Bind()))
    for place, value in ((0, 0), (2, 2), (3, 0), (3, 9)):
        with pytest.raises(WireError):
            decode_envelope(envelope[:place] + bytes([value]) + envelope[place + 1 :])
    with pytest.raises(WireError, match="at most"):
        decode_envelope(envelope, max_bytes=len(envelope) - 1)
    with pytest.raises(WireError, match="without a body"):
        decode_envelope(encode_message(pb.HandoverDown(request_id="r")))


def test_a_frame_must_hold_all_that_the_cache_needs():
    spec = attention_spec(2, 2, 8, int(Codec.FP8_E4M3))
    k, v = section("k"), section("v")
    assert covers([k, v], spec)
    assert not covers([k], spec)
    half = replace(v, layer_count=1, payload=v.payload[:1])
    rest = replace(v, layer_start=1, layer_count=1, payload=v.payload[1:])
    assert not covers([k, half], spec)
    assert covers([k, half, rest], spec)
    assert not covers([k, v], attention_spec(3, 2, 8, 1))
    assert not covers([k, v], attention_spec(2, 2, 16, 1))
    assert not covers([k, replace(v, group="draft")], spec)
    assert not covers([k, replace(v, head_start=1)], spec)
    assert not covers([k, replace(v, layer_start=1)], spec)


def cut(whole: SectionData, layers: slice, heads: slice) -> SectionData:
    shape = whole.payload[layers, heads].shape
    return replace(
        whole,
        layer_start=layers.start,
        layer_count=shape[0],
        head_start=heads.start,
        head_count=shape[1],
        payload=whole.payload[layers, heads],
        scales=whole.scales[layers, heads],
        digests=whole.digests[layers, heads],
    )


ALL = slice(0, 4)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((slice(0, 2), ALL), (slice(2, 4), ALL)),
        ((ALL, slice(0, 3)), (ALL, slice(3, 4))),
        ((slice(1, 2), slice(2, 4)), (slice(3, 4), slice(1, 4))),
    ],
)
def test_parts_of_layers_and_heads_verify_by_themselves(one, other):
    whole = section("k", layers=4, heads=4)
    frame = decode_envelope(frame_bytes([cut(whole, *one), cut(whole, *other)]))
    assert verify_frame(frame, KEY)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((slice(0, 2), ALL), (slice(1, 3), ALL)),
        ((slice(0, 3), ALL), (slice(1, 2), ALL)),
        ((ALL, slice(0, 2)), (ALL, slice(1, 3))),
        ((slice(0, 2), slice(0, 2)), (slice(1, 3), slice(2, 4))),
        ((slice(0, 2), slice(0, 2)), (slice(0, 3), slice(2, 4))),
    ],
)
def test_parts_that_overlap_are_refused(one, other):
    whole = section("k", layers=4, heads=4)
    with pytest.raises(WireError, match="overlap"):
        decode_envelope(frame_bytes([cut(whole, *one), cut(whole, *other)]))


def test_auxiliary_sections_are_left_alone_and_unknown_ones_distrusted():
    k, v = section("k"), section("v")
    assert damaged_ranges([k, v, replace(v, group="draft", component="x")], 16, 40, KEY) == []
    assert damaged_ranges([k, replace(v, component="unheard")], 16, 40, KEY) == [(16, 40)]
    assert damaged_ranges([k, replace(v, component="latent")], 16, 40, KEY) == [(16, 40)]  # known, but not its place


def test_frames_have_whole_hash_blocks_and_one_at_least():
    spec = attention_spec(4, 2, 64, int(Codec.FP8_E4M3))
    assert spec.bytes_per_token == 1040
    assert tokens_per_frame(spec, 1040 * 16) == 16
    assert tokens_per_frame(spec, 1040 * 100) == 96
    assert tokens_per_frame(spec, 1) == 16


@quick
@given(st.binary(max_size=200))
def test_noise_raises_nothing_but_wire_error(noise):
    with pytest.raises(WireError):
        decode_envelope(noise)


@quick
@given(st.data())
def test_damaged_envelopes_raise_nothing_but_wire_error(data):
    base = data.draw(st.sampled_from([frame_bytes(), encode_message(LABEL.up(3, pb.Refetch(token_count=16)))]))
    damaged = bytearray(base)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, min(len(damaged) - 1, 400)))
        damaged[start : start + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    try:
        back = decode_envelope(bytes(damaged))
    except WireError:
        return
    assert isinstance(back, Frame) or bytes(damaged) == base


@quick
@given(st.data())
def test_made_up_headers_raise_nothing_but_wire_error(data):
    """The checksum holds, the meaning is hostile: a frame that passes has planes for all it claims."""

    def change(header):
        small = st.integers(0, 70)
        number = st.one_of(small, st.integers(0, 2**32 - 1))
        for name in data.draw(st.lists(st.sampled_from(["token_start", "token_count"]), max_size=2)):
            setattr(header, name, data.draw(number))
        names = [field.name for field in pb.Section.DESCRIPTOR.fields if field.name not in ("digests", "group")]
        for name in data.draw(st.lists(st.sampled_from(names), max_size=3)):
            target = data.draw(st.sampled_from(list(header.sections)))
            setattr(target, name, data.draw(st.sampled_from(["k", "v"])) if name == "component" else data.draw(number))

    try:
        frame = decode_envelope(resealed(frame_bytes(), change))
    except WireError:
        return
    assert isinstance(frame, Frame)
    assert sum(part.num_bytes for part in frame.sections) <= len(frame.planes)
    verify_frame(frame, KEY, attention_spec(2, 2, 8, 1))
