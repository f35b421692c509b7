"""Intervals and the timeouts over them are one value, and every user takes it from there."""

import re
from pathlib import Path

import pytest

from twostroke.core.errors import ConfigError
from twostroke.core.lease import ENGINE_LEASE, HANDOVER_LEASE, MIN_BEATS, ROUTER_LEASE, WORKER_LEASE, Lease
from twostroke.decode_worker.router_session import SessionTiming
from twostroke.router.routing.fleet import FleetLimits

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("kv", "engine", "router", "worker", "decode_worker", "prefill_worker", "cluster")


@pytest.mark.parametrize(("beat_s", "silence_s"), [(0.5, 0.9), (0.0, 1.0), (-1.0, 1.0), (1.0, 0.0)])
def test_a_lease_that_one_late_beat_would_end_is_refused(beat_s: float, silence_s: float):
    with pytest.raises(ConfigError, match=f"{silence_s} s of silence with a beat every {beat_s} s"):
        Lease(beat_s, silence_s)
    assert Lease(1.0, MIN_BEATS).silence_s == MIN_BEATS


def test_both_ends_of_a_session_take_their_times_from_the_same_leases():
    timing, limits = SessionTiming(), FleetLimits()
    assert (timing.beat_s, limits.silent_after_s) == (WORKER_LEASE.beat_s, WORKER_LEASE.silence_s)
    assert timing.silence_s == ROUTER_LEASE.silence_s
    assert limits.suspect_after_s > WORKER_LEASE.beat_s, "one beat may be late before a worker is suspected"
    assert len({ENGINE_LEASE, HANDOVER_LEASE, WORKER_LEASE, ROUTER_LEASE}) >= 3


def test_no_part_has_a_beat_or_a_silence_of_its_own():
    own = re.compile(r"^\s*\w*(BEAT_S|SILENCE_S|STALE_S|beat_s|silence_s)\b[^=\n]*= *[0-9]", re.MULTILINE)
    files = [file for part in PARTS for file in (ROOT / part).rglob("*.py")]
    assert len(files) > 100
    assert [str(file.relative_to(ROOT)) for file in files if own.search(file.read_text())] == []
