"""The planner's law: behaviour by transcripts of tests/scenarios/planner, and properties for any load."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.clusters.planned import Toy, transcript

from twostroke.cluster.planner.config import PlannerConfig
from twostroke.cluster.planner.decision import ChangeRole, Drain, Hold, Stop
from twostroke.cluster.planner.queueing import (
    DecodeLimits,
    DecodeLoad,
    PrefillLoad,
    PrefillTarget,
    decode_workers,
    prefill_workers,
)
from twostroke.core.request import Role

SCENARIOS = sorted((Path(__file__).parents[2] / "scenarios" / "planner").glob("*.txt"))
TARGET = PrefillTarget(2.0, 0.99, 0.9)
loads = st.floats(0, 40, allow_nan=False)


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_scenario(path: Path, request) -> None:
    said = transcript(path.read_text())
    if request.config.getoption("--rewrite"):
        path.write_text(said)
    assert said == path.read_text()


@settings(deadline=None, max_examples=40)
@given(loads, loads, st.floats(0, 100), st.floats(0.001, 1.0), st.floats(0, 8))
def test_more_prompts_never_need_fewer_workers(work, more, backlog_s, mean_s, variability) -> None:
    less = prefill_workers(PrefillLoad(work, backlog_s, mean_s, variability), TARGET)
    assert prefill_workers(PrefillLoad(work + more, backlog_s, mean_s, variability), TARGET) >= less
    assert prefill_workers(PrefillLoad(work, backlog_s + more, mean_s, variability), TARGET) >= less
    assert less * TARGET.busy >= work


@settings(deadline=None, max_examples=40)
@given(st.floats(0, 1e6), st.floats(0, 1e6), st.floats(0, 100), st.floats(1, 30), st.floats(0, 1e-3))
def test_more_streams_never_need_fewer_workers(kv, more, sequences, base_ms, slope) -> None:
    limits = DecodeLimits(40.0, 1e6, 200.0, base_ms, slope)
    less = decode_workers(DecodeLoad(kv, sequences), limits)
    assert decode_workers(DecodeLoad(kv + more, sequences), limits) >= less
    assert limits.step_ms(DecodeLoad(kv, sequences), less) <= 40.0 + 1e-9


@settings(deadline=None, max_examples=15)
@given(st.lists(st.tuples(st.floats(0, 30), st.floats(0, 3e4), st.integers(1, 400)), min_size=1, max_size=6))
def test_no_load_leads_outside_the_bounds(phases) -> None:
    config = PlannerConfig(
        enabled=True,
        max_workers=7,
        min_workers=3,
        max_prefill_workers=5,
        max_decode_workers=4,
        start_up_s=20,
        shrink_cooldown_s=30,
    )
    toy = Toy(config, prefill=2, decode=2)
    for work, kv, seconds in phases:
        toy.load(work, kv)
        for _ in range(seconds):
            toy.second()
            assert len(toy.workers) + len(toy.starting) <= 7
            assert len(toy.serving(Role.PREFILL)) >= 1
            assert len(toy.serving(Role.DECODE)) >= 1
            assert len(toy.serving(Role.PREFILL)) + len(toy.serving(Role.DECODE)) >= 3
            assert len(toy.serving(Role.PREFILL)) <= 5
            assert len(toy.serving(Role.DECODE)) <= 4
    assert toy.stopped_with_work == 0


@settings(deadline=None, max_examples=8)
@given(st.floats(0, 6), st.floats(0, 2e4))
def test_a_constant_load_leads_to_few_actions(work, kv) -> None:
    config = PlannerConfig(enabled=True, max_workers=12, start_up_s=20, shrink_cooldown_s=30)
    toy = Toy(config, prefill=2, decode=2)
    toy.load(work, kv)
    for _ in range(300):
        toy.second()
    before = len(toy.done)
    for _ in range(900):
        toy.second()
    assert len(toy.done) - before <= 6, "near a whole number of workers one comes and goes, slowly (docs/planner.md)"


def test_without_observations_nothing_is_done_and_the_cool_down_begins_again() -> None:
    config = PlannerConfig(enabled=True, max_workers=8, start_up_s=20, shrink_cooldown_s=30)
    toy = Toy(config, prefill=4, decode=4)
    toy.load(0.1, 10)
    for _ in range(29):
        toy.second()
    for _ in range(40):
        assert isinstance(toy.planner.decide(None, toy.now_s).action, Hold)
        toy.now_s += 1
    for _ in range(29):
        toy.second()
        assert not toy.done
    stale = toy.observation()
    assert "too old" in toy.planner.decide(stale, toy.now_s + 6).reason


def test_a_worker_with_streams_is_never_stopped() -> None:
    config = PlannerConfig(enabled=True, max_workers=8, start_up_s=20, shrink_cooldown_s=30)
    toy = Toy(config, prefill=3, decode=3, stream_s=100.0)
    toy.load(0.1, 10)
    for _ in range(300):
        toy.second()
    assert any(isinstance(decision.action, Stop) for decision in toy.done)
    assert toy.stopped_with_work == 0


def test_the_log_is_bounded_and_keeps_every_action() -> None:
    config = PlannerConfig(enabled=True, max_workers=8, start_up_s=20, shrink_cooldown_s=30, log_decisions=16)
    toy = Toy(config, prefill=3, decode=3)
    toy.load(0.1, 10)
    for _ in range(500):
        toy.second()
    assert len(toy.planner.log) <= 16
    assert toy.planner.log.last_action is not None
    facts = toy.planner.log.last_action.facts()
    assert facts["action"] == "stop"
    assert set(facts["terms"]) >= {"prefill_work", "needed_decode", "step_base_ms", "have_prefill"}


def test_where_one_prompt_alone_misses_the_target_only_the_work_counts() -> None:
    late = PrefillLoad(0.5, 100.0, 2.5, 4.0)
    assert prefill_workers(late, TARGET) == 1, "no number of workers brings 2.5 s below 2 s"
    assert prefill_workers(PrefillLoad(2.0, 100.0, 2.5, 4.0), TARGET) == 3, "but queues must not grow without end"
    assert prefill_workers(PrefillLoad(0.5, 100.0, 1.9, 4.0), TARGET) == 100


def test_a_refused_start_is_told_and_tried_again_after_a_start_up() -> None:
    config = PlannerConfig(enabled=True, max_workers=8, start_up_s=20, shrink_cooldown_s=30, rate_window_s=1)
    toy = Toy(config, prefill=1, decode=1)
    toy.load(3.0, 10)
    while not toy.done:
        toy.second()
    asked_s, asked = toy.now_s, len(toy.starting)
    toy.starting.clear()
    toy.planner.refused(asked, "every GPU has a worker", toy.now_s)
    while len(toy.done) == 1:
        said = toy.second()
        if len(toy.done) == 1:
            assert "no more come: every GPU has a worker" in said.reason
            assert said.terms.starting == 0
    assert toy.now_s == asked_s + config.start_up_s


@pytest.mark.parametrize(("max_workers", "started"), [(5, 2), (None, 0)])
def test_what_min_workers_lacks_is_started_where_workers_may_be_started(max_workers: int | None, started: int) -> None:
    config = PlannerConfig(enabled=True, min_workers=4, max_workers=max_workers, start_up_s=20, shrink_cooldown_s=30)
    toy = Toy(config, prefill=1, decode=1)
    toy.load(0.1, 10.0)
    for _ in range(5):
        toy.second()
    assert len(toy.starting) == started
    for _ in range(120):
        toy.second()
    assert len(toy.workers) == 2 + started, "and they stay, though fewer would do"


ORDERED = PlannerConfig(enabled=True, max_workers=8, start_up_s=20, shrink_cooldown_s=30)


def test_where_workers_go_in_one_order_the_last_ones_drain_and_stop_in_it() -> None:
    toy = Toy(ORDERED, prefill=2, decode=4, is_ordered=True)
    toy.load(0.1, 10)
    for _ in range(120):
        toy.second()
    drained = [name for each in toy.done if isinstance(each.action, Drain) for name in each.action.workers]
    stopped = [each.action.worker for each in toy.done if isinstance(each.action, Stop)]
    assert sorted(drained) == ["worker-01", "worker-03", "worker-04", "worker-05"]
    assert [name for name in drained if name != "worker-01"] == ["worker-05", "worker-04", "worker-03"]
    assert Drain(("worker-04", "worker-03")) in [each.action for each in toy.done], "one may go after the other"
    assert [name for name in stopped if name != "worker-01"] == ["worker-05", "worker-04", "worker-03"]


def test_a_worker_without_work_waits_for_those_that_must_go_before_it() -> None:
    toy = Toy(ORDERED, prefill=1, decode=4, is_ordered=True)
    toy.load(0.1, 10)
    while len(toy.draining) < 2:
        toy.second()
    first, second = sorted(toy.draining, reverse=True)[:2]
    toy.draining[first].until_s += 60.0  # its streams take longer
    for _ in range(100):
        toy.second()
    stopped = [each.action.worker for each in toy.done if isinstance(each.action, Stop)]
    assert [name for name in stopped if name in (first, second)] == [first, second]


def test_a_role_makes_way_for_a_worker_of_the_other_that_goes_next() -> None:
    toy = Toy(ORDERED, prefill=1, decode=3, is_ordered=True)
    toy.workers["worker-03"] = Role.PREFILL  # it was given another role: two and two
    toy.load(1.5, 0)  # prefill needs both, decode one
    for _ in range(200):
        toy.second()
    assert [each.action for each in toy.done] == [
        ChangeRole("worker-01", Role.PREFILL),
        Drain(("worker-00",)),
        Stop("worker-00"),
    ]
    assert "worker-00 goes next" in toy.done[0].reason
    assert sorted(toy.workers.values()) == [Role.DECODE, Role.PREFILL, Role.PREFILL]


def test_no_role_makes_way_while_who_must_go_first_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Toy(ORDERED, prefill=1, decode=3, is_ordered=True)
    monkeypatch.setattr(toy, "_goes_after", lambda name: "worker-99")  # its process restarts
    toy.load(0.1, 10)
    for _ in range(120):
        toy.second()
    assert toy.done == []


@settings(deadline=None, max_examples=10)
@given(st.lists(st.tuples(st.floats(0, 6), st.floats(0, 3e4), st.integers(30, 200)), min_size=2, max_size=5))
def test_in_order_or_not_roles_keep_their_least_and_nobody_with_work_is_stopped(phases) -> None:
    toy = Toy(ORDERED, prefill=2, decode=2, is_ordered=True)
    for work, kv, seconds in phases:
        toy.load(work, kv)
        for _ in range(seconds):
            toy.second()
            assert len(toy.workers) + len(toy.starting) <= 8
            assert toy.serving(Role.PREFILL)
            assert toy.serving(Role.DECODE)
    assert toy.stopped_with_work == 0
