"""Numbers of pods that were decided and that the API server has not taken yet."""

from twostroke.cluster.kubernetes.owed import LONGEST_WAIT_S, Owed
from twostroke.core.request import Role

NAMES = {Role.PREFILL: "ts-prefill", Role.DECODE: "ts-decode"}


def test_what_is_taken_is_owed_no_more():
    owed = Owed()
    owed.add(Role.DECODE, 2, 0.0)
    owed.add(Role.PREFILL, -1, 0.0)
    assert owed.due(0.0) == {Role.DECODE: 2, Role.PREFILL: -1}
    assert owed.words(NAMES) == ("ts-decode is to have 2 pods more", "ts-prefill is to have 1 pod fewer")
    owed.taken(Role.DECODE)
    assert owed.due(0.0) == {Role.PREFILL: -1}


def test_one_more_and_one_fewer_are_nothing():
    owed = Owed()
    owed.add(Role.DECODE, 1, 0.0)
    owed.add(Role.DECODE, -1, 0.0)
    assert owed.due(0.0) == {}


def test_a_start_that_is_refused_is_given_up_because_the_planner_decides_anew():
    owed = Owed()
    owed.add(Role.DECODE, 3, 0.0)
    assert owed.refused(Role.DECODE, "forbidden", 0.0) == 3
    assert owed.due(1e9) == {}


def test_a_worker_that_drained_is_owed_until_it_goes_with_waits_that_double():
    owed = Owed()
    owed.add(Role.DECODE, -1, 0.0)
    waits, now_s = [], 0.0
    for _ in range(7):
        assert owed.due(now_s) == {Role.DECODE: -1}
        assert owed.refused(Role.DECODE, "forbidden", now_s) == 0
        wait_s = next(second for second in range(1000) if owed.due(now_s + second))
        waits.append(wait_s)
        now_s += wait_s
    assert waits == [2, 4, 8, 16, 32, LONGEST_WAIT_S, LONGEST_WAIT_S]
    assert owed.words(NAMES) == ("ts-decode is to have 1 pod fewer: forbidden",)
