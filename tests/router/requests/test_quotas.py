"""Quotas per minute: what they let through, when the next request may come, and what comes back."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twostroke.core.errors import QuotaExceeded
from twostroke.core.request import Allowance
from twostroke.router.requests.admission import quotas
from twostroke.router.requests.admission.quotas import Quotas


def taken(held: Quotas, allowance: Allowance | None, tokens: int, now_s: float) -> float:
    """0 if it was taken, else the seconds to wait."""
    try:
        held.check(allowance, tokens, now_s)
    except QuotaExceeded as error:
        return error.retry_after_s or -1.0
    held.take(allowance, tokens, now_s)
    return 0.0


def test_a_minutes_worth_may_come_at_once_and_then_as_it_fills() -> None:
    held, key = Quotas(), Allowance("k", requests_per_minute=6)
    assert [taken(held, key, 1, 0.0) for _ in range(7)] == [0.0] * 6 + [10.0]
    assert taken(held, key, 1, 9.0) == pytest.approx(1.0)
    assert taken(held, key, 1, 10.0) == 0.0


def test_tokens_and_requests_are_counted_apart() -> None:
    held, key = Quotas(), Allowance("k", requests_per_minute=100, tokens_per_minute=600)
    assert taken(held, key, 500, 0.0) == 0.0
    assert taken(held, key, 200, 0.0) == pytest.approx(10.0)
    assert taken(held, Allowance("other", tokens_per_minute=600), 600, 0.0) == 0.0


def test_one_larger_than_a_minute_passes_when_the_bucket_is_full_and_is_paid_afterwards() -> None:
    held, key = Quotas(), Allowance("k", tokens_per_minute=60)
    assert taken(held, key, 600, 0.0) == 0.0
    assert taken(held, key, 1, 0.0) == pytest.approx(541.0)
    assert taken(held, key, 1, 542.0) == 0.0


def test_what_was_not_used_comes_back_and_never_more_than_the_bucket_holds() -> None:
    held, key = Quotas(), Allowance("k", requests_per_minute=1, tokens_per_minute=100)
    assert taken(held, key, 100, 0.0) == 0.0
    held.give_back(key, 1000, 0.0, requests=1)
    assert taken(held, key, 100, 0.0) == 0.0
    assert taken(held, key, 1, 0.0) > 0


def test_a_time_that_lies_before_the_last_one_fills_nothing_twice() -> None:
    held, key = Quotas(), Allowance("k", requests_per_minute=6)
    assert [taken(held, key, 1, 0.0) for _ in range(6)] == [0.0] * 6
    assert taken(held, key, 1, 10.0) == 0.0
    assert taken(held, key, 1, 0.0) == pytest.approx(10.0)
    assert taken(held, key, 1, 10.0) == pytest.approx(10.0)


def test_without_quotas_nothing_is_kept() -> None:
    held = Quotas()
    assert [taken(held, one, 10**9, 0.0) for one in (None, Allowance("k"))] == [0.0, 0.0]
    assert len(held) == 0


def test_buckets_of_keys_that_rest_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quotas, "MAX_BUCKETS", 3)
    held = Quotas()
    for number in range(10):
        assert taken(held, Allowance(f"k{number}", requests_per_minute=60), 1, 100.0 * number) == 0.0
    assert len(held) <= 4


@given(st.lists(st.tuples(st.floats(0, 20), st.integers(1, 50)), max_size=60))
@settings(max_examples=200, deadline=None)
def test_no_span_of_time_gets_more_than_its_minutes_and_one_bucket(asked: list[tuple[float, int]]) -> None:
    held, key, now_s = Quotas(), Allowance("k", tokens_per_minute=120), 0.0
    log: list[tuple[float, int]] = []
    for pause_s, tokens in asked:
        now_s += pause_s
        if not taken(held, key, tokens, now_s):
            log.append((now_s, tokens))
    for start, (begin_s, _) in enumerate(log):
        for end in range(start, len(log)):
            used = sum(tokens for _, tokens in log[start : end + 1])
            assert used <= 120 + 2.0 * (log[end][0] - begin_s) + 1e-6


@given(st.integers(1, 300), st.floats(0, 100))
def test_the_told_wait_is_enough_and_not_too_long(tokens: int, now_s: float) -> None:
    held, key = Quotas(), Allowance("k", tokens_per_minute=100)
    assert taken(held, key, 90, now_s) == 0.0
    wait_s = taken(held, key, tokens, now_s)
    if wait_s:
        assert taken(held, key, tokens, now_s + wait_s * 0.99) > 0
        assert taken(held, key, tokens, now_s + wait_s + 1e-6) == 0.0
