"""The prefill role's taste, question by question; its behaviour stands in tests/scenarios/prefill_policy."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twostroke.model.policy import Ahead, PrefillWork, Queue, Room, StepLimits
from twostroke.prefill_worker.policy import PrefillPolicy

POLICY = PrefillPolicy(StepLimits(max_num_seqs=8, max_batch_tokens=64, max_waiting=3, max_waiting_tokens=100))


def works(*remaining: int, passes: int = 0) -> list[PrefillWork]:
    return [PrefillWork(remaining[0], passes), *(PrefillWork(size, 0) for size in remaining[1:])]


def test_first_come_first_served_while_prompts_fit():
    assert POLICY.share(works(20, 30, 40), 64) == [20, 30, 14]


def test_short_prompts_share_half_a_step_and_the_long_one_keeps_the_rest():
    assert POLICY.share(works(500, 20, 33, 12), 64) == [32, 20, 0, 12]


def test_passes_are_bounded():
    assert POLICY.share(works(500, 8, 8, 8, passes=2), 64) == [48, 8, 8, 0]
    assert POLICY.share(works(500, 8, 8, 8, passes=4), 64) == [64, 0, 0, 0]


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(0, 6)), max_size=8), st.integers(16, 200))
def test_shares_spend_the_budget_and_never_starve_the_first(sizes, budget):
    given_works = [PrefillWork(*size) for size in sizes]
    shares = POLICY.share(given_works, budget)
    assert sum(shares) == min(budget, sum(work.remaining for work in given_works)) or sum(shares) == budget
    assert all(0 <= share <= work.remaining for share, work in zip(shares, given_works, strict=True))
    if shares:
        assert shares[0] >= min(given_works[0].remaining, budget - budget // 2)


@pytest.mark.parametrize(
    ("tokens", "ahead", "is_near"),
    [
        (1000, Ahead(127, 3, 0, 0), True),  # less than two steps are ahead
        (33, Ahead(128, 1, 0, 0), False),  # too long to overtake
        (32, Ahead(128, 1, 0, 0), True),
        (32, Ahead(128, 1, 4, 0), False),  # no passes left
        (32, Ahead(128, 5, 0, 0), False),  # four are overtaking already
    ],
)
def test_who_is_near(tokens, ahead, is_near):
    assert POLICY.is_near(tokens, ahead) is is_near


def test_the_pool_may_be_filled():
    assert POLICY.has_room(Room(needed=4, used=5, promised=1, total=10))
    assert not POLICY.has_room(Room(needed=5, used=5, promised=1, total=10))


def test_refusals_name_the_numbers():
    assert POLICY.refusal(Queue(2, 60), 40) is None
    assert "3 requests wait" in (POLICY.refusal(Queue(3, 60), 1) or "")
    assert "60 prompt tokens wait" in (POLICY.refusal(Queue(2, 60), 41) or "")
    assert POLICY.refusal(Queue(0, 0), 5000) is None, "an empty queue takes every prompt"
