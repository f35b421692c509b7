"""The prefill role's taste, question by question; its behaviour stands in tests/scenarios/prefill_policy."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twostroke.engine.policy import Ahead, Queue, Room, StepLimits, Want, bound_scored, scored_rows
from twostroke.engine.step_times import StepTimes
from twostroke.prefill_worker.policy import prefill_policy

POLICY = prefill_policy(StepLimits(max_num_seqs=8, max_batch_tokens=64, max_waiting=3, max_waiting_tokens=100))


def test_first_come_first_served_while_prompts_fit():
    assert POLICY.share([20, 30, 40], 64) == [20, 30, 14]


def test_short_prompts_have_half_a_step_and_the_long_one_keeps_the_rest():
    assert POLICY.share([500, 20, 33, 12], 64) == [32, 20, 0, 12]


def test_a_short_prompt_that_does_not_fit_into_its_half_comes_in_hash_blocks():
    assert POLICY.share([500, 60], 64) == [32, 32]
    assert POLICY.share([500, 20, 60], 96) == [60, 20, 16]


def test_prompts_that_are_not_short_wait_for_those_before_them():
    assert POLICY.share([500, 65, 200], 64) == [64, 0, 0]
    assert POLICY.share([500, 33], 16) == [16, 0], "there is nothing to halve"


@given(st.lists(st.integers(1, 300), max_size=8), st.integers(16, 200))
def test_shares_spend_the_budget_and_never_starve_the_first(remaining, budget):
    shares = POLICY.share(remaining, budget)
    assert sum(shares) == min(budget, sum(remaining))
    assert all(0 <= share <= size for share, size in zip(shares, remaining, strict=True))
    if shares:
        assert shares[0] >= min(remaining[0], budget - budget // 2)


@pytest.mark.parametrize(
    ("tokens", "ahead", "is_near"),
    [
        (1000, Ahead((100, 27), 0), True),  # less than two steps are ahead
        (65, Ahead((128,), 0), False),  # too long to pass
        (64, Ahead((128,), 0), True),
        (32, Ahead((4000, 4000, 31), 0), True),
        (32, Ahead((4000, 20, 12), 0), False),  # half a step of short ones is ahead
    ],
)
def test_who_is_near(tokens, ahead, is_near):
    assert POLICY.is_near(tokens, ahead) is is_near


def test_neither_short_nor_long_prompts_take_the_others_offers():
    assert POLICY.may_offer(20, [500, 500, 500, 500])
    assert POLICY.may_offer(500, [20, 20, 20, 20, 500])
    assert not POLICY.may_offer(20, [20, 20, 20, 20])
    assert not POLICY.may_offer(500, [500, 500, 500, 500])


def test_the_pool_may_be_filled():
    assert POLICY.has_room(Room(needed=4, used=5, promised=1, total=10))
    assert not POLICY.has_room(Room(needed=5, used=5, promised=1, total=10))


def test_refusals_name_the_numbers():
    assert POLICY.refusal(Queue(2, 60), 40) is None
    assert "3 requests wait" in (POLICY.refusal(Queue(3, 60), 1) or "")
    assert "60 prompt tokens wait" in (POLICY.refusal(Queue(2, 60), 41) or "")
    assert POLICY.refusal(Queue(0, 0), 5000) is None, "an empty queue takes every prompt"


def test_what_scored_prompts_may_not_use_the_others_get_in_order():
    wants = [Want(64, True), Want(100, False), Want(100, False), Want(64, True)]
    assert bound_scored([64, 64, 64, 0], wants, 16) == [16, 100, 76, 0]
    assert bound_scored([64, 0, 0, 64], wants, 96) == [64, 32, 0, 32]
    assert scored_rows(1 << 40) == 16


def test_time_is_no_bound_where_nothing_decodes_for_long():
    assert POLICY.prompt_tokens(64, StepTimes(20.0, 90.0), 500, is_scored=False) == 64
