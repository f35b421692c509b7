"""The on-line coefficients, against machines whose price is known."""

import pytest

from twostroke.core.request import SamplingParams, SequenceKey
from twostroke.engine.plan import SequenceStep, StepPlan
from twostroke.engine.step_times import StepTimeModel

PARAMS = SamplingParams(max_tokens=9)
KEY = SequenceKey("p", 0)


def chunk(start: int, size: int) -> SequenceStep:
    return SequenceStep(SequenceKey("p", 0), start, (1,) * size, (), (), False, PARAMS, 0)


def decode(start: int) -> SequenceStep:
    return SequenceStep(SequenceKey("d", 0), start, (1,), (), (), True, PARAMS, 3)


@pytest.mark.parametrize(("a", "b"), [(0.5, 0.002), (1.0, 0.0), (0.0, 0.001)])
def test_finds_the_price_of_tokens_and_pairs(a, b):
    pace = StepTimeModel()
    for round_ in range(60):
        start, size = (round_ * 37) % 500, 16 + (round_ * 13) % 200
        pace.observe(StepPlan(round_, (chunk(start, size),)), a * size + b * size * (start + size / 2))
    assert pace.prefill_ms_per_token == pytest.approx(a, abs=0.02)
    assert pace.prefill_ms_per_token_pair == pytest.approx(b, rel=0.05)


def test_a_price_that_only_pairs_can_have_is_given_to_no_token():
    """Steps take no time at a prompt's start and much far behind it: the best fit gives tokens less than nothing."""
    pace = StepTimeModel()
    for round_ in range(40):
        start = 1000 * (round_ % 2)
        pace.observe(StepPlan(round_, (chunk(start, 100),)), 0.1 * start)
    assert pace.prefill_ms_per_token == 0.0
    assert pace.prefill_ms_per_token_pair == pytest.approx(100 / (100 * 1050), rel=0.02)


def test_short_prompts_do_not_make_a_long_one_look_endless():
    """Steps of about 30 ms whatever they hold: what a few short prompts on a busy machine look like."""
    pace = StepTimeModel()
    for round_ in range(12):
        pace.observe(StepPlan(round_, (chunk(0, 4 + 3 * (round_ % 4)),)), 30.0 + 25.0 * (round_ % 3))
        long_ms = pace.prefill_ms_per_token * 3000 + pace.prefill_ms_per_token_pair * 3000 * 1500
        assert long_ms < 30_000


def test_decodes_beside_a_chunk_are_not_counted_as_prefill():
    pace = StepTimeModel()
    for round_ in range(40):
        pace.observe(StepPlan(round_, (decode(9),)), 7.0)
        start, size = (round_ * 37) % 500, 16 + (round_ * 13) % 200
        pace.observe(StepPlan(round_, (decode(9), chunk(start, size))), 7.0 + 0.5 * size)
    assert pace.decode_step_ms == pytest.approx(7.0)
    assert pace.prefill_ms_per_token == pytest.approx(0.5, abs=1e-6)


def test_the_price_is_never_negative_and_old_steps_fade():
    pace = StepTimeModel()
    for round_ in range(30):
        pace.observe(StepPlan(round_, (chunk(0, 16 + round_ % 5),)), 100.0 / (round_ % 5 + 1))
        assert pace.prefill_ms_per_token >= 0
        assert pace.prefill_ms_per_token_pair >= 0
    for round_ in range(400):
        pace.observe(StepPlan(round_, (chunk(round_ % 7 * 16, 16 + round_ % 50),)), 2.0 * (16 + round_ % 50))
    assert pace.prefill_ms_per_token == pytest.approx(2.0, rel=1e-3)


def test_a_step_that_scores_says_nothing_of_the_others():
    pace = StepTimeModel()
    scored = SequenceStep(KEY, 0, (1,) * 64, (), (), False, PARAMS, 0, targets=(1,) * 64)
    for round_ in range(9):
        pace.observe(StepPlan(round_, (chunk(0, 64),)), 64.0)
        pace.observe(StepPlan(round_, (scored, decode(9))), 9000.0)
    assert pace.prefill_ms_per_token == pytest.approx(1.0, rel=0.05)
    assert pace.decode_step_ms == 0.0


def test_steps_that_score_have_prices_of_their_own():
    pace = StepTimeModel()
    for round_ in range(60):
        start, size = (round_ * 37) % 500, 16 + (round_ * 13) % 200
        scored = SequenceStep(KEY, start, (1,) * size, (), (), False, PARAMS, 0, targets=(1,) * size)
        pace.observe(StepPlan(round_, (scored,)), 0.8 * size + 0.003 * size * (start + size / 2))
    assert pace.times.scored_ms_per_token == pytest.approx(0.8, abs=0.02)
    assert pace.times.scored_ms_per_token_pair == pytest.approx(0.003, rel=0.05)
    assert pace.times.tokens_within(38.0, 1000, is_scored=True) == pytest.approx(10, rel=0.05)
    assert pace.times.tokens_within(38.0, 1000) == 0  # none without scores was measured


def test_steps_grow_by_two_whatever_the_last_chunks_of_a_long_prompt_seem_to_say():
    """Measured once: 112 tokens in 41 to 92 ms where attention was most of the time; then 480 tokens took 167 ms."""
    pace = StepTimeModel()
    for round_, size in enumerate((32, 64, 128, 112, 112, 96, 96, 112, 112, 104) * 4):
        pace.observe(StepPlan(round_, (chunk(2_000 + 20 * round_, size),)), 41.0 + 0.0002 * size * 20 * round_)
    times = pace.times
    assert times._replace(largest_tokens=float("inf")).tokens_within(300.0, 0) > 500
    assert 112 < times.tokens_within(300.0, 0) <= 256


def test_the_last_token_of_a_prompt_is_prefill():
    pace = StepTimeModel()
    last = SequenceStep(KEY, 64, (1,), (), (), True, PARAMS, 0)
    pace.observe(StepPlan(1, (last,)), 40.0)
    assert pace.decode_step_ms == 0.0
    assert pace.prefill_ms_per_token > 0
