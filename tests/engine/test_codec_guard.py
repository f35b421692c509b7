"""The guard of the cache's codec: what it samples, when it computes, what it costs, and its verdict."""

import logging

import pytest

from twostroke.core.clock import Clock
from twostroke.engine.guard.idle import IdleGuard
from twostroke.engine.guard.machine import CodecGuard, GuardLimits, Part, PartScore

LIMITS = GuardLimits(bound_nats=0.1, sampled_share=1.0, max_tokens=200, idle_s=0.25, busy_share=0.05)
PROMPT = tuple(range(150))


def guard(**changes: float) -> CodecGuard:
    fields = {name: getattr(LIMITS, name) for name in LIMITS.__slots__}
    return CodecGuard(GuardLimits(**{**fields, **changes}), 0.0)


def score_one(it: CodecGuard, nats: float, now_s: float, took_s: float = 0.0) -> list[Part]:
    """Compute all parts of a sample, each of whose scored rows diverges by `nats`."""
    parts = []
    while (part := it.next_part(now_s)) is not None:
        parts.append(part)
        rows = max(0, len(part.ids) - max(part.first_scored, part.start))
        it.scored(part, PartScore(nats * rows, rows), took_s)
        if len(part.ids) in {len(PROMPT), LIMITS.max_tokens}:
            break
    return parts


def test_a_sample_is_computed_in_parts_and_its_last_rows_are_scored() -> None:
    it = guard()
    it.saw(PROMPT)
    parts = score_one(it, 0.02, 1.0)
    assert [(part.start, len(part.ids)) for part in parts] == [(0, 64), (64, 128), (128, 150)]
    assert {part.first_scored for part in parts} == {118}
    assert parts[-1].ids == PROMPT
    assert it.num_scored == 1
    assert it.mean_nats == pytest.approx(0.02)
    assert sum(it.spread.counts) == 1
    assert it.next_part(9.0) is None


def test_a_long_prompt_is_cut_and_a_short_one_is_no_sample() -> None:
    it = guard()
    it.saw(range(31))
    assert it.next_part(1.0) is None
    it.saw(range(5000))
    assert score_one(it, 0.0, 1.0)[-1].ids == tuple(range(200))


@pytest.mark.parametrize(("share", "kept"), [(1.0, 40), (0.5, 20), (0.05, 2)])
def test_a_share_of_prompts_is_sampled(share: float, kept: int) -> None:
    it, found, now_s = guard(sampled_share=share), 0, 1.0
    for _ in range(40):
        it.saw(PROMPT)
        now_s += 1.0
        found += bool(score_one(it, 0.0, now_s))
    assert abs(found - kept) <= 1


def test_few_samples_wait_and_the_oldest_goes() -> None:
    it = guard()
    for first in range(10):
        it.saw(range(first, first + 40))
    assert it.num_dropped == 6
    part = it.next_part(1.0)
    assert part is not None
    assert part.ids[0] == 6


def test_steps_come_first() -> None:
    it = guard()
    it.saw(PROMPT)
    it.worked(10.0)
    assert it.next_part(10.2) is None
    assert it.wake_s(10.2) == pytest.approx(10.25)
    part = it.next_part(10.25)
    assert part is not None
    it.scored(part, PartScore(0.0, 0), 0.01)
    it.worked(10.3)  # a request came in between
    assert it.next_part(10.4) is None
    following = it.next_part(10.55)
    assert following is not None
    assert following.start == 64


def test_scoring_takes_a_share_of_all_time() -> None:
    it = guard()
    now_s, spent_s = 0.0, 0.0
    while now_s < 1000.0:
        it.saw(PROMPT)
        part = it.next_part(now_s)
        if part is None:
            wake_s = it.wake_s(now_s)
            assert wake_s is not None
            assert wake_s > now_s
            now_s = wake_s
            continue
        took_s = 0.4
        it.scored(part, PartScore(0.0, 1), took_s)
        spent_s, now_s = spent_s + took_s, now_s + took_s
    assert 40.0 <= spent_s <= 52.0


def test_without_samples_nothing_wakes_the_engine() -> None:
    assert guard().wake_s(100.0) is None


def test_the_verdict_is_reached_once_and_only_above_the_bound() -> None:
    it, now_s = guard(), 0.0
    verdicts = []
    for nats in (0.09, 0.09, 0.09, 0.09, 0.14, 0.14, 0.14, 0.14, 0.14, 0.9):
        it.saw(PROMPT)
        now_s += 10.0
        score_one(it, nats, now_s)
        verdicts.append(it.verdict)
    first = next(i for i, verdict in enumerate(verdicts) if verdict is not None)
    assert first == 5  # (4 * 0.09 + 2 * 0.14) / 6 > 0.1
    assert verdicts[first].num_scores == 6
    assert set(verdicts[first:]) == {verdicts[first]}
    assert it.counters == {"kv_guard_scored": 10, "kv_guard_dropped": 0, "kv_guard_exceeded": 1}


def test_few_scores_are_no_verdict_and_old_ones_are_forgotten() -> None:
    it, now_s = guard(), 0.0
    for number in range(3):
        it.saw(PROMPT)
        score_one(it, 5.0, 10.0 * (number + 1))
    assert it.verdict is None
    it, now_s = guard(bound_nats=1.0), 0.0
    for nats in [0.0] * 100 + [1.5] * 16:
        it.saw(PROMPT)
        now_s += 10.0
        score_one(it, nats, now_s)
    assert it.verdict is not None
    assert it.verdict.num_scores == 16


def test_numbers_that_are_not_finite_are_no_score() -> None:
    it = guard()
    for number in range(5):
        it.saw(PROMPT)
        score_one(it, float("nan"), 10.0 * (number + 1))
    assert it.verdict is None
    assert it.counters == {"kv_guard_scored": 0, "kv_guard_dropped": 5, "kv_guard_exceeded": 0}


class Broken:
    """A scorer that fails, or finds the same divergence everywhere."""

    served = "int8"

    def __init__(self, nats: float | None) -> None:
        self.nats = nats

    def score(self, part: Part) -> PartScore:
        if self.nats is None:
            raise MemoryError("none left")
        return PartScore(self.nats, 1)


class Hand:
    """A clock that a test sets."""

    now = 0.0

    def now_s(self) -> float:
        return self.now


def run_samples(scorer: Broken, count: int) -> IdleGuard:
    clock = Hand()
    as_clock: Clock = clock  # type: ignore[assignment]
    it = IdleGuard(CodecGuard(LIMITS, 0.0), scorer, as_clock)
    for _ in range(count):
        it.saw(PROMPT)
        for _ in range(3):
            clock.now += 1.0
            it.turn()
    return it


def test_a_verdict_is_logged_with_codec_and_remedy(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        it = run_samples(Broken(0.5), 6)
    (record,) = caplog.records
    assert "the KV cache in int8 differs from bfloat16 by 0.5 nats" in record.getMessage()
    assert "--kv-cache-dtype (bfloat16)" in record.getMessage()
    assert it.counters["kv_guard_exceeded"] == 1


def test_a_sample_that_cannot_be_scored_is_dropped() -> None:
    it = run_samples(Broken(None), 3)
    assert it.counters == {"kv_guard_scored": 0, "kv_guard_dropped": 3, "kv_guard_exceeded": 0}
    assert it.wake_s() is None


def test_an_attempt_that_fails_costs_its_time_like_any_other() -> None:
    clock = Hand()

    class Slow(Broken):
        def score(self, part: Part) -> PartScore:
            clock.now += 2.0
            return super().score(part)

    it = IdleGuard(CodecGuard(LIMITS, 0.0), Slow(None), clock)  # type: ignore[arg-type]
    it.saw(PROMPT)
    it.saw(PROMPT)
    clock.now = 30.0  # one second is saved up
    it.turn()
    assert it.wake_s() == pytest.approx(32.0 + (2.0 - 1.0 - 0.1) / 0.05, abs=0.01)
