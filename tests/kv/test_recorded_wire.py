"""Envelopes that a release wrote mean the same to the code of now; see recorded_wire/README.md."""

import base64
import importlib.util
import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

from twostroke.kv.codec import Codec
from twostroke.kv.handover.damage import verify_frame, verify_sections
from twostroke.kv.handover.frames import Frame, decode_envelope
from twostroke.kv.handover.machine import Label
from twostroke.kv.section import SectionData
from twostroke.kv.spec import attention_spec

FOLDER = Path(__file__).parent / "recorded_wire"
RELEASES = sorted(path.stem for path in FOLDER.glob("*.json"))
_SPEC = importlib.util.spec_from_file_location("record", FOLDER / "record.py")
assert _SPEC is not None
assert _SPEC.loader is not None
record = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(record)


@pytest.fixture(params=RELEASES)
def recorded(request: pytest.FixtureRequest) -> dict[str, bytes]:
    texts = json.loads((FOLDER / f"{request.param}.json").read_text())
    return {name: base64.b64decode(text) for name, text in texts.items()}


def same(mine: list[SectionData], theirs: tuple[SectionData, ...]) -> None:
    for one, other in zip(mine, theirs, strict=True):
        for field in ("group", "component", "layer_start", "layer_count", "head_start", "head_count", "codec"):
            assert getattr(one, field) == getattr(other, field)
        np.testing.assert_array_equal(one.payload, other.payload)
        np.testing.assert_array_equal(one.digests, other.digests)
        assert (one.scales is None) == (other.scales is None)
        if one.scales is not None and other.scales is not None:
            np.testing.assert_array_equal(one.scales, other.scales)


def frame_of(envelope: bytes) -> Frame:
    frame = decode_envelope(envelope)
    assert isinstance(frame, Frame)
    assert Label.of(frame.header) == record.LABEL
    assert (frame.header.sequence, frame.header.numerics_class, frame.header.token_start) == (9, b"class", 32)
    return frame


def test_the_present_release_is_recorded():
    assert version("twostroke") in RELEASES, "python tests/kv/recorded_wire/record.py"


def test_messages_mean_what_they_meant(recorded):
    for name, message in record.messages().items():
        assert decode_envelope(recorded[name]) == message, name


@pytest.mark.parametrize(("codec", "tokens"), record.FRAMES)
def test_frames_have_their_rows_and_digests_hold(recorded, codec, tokens):
    frame = frame_of(recorded[f"frame of {codec.name}, {tokens} tokens"])
    assert (frame.header.token_count, frame.header.last) == (tokens, True)
    same(record.sections_of(codec, tokens), frame.sections)
    assert verify_frame(frame, record.KEY, attention_spec(3, 2, 8, int(codec)))


def test_frames_of_ranks_and_of_a_fetch(recorded):
    ranks = frame_of(recorded["frame of two ranks"])
    same(record.two_ranks(), ranks.sections)
    assert verify_sections(ranks.sections, 32, 32, record.KEY)
    fetched = frame_of(recorded["fetched frame"])
    assert tuple(fetched.header.identities) == record.FETCHED
    same(record.sections_of(Codec.FP8_E4M3, 32), fetched.sections)


def test_what_is_written_now_is_what_was_recorded():
    """Bytes may change with a reason; then a new release records them, and the old file stays as it is."""
    texts = json.loads((FOLDER / f"{version('twostroke')}.json").read_text())
    assert {name: base64.b64encode(envelope).decode() for name, envelope in record.envelopes().items()} == texts
