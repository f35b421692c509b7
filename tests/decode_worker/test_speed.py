"""The measured speed of hand-overs, from instants that are made up."""

import pytest

from twostroke.decode_worker.speed import Arrival, HandoverSpeed

MIB = 1 << 20


def test_only_what_came_after_the_prompt_was_computed_counts():
    speed = HandoverSpeed()
    speed.observe([Arrival(1.0, 8 * MIB), Arrival(2.01, MIB), Arrival(2.02, MIB)], prefilled_s=2.0)
    assert speed.bytes_per_s == pytest.approx(2 * MIB / 0.02)


def test_it_follows_a_change_of_the_road_within_some_hand_overs():
    speed = HandoverSpeed()
    speed.observe([Arrival(1.0, MIB)], prefilled_s=0.0)
    for _ in range(20):
        speed.observe([Arrival(1.0, 4 * MIB)], prefilled_s=0.0)
    assert speed.bytes_per_s == pytest.approx(4 * MIB, rel=0.02)


@pytest.mark.parametrize("arrivals", [[], [Arrival(0.5, MIB)], [Arrival(1.1, 1000)]], ids=["none", "early", "small"])
def test_hand_overs_that_tell_nothing_change_nothing(arrivals):
    speed = HandoverSpeed()
    speed.observe(arrivals, prefilled_s=1.0)
    assert speed.bytes_per_s == 0.0
