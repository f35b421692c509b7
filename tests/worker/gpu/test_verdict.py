"""The verdict on a GPU: which XID, error count and clock does what, and what passes by itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twostroke.worker.gpu.reading import ClockReason, Failure, Reading, Recovery
from twostroke.worker.gpu.verdict import MAX_REASONS, DeviceHealth, Verdict, worst
from twostroke.worker.gpu.xid import XIDS, Action, XidClass, rule_of

HEALTHY = Reading(
    sm_clock_mhz=1980,
    max_sm_clock_mhz=1980,
    clock_reasons=ClockReason.SW_POWER_CAP,
    corrected_errors=5,
    uncorrected_errors=2,  # of before our time
    is_remap_pending=False,
    has_remap_failed=False,
    recovery=Recovery.NONE,
)
HOT = replace(HEALTHY, sm_clock_mhz=660, clock_reasons=ClockReason.HW_SLOWDOWN | ClockReason.HW_THERMAL)


def started(**changes: object) -> DeviceHealth:
    health = DeviceHealth(0.0)
    health.read(replace(HEALTHY, **changes), 0.0)
    return health


def after_xids(*codes: int, at_s: float = 1.0, asked_s: float = 1.0) -> Verdict:
    health = started()
    for code in codes:
        health.xid(code, at_s)
    return health.verdict(asked_s)


@pytest.mark.parametrize(
    ("code", "action", "lets_work_end"),
    [
        (13, Action.RESTART, False),
        (31, Action.RESTART, False),
        (43, Action.RESTART, False),
        (94, Action.RESTART, False),
        (74, Action.DRAIN, True),
        (145, Action.DRAIN, True),
        (64, Action.CORDON, True),
        (79, Action.CORDON, False),
        (95, Action.CORDON, False),
        (119, Action.CORDON, False),
        (140, Action.CORDON, False),
        (45, Action.NOTHING, True),
        (63, Action.NOTHING, True),
        (154, Action.NOTHING, True),
        (9999, Action.NOTHING, True),
    ],
)
def test_an_xid_decides(code: int, action: Action, lets_work_end: bool) -> None:
    verdict = after_xids(code)
    assert (verdict.action, verdict.lets_work_end) == (action, lets_work_end)
    assert verdict.ends_process is (action >= Action.DRAIN)
    assert verdict.reasons[-1].startswith(f"XID {code}: ")


def test_an_uncorrectable_error_alone_cordons_and_one_that_was_contained_restarts() -> None:
    doubtful = after_xids(48)
    assert (doubtful.action, doubtful.is_settled, doubtful.lets_work_end) == (Action.RESTART, False, False)
    alone = after_xids(48, asked_s=3.0)
    assert (alone.action, alone.is_settled) == (Action.CORDON, True)
    assert alone.reasons[-1] == "XID 48 came without 94"
    for codes in ((48, 94), (94, 48)):
        contained = after_xids(*codes, asked_s=100.0)
        assert (contained.action, contained.is_settled) == (Action.RESTART, True)
    assert after_xids(48, 95).action is Action.CORDON
    assert after_xids(48, 95).is_settled


def test_the_harder_verdict_holds_whatever_comes_after() -> None:
    assert after_xids(79, 13, 74).action is Action.CORDON
    assert after_xids(74, 13).action is Action.RESTART
    assert not after_xids(74, 13).lets_work_end
    # two ways to cordon: what one of them forbids is forbidden
    assert not after_xids(64, 79).lets_work_end
    assert not after_xids(79, 64).lets_work_end
    health = started()
    health.xid(74, 1.0)
    for second in range(2, 60):
        health.read(HEALTHY, float(second))
    assert health.verdict(60.0).action is Action.DRAIN


def test_old_errors_are_taken_for_granted_and_new_ones_are_not() -> None:
    health = started()
    assert health.verdict(0.0) == Verdict()
    health.read(replace(HEALTHY, corrected_errors=500), 1.0)
    assert health.verdict(1.0).action is Action.NOTHING
    health.read(replace(HEALTHY, uncorrected_errors=3), 2.0)
    verdict = health.verdict(2.0)
    assert (verdict.action, verdict.lets_work_end) == (Action.RESTART, False)
    assert verdict.reasons == ("1 uncorrected ECC errors",)


def test_a_device_without_ecc_counts_has_none() -> None:
    health = started(uncorrected_errors=None)
    health.read(replace(HEALTHY, uncorrected_errors=7), 1.0)  # the first count that we see
    assert health.verdict(1.0).action is Action.NOTHING


def test_rows_that_wait_for_a_reset_are_told_and_change_nothing() -> None:
    verdict = started(is_remap_pending=True, are_pages_pending=True).verdict(0.0)
    assert verdict.action is Action.NOTHING
    assert len(verdict.reasons) == 2


def test_a_row_that_could_not_be_remapped_cordons_also_at_the_start() -> None:
    verdict = started(has_remap_failed=True).verdict(0.0)
    assert (verdict.action, verdict.lets_work_end) == (Action.CORDON, True)


@pytest.mark.parametrize(
    ("recovery", "action", "lets_work_end"),
    [
        (Recovery.GPU_RESET, Action.CORDON, False),
        (Recovery.NODE_REBOOT, Action.CORDON, False),
        (Recovery.BUS_RESET, Action.CORDON, False),
        (Recovery.SYSTEM_REBOOT, Action.CORDON, False),
        (Recovery.DRAIN_AND_RESET, Action.CORDON, True),
        (Recovery.DRAIN_P2P, Action.DRAIN, True),
        (Recovery.RECOVER_IMEX_DOMAIN, Action.DRAIN, True),
        (Recovery.NONE, Action.NOTHING, True),
    ],
)
def test_the_drivers_own_advice_is_followed(recovery: Recovery, action: Action, lets_work_end: bool) -> None:
    health = started()
    health.read(replace(HEALTHY, recovery=recovery), 1.0)
    verdict = health.verdict(1.0)
    assert (verdict.action, verdict.lets_work_end) == (action, lets_work_end)


def test_advice_to_drain_that_stands_at_the_start_does_not_drain_for_ever() -> None:
    """Else each new process would end as the one before it."""
    assert started(recovery=Recovery.DRAIN_P2P).verdict(0.0).action is Action.NOTHING


def test_throttling_appears_after_two_seconds_and_vanishes_after_five() -> None:
    health = started()
    states = []
    for second in range(1, 14):
        health.read(HOT if 2 <= second < 6 else HEALTHY, float(second))
        states.append(health.verdict(float(second)).action is Action.THROTTLED)
    assert states == [False, False, False, True, True, True, True, True, True, False, False, False, False]


def test_short_dips_of_the_clocks_do_not_add_up() -> None:
    health = started()
    for second in range(1, 20):
        health.read(HOT if second % 2 else HEALTHY, float(second))
        assert health.verdict(float(second)).action is Action.NOTHING


def test_a_throttled_gpu_is_slower_by_its_clocks_within_bounds() -> None:
    def slowdown(**changes: object) -> float:
        health = started()
        for second in (1.0, 2.0, 3.0):
            health.read(replace(HOT, **changes), second)
        verdict = health.verdict(3.0)
        assert verdict.action is Action.THROTTLED
        assert verdict.reasons == ("clocks are slowed by hw slowdown, hw thermal",)
        return verdict.slowdown

    assert slowdown() == 3.0
    assert slowdown(sm_clock_mhz=1) == 8.0
    assert slowdown(sm_clock_mhz=1980) == 1.2
    assert slowdown(sm_clock_mhz=None) == slowdown(max_sm_clock_mhz=0) == 2.0


def test_a_power_limit_is_the_normal_state_of_a_busy_gpu() -> None:
    health = started()
    for second in range(1, 30):
        health.read(HEALTHY, float(second))
    assert health.verdict(30.0) == Verdict()


@pytest.mark.parametrize("failure", list(Failure))
def test_of_failures_the_lost_and_the_reset_cordon_at_once(failure: Failure) -> None:
    health = started()
    health.failed(failure, "says NVML")
    verdict = health.verdict(0.0)
    if failure in (Failure.LOST, Failure.RESET_REQUIRED):
        assert (verdict.action, verdict.lets_work_end) == (Action.CORDON, False)
        assert "says NVML" in verdict.reasons[0]
    else:
        assert verdict == Verdict()


def test_silence_is_avoided_and_forgiven() -> None:
    health = started()
    assert health.verdict(5.0) == Verdict()
    assert health.verdict(5.1).action is Action.THROTTLED
    assert health.verdict(5.1).slowdown == 2.0
    assert health.verdict(5.1) == health.verdict(500.0)  # no news while it lasts
    health.read(HEALTHY, 501.0)
    assert health.verdict(501.0) == Verdict()


def test_the_worst_device_of_a_worker_counts() -> None:
    slow = Verdict(Action.THROTTLED, ("hot",), slowdown=3.0)
    ends = Verdict(Action.DRAIN, ("link",), lets_work_end=True)
    assert worst([]) == Verdict()
    assert worst([slow, Verdict()]) == slow
    both = worst([slow, ends])
    assert (both.action, both.slowdown, both.reasons) == (Action.DRAIN, 3.0, ("hot", "link"))
    assert not worst([Verdict(Action.CORDON, lets_work_end=False), Verdict(Action.CORDON)]).lets_work_end


def test_reasons_are_few_and_the_newest() -> None:
    health = started()
    for code in range(1000, 1100):
        health.xid(code, 1.0)
    assert len(health.verdict(1.0).reasons) == MAX_REASONS
    assert health.verdict(1.0).reasons[-1].startswith("XID 1099")
    assert health.num_xids[1000] == 1


def test_each_rule_has_a_meaning_and_only_hard_ones_let_work_end() -> None:
    for code, rule in XIDS.items():
        assert rule.meaning, code
        assert isinstance(rule.kind, XidClass)
        assert rule.action is not Action.THROTTLED
        if rule.lets_work_end:
            assert rule.action in (Action.DRAIN, Action.CORDON), code
    assert rule_of(12345).action is Action.NOTHING


EVENTS = st.one_of(
    st.sampled_from(sorted(XIDS)).map(lambda code: ("xid", code)),
    st.sampled_from(list(Failure)).map(lambda kind: ("failed", kind)),
    st.sampled_from([HEALTHY, HOT, replace(HEALTHY, uncorrected_errors=9)]).map(lambda reading: ("read", reading)),
)


@given(st.lists(st.tuples(EVENTS, st.floats(0.0, 10.0)), max_size=40))
def test_a_verdict_that_ends_the_process_never_becomes_milder(events: list) -> None:
    health, now_s, before = DeviceHealth(0.0), 0.0, Verdict()
    for (verb, what), wait_s in events:
        now_s += wait_s
        if verb == "failed":
            health.failed(what, "x")
        else:
            getattr(health, verb)(what, now_s)
        verdict = health.verdict(now_s)
        if before.ends_process:
            assert verdict.action >= before.action
            assert verdict.action > before.action or before.lets_work_end or not verdict.lets_work_end
        assert (verdict.slowdown > 1.0) is (verdict.action is Action.THROTTLED)
        before = verdict
