"""How long a worker's step loop may stand still, by its own times."""

from __future__ import annotations

import pytest

from twostroke.core.request import Role
from twostroke.router.routing.facts import GpuFacts, LoadFacts, ModelFacts, WorkerFacts, WorkerKey
from twostroke.router.routing.fleet import TICK_S, Fleet
from twostroke.router.routing.known_worker import LEAST_STALL_S, Worker

MODEL = ModelFacts("m", b"w", b"n", "", 4096, 512, False, "/m", 1024)
FACTS = WorkerFacts("w", 1, Role.COMBINED, "w:1", MODEL, 1000, 16, 8, max_batch_tokens=1000)


def stall_s(load: LoadFacts) -> float:
    return Worker(FACTS, 0.0, 0.0, load=load).stall_s(15.0)


def test_without_times_the_longest_patience_counts():
    assert stall_s(LoadFacts(decode_step_ms=5.0)) == 15.0


def test_short_steps_stand_still_after_a_second():
    assert stall_s(LoadFacts(prefill_ms_per_token=0.01, decode_step_ms=5.0)) == LEAST_STALL_S


@pytest.mark.parametrize(
    ("load", "expected_s"),
    [
        (LoadFacts(prefill_ms_per_token=0.5, decode_step_ms=100.0), 5 * (100 + 1000 * 0.5) / 1000),
        (LoadFacts(prefill_ms_per_token=0.25, prefill_ms_per_token_pair=1e-4), 5 * (250 + 1000 * 4096 * 1e-4) / 1000),
        (LoadFacts(prefill_ms_per_token=100.0), 15.0),
    ],
)
def test_long_steps_have_their_time(load: LoadFacts, expected_s: float):
    assert stall_s(load) == pytest.approx(expected_s)


def test_a_throttled_gpu_may_be_slower():
    throttled = GpuFacts("GPU-a", verdict="throttled", slowdown=2.0)
    load = LoadFacts(prefill_ms_per_token=0.5, gpus=(throttled,))
    assert stall_s(load) == pytest.approx(2 * 5 * 500 / 1000)


def test_a_worker_that_hangs_in_a_step_gets_nothing_new_after_a_second_and_its_next_step_ends_that():
    fleet, key = Fleet(), WorkerKey("w", 1)
    fleet.announced(FACTS, 0.0)
    fleet.session_up(key, None, 0.0)
    fleet.loaded(key, LoadFacts(prefill_ms_per_token=0.01, decode_step_ms=5.0), Role.COMBINED, 0.0)
    states = {}
    for number in range(1, 8):
        now_s = number * TICK_S
        fleet.beat(key, now_s, "run", 7)  # its face lives
        fleet.tick(now_s)
        states[number] = fleet.get("w").state.value  # type: ignore[union-attr]
    assert list(states.values()) == ["live"] * 6 + ["suspect"]  # its count last changed at the first beat
    fleet.beat(key, 1.5, "run", 8)
    assert fleet.get("w").state.value == "live"  # type: ignore[union-attr]
