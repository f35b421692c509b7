"""Whose runs are whose: routers, sessions, epochs and orphans, told without a stream."""

import pytest

from twostroke.core.request import Epoch, SequenceKey
from twostroke.decode_worker.ledger import Ledger, Named, RouterKey, Standing

A, B = RouterKey("a", 1), RouterKey("b", 1)
KEY, SECOND = SequenceKey("r", 0), SequenceKey("r", 1)
FIRST, NEXT, LAST = Epoch(1, 1), Epoch(1, 2), Epoch(1, 3)


@pytest.fixture
def ledger():
    made = Ledger(max_ended=3)
    for session in ("to a", "to b", "to a again"):
        made.open(session)
    return made


def test_an_order_is_new_once_and_stale_for_ever(ledger):
    assert ledger.standing(A, KEY, NEXT) is Standing.NEW
    ledger.begin("run", "to a", A, KEY, NEXT)
    assert ledger.standing(A, KEY, NEXT) is Standing.DUPLICATE
    assert ledger.standing(A, KEY, FIRST) is Standing.STALE
    assert ledger.standing(A, KEY, Epoch(1, 3)) is Standing.NEW
    assert ledger.standing(A, SECOND, FIRST) is Standing.NEW
    ledger.end("run")
    assert ledger.standing(A, KEY, NEXT) is Standing.DUPLICATE
    assert ledger.standing(A, KEY, FIRST) is Standing.STALE


def test_a_refused_order_counts_as_ended(ledger):
    ledger.refuse(A, KEY, NEXT)
    assert ledger.standing(A, KEY, NEXT) is Standing.DUPLICATE
    assert ledger.standing(A, KEY, FIRST) is Standing.STALE


@pytest.mark.parametrize("other", [B, RouterKey("a", 2), RouterKey("a", 0)])
def test_what_a_router_calls_its_request_means_nothing_to_another(ledger, other):
    ledger.begin("run", "to a", A, KEY, NEXT)
    assert ledger.standing(other, KEY, FIRST) is Standing.NEW
    assert ledger.older(other, KEY) is None
    assert ledger.named(other, "r", Epoch(9, 9)) == Named((), 0)
    ledger.begin("other", "to b", other, KEY, FIRST)
    assert ledger.older(A, KEY) == "run"
    ledger.end("other")
    assert ledger.standing(A, KEY, NEXT) is Standing.DUPLICATE
    assert ledger.runs == ("run",)


def test_a_cancel_reaches_all_choices_of_its_dispatch_and_of_older_ones(ledger):
    ledger.begin("zero", "to a", A, KEY, FIRST)
    ledger.begin("one", "to a", A, SECOND, NEXT)
    ledger.begin("another request", "to a", A, SequenceKey("s", 0), FIRST)
    assert ledger.named(A, "r", NEXT) == Named(("zero", "one"), 0)
    assert ledger.named(A, "r", FIRST) == Named(("zero",), 1)
    assert ledger.named(A, "r", Epoch(0, 9)) == Named((), 2)


def test_a_cancel_means_the_newest_run_only(ledger):
    ledger.begin("older", "to a", A, KEY, FIRST)
    ledger.begin("newer", "to a", A, KEY, NEXT)
    assert ledger.named(A, "r", NEXT) == Named(("newer",), 0)
    ledger.end("older")
    assert ledger.older(A, KEY) == "newer"
    assert ledger.standing(A, KEY, FIRST) is Standing.STALE


def test_a_second_session_of_a_router_reaches_the_runs_of_its_first(ledger):
    ledger.begin("run", "to a", A, KEY, FIRST)
    assert ledger.lose("to a") == ("run",)
    assert not ledger.is_open("to a")
    assert ledger.named(A, "r", FIRST) == Named(("run",), 0)
    assert ledger.standing(A, KEY, NEXT) is Standing.NEW
    assert ledger.lose("to a again") == ()


def test_orphans_are_the_runs_of_the_lost_session_and_no_others(ledger):
    ledger.begin("mine", "to a", A, KEY, FIRST)
    ledger.begin("ended", "to a", A, SECOND, FIRST)
    ledger.begin("mine too", "to a", A, SequenceKey("s", 0), FIRST)
    ledger.begin("theirs", "to b", B, KEY, FIRST)
    ledger.begin("later", "to a again", A, SequenceKey("t", 0), FIRST)
    ledger.end("ended")
    assert ledger.lose("to a") == ("mine", "mine too")
    assert ledger.sessions == ("to b", "to a again")


def test_remembered_ends_are_bounded(ledger):
    for number in range(5):
        ledger.refuse(A, SequenceKey(f"r{number}", 0), FIRST)
    assert ledger.standing(A, SequenceKey("r4", 0), FIRST) is Standing.DUPLICATE
    assert ledger.standing(A, SequenceKey("r0", 0), FIRST) is Standing.NEW
    assert len(ledger._ended) == 3


def test_the_end_that_is_longest_ago_is_forgotten_first(ledger):
    again = SequenceKey("r0", 0)
    for key in (again, SequenceKey("r1", 0), SequenceKey("r2", 0)):
        ledger.refuse(A, key, FIRST)
    ledger.refuse(A, again, NEXT)
    ledger.refuse(A, SequenceKey("r3", 0), FIRST)
    assert ledger.standing(A, again, NEXT) is Standing.DUPLICATE
    assert ledger.standing(A, SequenceKey("r1", 0), FIRST) is Standing.NEW


def test_a_refused_order_stays_known_beside_and_after_the_older_run_that_it_ended(ledger):
    ledger.begin("run", "to a", A, KEY, FIRST)
    ledger.refuse(A, KEY, LAST)
    for _ in range(2):
        assert ledger.standing(A, KEY, LAST) is Standing.DUPLICATE
        assert ledger.standing(A, KEY, NEXT) is Standing.STALE
        if "run" in ledger:
            ledger.end("run")


def test_a_cancel_means_whole_names(ledger):
    """Names that routers make count up: one begins like another."""
    for name in ("r@1.1", "r@1.10"):
        ledger.begin(name, "to a", A, SequenceKey(name, 0), FIRST)
    assert ledger.named(A, "r@1.1", FIRST) == Named(("r@1.1",), 0)


def test_nothing_is_left_of_runs_that_ended(ledger):
    for number in range(4):
        ledger.begin(number, "to a", A, SequenceKey(f"r{number}", 0), FIRST)
    for number in range(4):
        ledger.end(number)
    assert len(ledger) == 0
    assert ledger.runs == ()
    assert ledger._newest == {}


def test_a_run_may_end_after_a_newer_one_of_the_same_choice(ledger):
    ledger.begin("older", "to a", A, KEY, FIRST)
    ledger.begin("newer", "to a again", A, KEY, NEXT)
    ledger.end("newer")
    ledger.end("older")
    assert len(ledger) == 0
    assert ledger.standing(A, KEY, NEXT) is Standing.DUPLICATE
    assert ledger.standing(A, KEY, FIRST) is Standing.STALE
