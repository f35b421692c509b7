"""How long a draining worker keeps what it gave back."""

import pytest

from twostroke.core.request import SequenceKey
from twostroke.worker.blocks.departure import HAND_BACK_S, QUIET_S, Departure, hand_back_after_s

A, B = SequenceKey("a", 0), SequenceKey("b", 0)


def test_it_may_leave_at_once_if_nothing_was_given_back():
    assert Departure().waits_until_s(5.0) is None


def test_it_waits_for_those_who_go_on_until_all_is_fetched():
    departure = Departure()
    departure.gave_back([A, B], 10.0)
    assert departure.waits_until_s(10.0) == 10.0 + QUIET_S
    departure.fetch_began(A, 10.5)
    assert departure.waits_until_s(100.0) == float("inf"), "the caller has the deadline"
    departure.fetch_ended(A, 11.0, is_whole=True)
    assert (departure.num_left, departure.waits_until_s(11.5)) == (1, 11.0 + QUIET_S)
    departure.fetch_began(B, 11.5)
    departure.fetch_ended(B, 11.6, is_whole=True)
    assert departure.waits_until_s(11.6) is None


def test_a_fetch_that_broke_may_come_again():
    departure = Departure()
    departure.gave_back([A], 10.0)
    departure.fetch_began(A, 10.1)
    departure.fetch_began(A, 10.2)
    departure.fetch_ended(A, 10.3, is_whole=False)
    assert departure.waits_until_s(10.3) == float("inf")
    departure.fetch_ended(A, 10.4, is_whole=False)
    assert departure.waits_until_s(10.5) == 10.4 + QUIET_S


def test_nobody_who_asks_for_long_enough_means_that_nobody_will():
    departure = Departure()
    departure.gave_back([A], 10.0)
    assert departure.waits_until_s(10.0 + QUIET_S) is None
    assert departure.num_left == 1


@pytest.mark.parametrize(
    ("grace_s", "kv_bytes", "bytes_per_s", "after_s"),
    [
        (10.0, 0, 0.0, 10.0 - HAND_BACK_S),
        (10.0, 10**9, 0.0, 10.0 - HAND_BACK_S),
        (10.0, 10**9, 1e9, 10.0 - HAND_BACK_S - 1.0),
        (10.0, 10**12, 1e9, 5.0),
        (1.0, 0, 1e9, 0.8),
        (0.0, 10**9, 1e9, 0.0),
    ],
)
def test_running_work_is_handed_back_in_time_to_be_moved(grace_s, kv_bytes, bytes_per_s, after_s):
    assert hand_back_after_s(grace_s, kv_bytes, bytes_per_s) == pytest.approx(after_s)


def test_a_fetch_that_nobody_waits_for_does_not_keep_it():
    departure, nobody = Departure(), SequenceKey("", 0)
    departure.fetch_began(nobody, 10.0)
    assert departure.waits_until_s(10.0) is None
    departure.fetch_ended(nobody, 11.0, is_whole=True)
    departure.gave_back([A], 12.0)
    assert departure.waits_until_s(12.0) == 12.0 + QUIET_S
