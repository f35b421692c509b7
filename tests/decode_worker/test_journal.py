"""What is offered to buddies: full blocks only, most to lose first, within bytes per second and offers under way."""

import pytest

from twostroke.core.request import SequenceKey
from twostroke.decode_worker.journal import Journal, JournalLimits, Offer

A, B, C = (SequenceKey(name, 0) for name in "abc")
LIMITS = JournalLimits(bytes_per_s=1000.0, batch_tokens=64, max_under_way=2, retry_s=2.0, max_retry_s=5.0)


def journal(bytes_per_token: int = 1, block_tokens: int = 16) -> Journal:
    made = Journal(LIMITS, bytes_per_token, block_tokens)
    for key in (A, B, C):
        made.begin(key, 0)
    return made


def test_only_full_blocks_are_offered_and_only_when_there_are_enough():
    made = journal()
    made.grew(A, 64)
    assert made.next(0.0) is None, "the KV of the last token is not computed"
    made.grew(A, 65)
    assert made.next(0.0) == Offer(A, 64)
    made.answered(Offer(A, 64), 64, 0.0)
    made.grew(A, 128)
    assert made.next(0.0) is None
    made.grew(A, 140)
    assert made.next(0.0) == Offer(A, 128)
    large = journal(block_tokens=64)
    large.grew(A, 128)
    assert large.next(0.0) == Offer(A, 64)


def test_what_the_buddy_is_believed_to_have_is_not_offered():
    made = journal()
    made.begin(A, 100)
    made.grew(A, 150)
    assert made.next(0.0) is None
    made.grew(A, 161)
    assert made.next(0.0) == Offer(A, 160)


def test_the_run_that_would_lose_most_goes_first_and_few_at_once():
    made = journal()
    for key, tokens in ((A, 100), (B, 300), (C, 200)):
        made.grew(key, tokens)
    assert [made.next(0.0), made.next(0.0), made.next(0.0)] == [Offer(B, 288), Offer(C, 192), None]
    made.answered(Offer(B, 288), 288, 0.0)
    assert made.next(0.0) == Offer(A, 96)


def test_bytes_per_second_bound_it_and_one_large_offer_is_paid_off_later():
    made = journal(bytes_per_token=10)
    made.grew(A, 500)
    made.grew(B, 100)
    assert made.next(0.0) == Offer(A, 496), "a second's worth may be exceeded by the last one"
    assert made.next(0.0) is None
    assert made.next_s(0.0) == pytest.approx(3.96)
    assert made.next(3.95) is None
    assert made.next(3.97) == Offer(B, 96)
    assert made.next_s(3.97) is None, "nothing more is due"


def test_a_buddy_that_keeps_nothing_is_asked_ever_more_rarely():
    made = journal()
    made.grew(A, 100)
    times = []
    now_s = 0.0
    for _ in range(4):
        offer = made.next(now_s)
        assert offer == Offer(A, 96)
        made.answered(offer, 0, now_s)
        assert made.next(now_s) is None
        due_s = made.next_s(now_s)
        assert due_s is not None
        times.append(due_s - now_s)
        assert made.next(due_s - 0.01) is None
        now_s = due_s
    assert times == [2.0, 4.0, 5.0, 5.0]
    made.answered(made.next(now_s), 96, now_s)
    made.grew(A, 200)
    made.answered(made.next(now_s), 0, now_s)
    assert made.next_s(now_s) == now_s + 2.0, "after a success it begins anew"


def test_a_buddy_may_refuse_for_as_long_as_a_stream_runs():
    made, now_s = journal(), 0.0
    made.grew(A, 100)
    for _ in range(1100):  # 2.0 * 2**1100 is no float
        made.answered(made.next(now_s), 0, now_s)
        now_s += LIMITS.max_retry_s
    assert made.next(now_s) == Offer(A, 96)


def test_what_a_buddy_lost_is_offered_again():
    made = journal()
    made.grew(A, 200)
    made.answered(made.next(0.0), 192, 0.0)
    made.grew(A, 300)
    made.answered(made.next(0.0), 64, 0.0)  # it has evicted some
    made.grew(B, 161)
    assert made.next(2.0) == Offer(A, 288), "it would lose most"


def test_a_run_that_is_over_is_not_offered_and_its_answer_is_nothing():
    made = journal()
    made.grew(A, 100)
    offer = made.next(0.0)
    made.end(A)
    made.answered(offer, 96, 0.0)
    made.grew(A, 200)
    assert made.next(0.0) is None
    assert made.next_s(0.0) is None


def test_offers_of_runs_that_have_ended_are_still_under_way():
    made = journal()
    for key in (A, B, C):
        made.grew(key, 100)
    offers = [made.next(0.0), made.next(0.0)]
    made.end(A)
    made.end(B)
    assert made.next(0.0) is None
    assert offers[0] is not None
    made.answered(offers[0], 0, 0.0)
    assert made.next(0.0) == Offer(C, 96)
    assert made.num_under_way == 2


def test_quiet_times_save_no_more_than_a_second_s_bytes():
    made = journal(bytes_per_token=10)
    assert made.next(0.0) is None
    made.grew(A, 500)
    made.grew(B, 500)
    assert made.next(1000.0) is not None
    assert made.next(1000.0) is None
    assert made.next_s(1000.0) == pytest.approx(1003.96)
