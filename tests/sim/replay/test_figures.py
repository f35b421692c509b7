"""Figures of runs, on courses that were worked out by hand."""

import pytest

from twostroke.sim.replay.figures import Targets, quantile, row_of
from twostroke.sim.replay.play import Course, Played


def course(at_s: float, ttft_s: float, itl_s: float = 0.01, answer: int = 11, cached: int = 0) -> Course:
    return Course(at_s, 100, answer, at_s + ttft_s, at_s + ttft_s + itl_s * (answer - 1), cached)


def test_a_request_counts_if_it_keeps_both_targets():
    targets = Targets(1.0, 0.05)
    assert targets.met(course(3.0, 1.0, 0.04))
    assert not targets.met(course(3.0, 1.01, 0.04))
    assert not targets.met(course(3.0, 0.5, 0.06))
    assert targets.met(course(3.0, 0.5, 9.0, answer=1)), "one token has no time between tokens"


def test_quantiles_are_values_that_occur():
    assert [quantile([1.0, 2.0, 3.0, 4.0], share) for share in (0.0, 0.25, 0.5, 0.51, 0.99)] == [1, 1, 2, 3, 4]


def test_the_figures_of_a_run():
    courses = [course(float(n), 0.5 if n % 4 else 3.0, cached=25) for n in range(41)]
    played = Played("ours", courses, gaps_ms={10: 99, 50: 1})
    row = row_of(played, 0.5, Targets(1.0, 0.05), None)
    assert row.attained.value == pytest.approx(30 / 41)
    assert row.goodput_per_s == pytest.approx(30 / 40)
    assert row.rate_per_s == pytest.approx(41 / 40)
    assert row.ttft_mean_s.value == pytest.approx((30 * 0.5 + 11 * 3.0) / 41)
    assert (row.ttft_p50_s, row.ttft_p90_s) == (pytest.approx(0.5), pytest.approx(3.0))
    assert row.itl_p50_ms == pytest.approx(10)
    assert row.gap_p99_ms == 10
    assert row.hit_rate == 0.25
    assert row.regret is None


def test_the_interval_covers_the_windows_and_is_the_same_each_time():
    courses = [course(float(n), 0.5 if n < 120 else 3.0) for n in range(240)]
    first, second = (row_of(Played("ours", courses), 1.0, Targets(1.0, 0.05), None) for _ in range(2))
    assert first == second
    assert first.attained.low < 0.4 < first.attained.value < 0.6 < first.attained.high
    steady = row_of(Played("ours", [course(float(n), 0.5) for n in range(240)]), 1.0, Targets(1.0, 0.05), None)
    assert steady.attained == (1.0, 1.0, 1.0)


def test_regret_is_taken_window_by_window():
    """Both runs are bad in the same windows: their goodput varies, their regret does not."""
    ours = [course(float(n), 3.0 if n < 120 or n % 2 else 0.5) for n in range(240)]
    best = [course(float(n), 3.0 if n < 120 else 0.5) for n in range(240)]
    row = row_of(Played("ours", ours), 1.0, Targets(1.0, 0.05), Played("oracle", best))
    assert row.regret == pytest.approx((0.5, 0.5, 0.5))
    assert row.attained.high - row.attained.low > 0.1
