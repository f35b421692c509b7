"""Restarts: at once the first time, then with growing patience, and never after a wanted end."""

from hypothesis import given
from hypothesis import strategies as st

from twostroke.cluster.restarts import (
    LONGEST_LOOK_S,
    STOPPED_LOOKS,
    BackOff,
    Patience,
    RestartBook,
    Standing,
    Use,
)


def test_a_dead_member_is_due_at_once_the_first_time():
    members = RestartBook()
    members.want("decode-0", 0.0)
    assert members.due(0.0) == ["decode-0"]
    members.started("decode-0", 0.0)
    assert members.due(0.0) == []
    members.ready("decode-0", 2.0)
    assert members.ended("decode-0", "killed", 5.0) == 5.0
    assert members.due(5.0) == ["decode-0"]
    assert members.restarts("decode-0") == 1


def test_failures_in_a_row_wait_longer_up_to_a_bound():
    members = RestartBook(BackOff(base_s=1.0, longest_s=8.0))
    members.want("prefill-0", 0.0)
    now, waits = 0.0, []
    for _ in range(7):
        members.started("prefill-0", now)
        due = members.ended("prefill-0", "no port", now)
        waits.append(due - now)
        now = due
    assert waits == [0.0, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0]


def test_a_long_healthy_run_forgives():
    members = RestartBook(BackOff(forgiven_after_s=60.0))
    members.want("decode-0", 0.0)
    for start in (0.0, 1.0, 2.0):
        members.started("decode-0", start)
        members.ended("decode-0", "", start)
    members.started("decode-0", 10.0)
    members.ready("decode-0", 11.0)
    assert members.ended("decode-0", "", 71.0) == 71.0


def test_a_slow_start_is_no_healthy_run():
    members = RestartBook(BackOff(base_s=1.0, forgiven_after_s=60.0))
    members.want("decode-0", 0.0)
    for start_s in (0.0, 1.0):
        members.started("decode-0", start_s)
        members.ended("decode-0", "", start_s)
    members.started("decode-0", 10.0)
    members.ready("decode-0", 100.0)
    assert members.ended("decode-0", "", 101.0) > 101.0


def test_a_stopped_member_stays_down():
    members = RestartBook()
    members.want("router-0", 0.0)
    members.started("router-0", 0.0)
    members.stop("router-0")
    assert members.ended("router-0", "stopped", 1.0) is None
    assert members.due(1e9) == []
    assert members.next_due_s() is None


def test_ready_means_nothing_for_a_member_that_is_down():
    members = RestartBook()
    members.want("decode-0", 0.0)
    members.started("decode-0", 0.0)
    members.ended("decode-0", "", 1.0)
    members.ready("decode-0", 1.0)
    assert members.standing("decode-0") is Standing.WAITING


def _serving(name: str, patience: Patience) -> RestartBook:
    members = RestartBook(patience=patience)
    members.want(name, 0.0)
    members.started(name, 0.0)
    members.ready(name, 1.0)
    return members


def test_a_member_that_is_missing_for_too_long_is_overdue_once():
    members = _serving("decode-0", Patience(missing_s=20.0))
    members.seen("decode-0", Use.NONE, 10.0)
    members.seen("decode-0", Use.NONE, 29.0)
    assert members.overdue(30.0) == []
    assert members.overdue(30.5) == ["decode-0"]
    assert members.overdue(30.6) == []  # it is being ended
    members.seen("decode-0", Use.NONE, 31.0)
    assert members.overdue(51.5) == ["decode-0"]  # which did not help


def test_a_member_that_comes_back_in_time_is_left_alone():
    members = _serving("decode-0", Patience(missing_s=20.0))
    members.seen("decode-0", Use.NONE, 10.0)
    members.seen("decode-0", Use.SERVES, 29.0)
    members.seen("decode-0", Use.NONE, 30.0)
    assert members.overdue(49.0) == []


def test_absence_that_nobody_can_attest_does_not_count():
    members = _serving("decode-0", Patience(missing_s=20.0))
    members.seen("decode-0", Use.NONE, 10.0)
    members.seen("decode-0", None, 29.0)  # the router was away
    members.seen("decode-0", Use.NONE, 40.0)
    assert members.overdue(59.0) == []


def test_a_member_that_drains_though_nobody_asked_is_overdue_after_a_patience_of_its_own():
    members = _serving("decode-0", Patience(missing_s=20.0, draining_s=60.0))
    members.seen("decode-0", Use.DRAINS, 10.0)
    members.seen("decode-0", Use.DRAINS, 69.0)
    assert members.overdue(70.0) == []
    assert members.overdue(70.5) == ["decode-0"]
    assert members.use("decode-0") is Use.DRAINS


def test_a_member_that_drains_and_then_cannot_be_reached_is_missing_from_then_on():
    members = _serving("decode-0", Patience(missing_s=20.0, draining_s=60.0))
    members.seen("decode-0", Use.DRAINS, 10.0)
    members.seen("decode-0", Use.NONE, 50.0)
    assert members.overdue(69.0) == []
    assert members.overdue(70.5) == ["decode-0"]


def test_a_member_that_was_told_to_stop_may_drain():
    members = _serving("decode-0", Patience(draining_s=1.0))
    members.stop("decode-0")
    members.seen("decode-0", Use.DRAINS, 10.0)
    assert members.overdue(1e6) == []


def test_a_member_on_its_way_up_has_more_patience_and_is_not_missing():
    members = RestartBook(patience=Patience(missing_s=20.0, starting_s=120.0))
    members.want("decode-0", 0.0)
    members.started("decode-0", 0.0)
    members.seen("decode-0", Use.NONE, 1.0)
    assert members.overdue(119.0) == []
    assert members.overdue(121.0) == ["decode-0"]


def test_dead_and_stopped_members_are_never_overdue():
    members = _serving("decode-0", Patience(missing_s=1.0, starting_s=1.0))
    members.seen("decode-0", Use.NONE, 2.0)
    members.ended("decode-0", "killed", 3.0)
    assert members.overdue(1e6) == []
    members.stop("decode-0")
    assert members.overdue(1e6) == []


def test_a_new_process_does_not_inherit_the_absence_of_the_old_one():
    members = _serving("decode-0", Patience(missing_s=20.0))
    members.seen("decode-0", Use.NONE, 2.0)
    members.ended("decode-0", "killed", 3.0)
    members.started("decode-0", 3.0)
    members.ready("decode-0", 5.0)
    assert members.overdue(30.0) == []


@given(st.lists(st.tuples(st.sampled_from(["end", "ready", "wait"]), st.floats(0.0, 100.0)), max_size=60))
def test_a_wanted_member_always_comes_back_within_the_longest_wait(steps):
    members = RestartBook()
    members.want("m", 0.0)
    now = 0.0
    for what, pause in steps:
        now += pause
        for name in members.due(now):
            members.started(name, now)
        if what == "end" and members.standing("m") in (Standing.STARTING, Standing.READY):
            due = members.ended("m", "", now)
            assert now <= due <= now + members.back_off.longest_s
        elif what == "ready":
            members.ready("m", now)
    assert members.due(now + members.back_off.longest_s) == ["m"] or members.standing("m") is not Standing.WAITING


def test_a_new_process_is_of_use_until_the_opposite_is_seen():
    members = RestartBook()
    members.want("decode-0", 0.0)
    members.started("decode-0", 0.0)
    members.ready("decode-0", 1.0)
    members.seen("decode-0", Use.DRAINS, 2.0)
    members.ended("decode-0", "killed", 3.0)
    members.started("decode-0", 3.0)
    assert members.use("decode-0") is Use.SERVES


def test_a_pause_of_our_own_is_no_absence_of_a_member():
    members = _serving("decode-0", Patience(missing_s=20.0, starting_s=20.0))
    members.want("decode-1", 0.0)
    members.started("decode-1", 0.0)
    members.looked(1.0)
    members.seen("decode-0", Use.NONE, 1.0)
    members.looked(101.0)  # the machine stood still
    members.seen("decode-0", Use.NONE, 101.0)
    assert members.overdue(101.0) == []
    members.looked(101.0 + LONGEST_LOOK_S)  # as long as a look may take
    assert members.overdue(112.0) == []
    assert members.overdue(116.5) == ["decode-0", "decode-1"]


def test_a_process_that_stands_still_is_ended_once_and_looks_count_not_time():
    members = _serving("decode-0", Patience())

    def looks(*stopped: bool) -> list[bool]:
        return [members.stands_still("decode-0", is_stopped=is_stopped) for is_stopped in stopped]

    assert looks(*[True] * (STOPPED_LOOKS - 1), False) == [False] * STOPPED_LOOKS  # it goes on
    assert looks(*[True] * (STOPPED_LOOKS + 1)) == [False] * (STOPPED_LOOKS - 1) + [True, False]
    members.stop("decode-0")
    assert looks(*[True] * 2 * STOPPED_LOOKS) == [False] * 2 * STOPPED_LOOKS  # who told it to stop sees to its end


def test_a_member_that_was_stopped_and_stays_is_watched_from_then_on():
    book = RestartBook()
    book.want("w", 0.0)
    book.started("w", 0.0)
    book.ready("w", 1.0)
    book.seen("w", Use.NONE, 2.0)
    book.stop("w")
    book.resume("w", 100.0)
    assert book.standing("w") is Standing.READY
    assert book.overdue(101.0) == []
    book.seen("w", Use.NONE, 102.0)
    assert book.overdue(102.0 + book.patience.missing_s + 1.0) == ["w"]
