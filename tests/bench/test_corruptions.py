"""The campaign of damaged frames: each kind is detected, none of the clean blocks is refused, and it can fail."""

import importlib.util
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


def load(name):
    """A module of bench/ under a name of its own: its folder stays out of the path."""
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def campaign():
    sys.modules["report"] = load("report")
    yield load("corruptions")
    del sys.modules["report"]


def test_every_kind_of_damage_is_detected(campaign):
    done, missed = campaign.corruptions(400)
    assert not missed
    assert set(done) == set(campaign.KINDS)
    assert min(done.values()) >= 20


def test_no_clean_block_is_refused(campaign):
    judged, refused = campaign.clean(8_192)
    assert (judged, refused) == (8_192, 0)


def test_without_digests_damage_is_missed(campaign, monkeypatch):
    monkeypatch.setattr(campaign, "verify_frame", lambda *_: True)
    done, missed = campaign.corruptions(100)
    assert 60 < len(missed) < done.total(), "envelopes have a checksum of their own"
