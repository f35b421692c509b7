"""The decode role's taste, question by question; its behaviour stands in tests/scenarios/decode_policy."""

import pytest

from twostroke.core.request import SamplingParams, SequenceKey
from twostroke.decode_worker.policy import combined_policy, decode_policy
from twostroke.engine.core import CoreLimits, EngineCore
from twostroke.engine.link.messages import Source, Submit
from twostroke.engine.plan import StepResult
from twostroke.engine.policy import Ahead, Room, StepBudget, StepLimits
from twostroke.engine.step_times import StepTimes
from twostroke.kv.cache.pool import BlockPool
from twostroke.kv.cache.prefix import PrefixCache

LIMITS = StepLimits(target_ms=80.0, max_num_seqs=8, max_batch_tokens=256)
POLICY = decode_policy(LIMITS)


def test_prefill_alone_has_the_whole_step_and_beside_decodes_a_share():
    assert POLICY.budget(0) == StepBudget(256, 8, 256)
    assert POLICY.budget(1) == StepBudget(256, 8, 64)
    assert combined_policy(LIMITS).budget(1) == StepBudget(256, 8, 128)


def test_the_share_is_never_less_than_two_hash_blocks_or_the_step():
    assert decode_policy(StepLimits(max_num_seqs=2, max_batch_tokens=64)).budget(1).prefill_tokens == 32
    assert decode_policy(StepLimits(max_num_seqs=2, max_batch_tokens=16)).budget(1).prefill_tokens == 16


@pytest.mark.parametrize(
    ("times", "num_computed", "fits"),
    [
        (StepTimes(), 0, 500),  # nothing is known yet
        (StepTimes(20.0, 0.5), 9_000, 120),  # 60 ms are left of 80
        (StepTimes(20.0, 0.5, 0.001), 500, 60),  # and each token costs twice as much so late in a prompt
        (StepTimes(70.0, 0.5), 0, 140),  # as long as the decodes themselves
        (StepTimes(300.0, 1.0), 0, 300),
        (StepTimes(20.0, 0.01), 0, 500),  # never more than was asked for
        (StepTimes(20.0, 90.0), 0, 32),  # never less than a long prompt and a short one need
    ],
)
def test_prompts_beside_decodes_get_the_rest_of_the_time(times, num_computed, fits):
    for policy in (POLICY, combined_policy(LIMITS)):
        assert policy.prompt_tokens(500, times, num_computed, is_scored=False) == fits
    assert POLICY.prompt_tokens(20, times, num_computed, is_scored=False) == 20


def test_the_time_of_a_step_is_configured():
    policy = decode_policy(StepLimits(target_ms=40.0))
    assert policy.prompt_tokens(500, StepTimes(10.0, 0.5), 0, is_scored=False) == 60


def test_prompts_whose_logprobs_are_wanted_have_prices_of_their_own_once_they_are_known():
    assert POLICY.prompt_tokens(500, StepTimes(20.0, 0.5), 0, is_scored=True) == 42  # a third of the time
    times = StepTimes(20.0, 0.5, 0.0, 0.5, 0.001)
    assert POLICY.prompt_tokens(500, times, 100, is_scored=True) == 35
    assert POLICY.prompt_tokens(500, times, 500, is_scored=False) == 120


def test_the_last_blocks_are_kept_for_growth():
    assert POLICY.has_room(Room(needed=15, used=60, promised=20, total=100))
    assert not POLICY.has_room(Room(needed=16, used=60, promised=20, total=100))


@pytest.mark.parametrize(
    ("tokens", "ahead", "is_near"),
    [
        (500, Ahead((200, 55), 0), True),
        (500, Ahead((200, 55), 3), False),  # decodes run: only 64 a step
        (32, Ahead((255,), 3), True),  # short enough to pass
        (32, Ahead((255, 20, 12), 3), False),  # others pass already
    ],
)
def test_who_is_near(tokens, ahead, is_near):
    assert POLICY.is_near(tokens, ahead) is is_near


def test_only_the_combined_role_makes_several_offers():
    assert POLICY.max_offers < combined_policy(LIMITS).max_offers


def test_a_prompt_that_is_alone_has_the_whole_step_whatever_steps_take():
    pool = BlockPool(64, 16)
    core = EngineCore(CoreLimits(), pool, PrefixCache(pool), POLICY, eos_ids=[], key=b"cluster")
    core.set_times(StepTimes(20.0, 90.0))
    ids = tuple(range(2, 202))
    core.handle(Submit(SequenceKey("r", 0), Source.LOCAL, ids, (), b"root", SamplingParams(1)), 0.0)
    core.tick(0.0)
    assert [step.num_tokens for step in core.plan(0.0).sequences] == [200]


@pytest.mark.parametrize(("wanted", "size"), [(None, 48), (0, 32)])
def test_a_prompt_beside_decodes_is_cut_by_the_price_of_its_kind(wanted, size):
    pool = BlockPool(64, 16)
    core = EngineCore(CoreLimits(), pool, PrefixCache(pool), POLICY, eos_ids=[], key=b"cluster")
    core.set_times(StepTimes(20.0, 1.0, 0.0, 1.8, 0.0))
    core.handle(Submit(SequenceKey("d", 0), Source.LOCAL, (2, 3), (), b"root", SamplingParams(9)), 0.0)
    core.tick(0.0)
    plan = core.plan(0.0)
    core.apply(plan, StepResult(plan.step, ((5,),)), 0.0)
    params = SamplingParams(1, prompt_logprobs=wanted)
    core.handle(Submit(SequenceKey("p", 0), Source.LOCAL, tuple(range(2, 202)), (), b"root", params), 0.0)
    core.tick(0.0)
    assert [step.num_tokens for step in core.plan(0.0).sequences] == [1, size]
