"""The decisions around a draft model: whose KV it computes, how much at once, and what becomes of its blocks."""

import random
from dataclasses import replace

import pytest
from support.engines.draft_models import drafted, planner_of
from support.engines.sampling_room import Room, ids_of, submit
from support.fakes.draft_cells import VOCABULARY, CellDrafter, CellTarget

from twostroke.core.request import SamplingParams, SequenceKey
from twostroke.decode_worker.policy import combined_policy, decode_policy
from twostroke.engine.cache_manager import KvCacheManager
from twostroke.engine.link.messages import CancelSequence
from twostroke.engine.sequence import new_sequence
from twostroke.engine.speculation.draft_model.catch_up import FIRST_TOKENS, LEAST_TOKENS, MOST_TOKENS, CatchUp
from twostroke.engine.speculation.draft_model.holdings import proposer_of
from twostroke.engine.speculation.draft_model.plan import DraftResult, all_failed
from twostroke.engine.speculation.draft_model.planner import DIRECT_TOKENS
from twostroke.engine.speculation.draft_model.proposer import ModelProposer
from twostroke.engine.speculation.drafting import Drafting
from twostroke.engine.speculation.length import DraftLength
from twostroke.engine.speculation.pace import DraftPace
from twostroke.engine.speculation.speculation import Speculation
from twostroke.kv.cache.pool import BlockPool
from twostroke.kv.cache.prefix import PrefixCache

PARAMS = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)

# ------------------------------------------------------------------ one sequence


def guessed(after, ids):
    proposer = ModelProposer(PARAMS, num_computed=after - 1)
    proposer.guessed, proposer.guessed_after = ids, after
    return proposer


def test_guesses_are_for_the_tokens_that_they_follow():
    proposer = guessed(3, (7, 8, 9))
    assert proposer.propose([1, 2, 3], 2) == (7, 8)
    assert proposer.propose([1, 2, 3, 7], 2) == ()


@pytest.mark.parametrize(
    ("came", "computed"),
    [
        ((4,), 3),  # the first guess was wrong
        ((7, 4), 4),
        ((7, 8, 4), 5),
        ((7, 8, 9, 4), 5),  # all right: the KV of the last one is not computed
        ((7,), 3),  # right and not checked: one token is left to guess from
        ((7, 8), 4),
        ((4, 5), 3),  # not checked for two steps, and wrong
        ((7, 5, 6), 4),
    ],
)
def test_the_kv_of_right_guesses_counts(came, computed):
    proposer = guessed(3, (7, 8, 9))
    proposer.settle([1, 2, 3, *came])
    assert (proposer.num_computed, proposer.guessed) == (computed, ())


def test_guesses_stay_while_no_token_has_come():
    proposer = guessed(3, (7, 8, 9))
    proposer.settle([1, 2, 3])
    assert (proposer.guessed, proposer.num_computed) == ((7, 8, 9), 2)


# ------------------------------------------------------------------ the plan


def sequence_of(name, length, planner, rank=0):
    sequence = new_sequence(submit(name, tuple(n % VOCABULARY for n in range(length)), PARAMS), rank)
    sequence.drafting = Drafting(planner.start(PARAMS), DraftLength(4), "draft_model")
    return sequence


def test_a_short_lag_is_computed_in_the_call_that_guesses():
    planner = planner_of()
    one = sequence_of("a", DIRECT_TOKENS, planner)
    plan = planner.plan([(one, 3)])
    assert not plan.catch_up.sequences
    (step,) = plan.guesses.sequences
    assert (step.start, step.token_ids, step.samples, plan.lengths) == (0, tuple(range(DIRECT_TOKENS)), True, (3,))
    planner.take({one.key: one}, plan, DraftResult(((5, 6, 7),)))
    proposer = proposer_of(one)
    assert (proposer.num_computed, proposer.guessed) == (DIRECT_TOKENS - 1, (5, 6, 7))
    planner.settle(one)
    assert planner.plan([(one, 3)]) is None  # its guesses are not judged yet


def test_a_long_lag_is_caught_up_in_chunks_that_all_share_in_order():
    planner = planner_of(chunk=40, caches=False)
    one, two = sequence_of("a", 50, planner), sequence_of("b", 30, planner)
    both = {one.key: one, two.key: two}
    plan = planner.plan([(one, 2), (two, 2)])
    assert [(s.key, s.start, len(s.token_ids)) for s in plan.catch_up.sequences] == [(one.key, 0, 40)]
    assert plan.lengths == ()
    planner.take(both, plan, DraftResult(()))
    plan = planner.plan([(one, 2), (two, 2)])
    assert [(s.key, s.start, len(s.token_ids)) for s in plan.catch_up.sequences] == [
        (one.key, 40, 9),
        (two.key, 0, 29),
    ]
    assert [(s.key, s.start, s.token_ids) for s in plan.guesses.sequences] == [
        (one.key, 49, (49,)),
        (two.key, 29, (29,)),
    ]
    assert plan.catch_up.step < plan.guesses.step


def test_what_two_sequences_lack_is_computed_once():
    planner = planner_of(chunk=200)
    one, two, other = sequence_of("a", 40, planner), sequence_of("b", 44, planner), sequence_of("c", 40, planner)
    other.identities = other.identities[:0]  # another prompt
    wishes = [(one, 1), (two, 1), (other, 1)]
    plan = planner.plan(wishes)
    assert [step.key for step in plan.catch_up.sequences] == [one.key, other.key]
    assert proposer_of(two).blocks == []
    planner.take({s.key: s for s, _ in wishes}, plan, DraftResult(((5,), (5,))))
    for sequence, _ in wishes:
        planner.settle(sequence)
    plan = planner.plan(wishes)
    assert [(step.key, step.start) for step in plan.catch_up.sequences] == [(two.key, 32)]
    assert proposer_of(two).blocks[:2] == proposer_of(one).blocks[:2]


def test_block_tables_cover_the_rows_of_the_guesses_and_no_more():
    planner = planner_of(num_blocks=4)
    one = sequence_of("a", 15, planner)
    planner.plan([(one, 3)])  # 15 + 2 rows
    assert len(proposer_of(one).blocks) == 2
    one.tokens.append(3)
    planner.holdings.trim(one)
    assert len(proposer_of(one).blocks) == 1
    planner.holdings.release(one)
    assert planner.holdings.pool.num_live == 0


def test_guesses_whose_blocks_are_given_back_before_they_are_judged_are_made_again():
    planner = planner_of(num_blocks=4)
    one = sequence_of("a", 15, planner)
    plan = planner.plan([(one, 3)])
    planner.take({one.key: one}, plan, DraftResult(((5, 6, 7),)))
    planner.holdings.trim(one)  # its step sampled nothing: a mask was late
    planner.settle(one)
    again = planner.plan([(one, 3)])
    assert again is not None, "the KV of tokens 15 and 16 is not there any more"
    assert again.guesses.sequences[0].start == 14
    planner.take({one.key: one}, again, DraftResult(((5,),)))
    planner.holdings.trim(one)
    assert proposer_of(one).propose(one.tokens, 3) == ()
    short = sequence_of("b", 10, planner)
    planner.take({short.key: short}, planner.plan([(short, 3)]), DraftResult(((5, 6, 7),)))
    planner.holdings.trim(short)  # nothing is given back
    assert proposer_of(short).propose(short.tokens, 3) == (5, 6, 7)


def test_no_more_is_guessed_than_the_step_has_rows():
    pool = BlockPool(64, 16)
    planner = planner_of()
    speculation = Speculation(planner, 4, "draft_model")
    decodes = [sequence_of(name, 20, planner) for name in "abc"]
    for sequence in decodes:
        sequence.num_computed, sequence.drafting.length.length = 19, 4
        proposer_of(sequence).blocks = planner.holdings.pool.take(2)
        proposer_of(sequence).num_computed = 19
    plan = speculation.begin(decodes, 6, KvCacheManager(pool, PrefixCache(pool), b"key"), 0)
    assert plan is not None
    assert plan.lengths == (4, 2)


def test_what_is_released_is_not_counted_when_its_guesses_come_true():
    planner = planner_of(num_blocks=4)
    one = sequence_of("a", 15, planner)
    planner.take({one.key: one}, planner.plan([(one, 3)]), DraftResult(((5, 6, 7),)))
    one.tokens += [5, 6]
    planner.holdings.release(one)  # it is preempted
    planner.settle(one)
    proposer = proposer_of(one)
    assert (proposer.num_computed, proposer.num_published, proposer.blocks) == (0, 0, [])
    planner.holdings.check_integrity([one])


def test_a_sequence_without_room_gets_no_guess_and_keeps_what_it_has():
    planner = planner_of(num_blocks=2, chunk=1024)
    one, two = sequence_of("a", 20, planner), sequence_of("b", 5, planner)
    plan = planner.plan([(one, 2), (two, 2)])
    assert [step.key for step in plan.guesses.sequences] == [one.key]
    assert proposer_of(two).blocks == []
    planner.holdings.release(one)
    assert [step.key for step in planner.plan([(two, 2)]).guesses.sequences] == [two.key]


def test_the_context_of_the_draft_model_bounds_its_guesses():
    planner = planner_of(context=12)
    for length, most in ((8, 4), (10, 3), (12, 1), (13, None)):
        one = sequence_of("a", length, planner)
        plan = planner.plan([(one, 4)])
        if plan is not None and plan.catch_up.sequences:
            assert plan.lengths == (most,)
        assert (None if plan is None else plan.lengths[0]) == most
        planner.holdings.release(one)


def test_ids_that_only_one_model_has_are_not_computed_and_not_guessed():
    planner = planner_of(vocabulary=20)
    one, two = sequence_of("a", 8, planner), sequence_of("b", 8, planner)
    two.tokens[3] = 20
    plan = planner.plan([(one, 4), (two, 4)])
    assert [step.key for step in plan.guesses.sequences] == [one.key]
    planner.take({one.key: one}, plan, DraftResult(((3, 19, 20, 4),)))
    assert proposer_of(one).guessed == (3, 19)
    assert proposer_of(two).is_off


def test_what_is_not_usable_is_given_back_for_good():
    planner = planner_of(caches=False)
    one, two = sequence_of("a", 8, planner), sequence_of("b", 30, planner)
    plan = planner.plan([(one, 4), (two, 4)])
    assert all_failed(plan).unusable == {one.key, two.key}
    planner.take({one.key: one, two.key: two}, plan, all_failed(plan))
    assert planner.holdings.pool.num_live == 0
    assert planner.plan([(one, 4), (two, 4)]) is None


def test_its_draws_are_the_targets_without_what_only_an_answer_needs():
    params = replace(PARAMS, logprobs=3, prompt_logprobs=2, seed=4, temperature=0.5)
    assert planner_of().start(params).params == replace(PARAMS, seed=4, temperature=0.5)


def test_a_found_prefix_leaves_the_last_token_to_guess_from():
    planner = planner_of()
    one = sequence_of("a", 33, planner)
    planner.take({one.key: one}, planner.plan([(one, 1)]), DraftResult(((5,),)))
    one.tokens.append(6)
    planner.settle(one)
    planner.holdings.release(one)
    for length, found in ((32, 16), (33, 32), (16, 0)):
        two = sequence_of("b", length, planner)
        plan = planner.plan([(two, 1)])
        assert proposer_of(two).num_computed == found
        assert plan.guesses.sequences[-1].token_ids[-1] == length - 1
        planner.holdings.release(two)


# ------------------------------------------------------------------ chunks and trials


def test_chunks_follow_their_measured_times_within_bounds():
    catch_up = CatchUp(20.0)
    assert catch_up.tokens == FIRST_TOKENS
    catch_up.observe(64, 6.4)  # 0.1 ms per token: 200 would fit, twice the last chunk at most
    assert catch_up.tokens == 128
    catch_up.observe(128, 12.8)
    assert catch_up.tokens == 200
    for _ in range(30):
        catch_up.observe(100, 500.0)
    assert catch_up.tokens == LEAST_TOKENS
    for _ in range(90):
        catch_up.observe(100, 0.01)
    assert catch_up.tokens == MOST_TOKENS
    catch_up.observe(100, 0.0)
    assert catch_up.tokens == MOST_TOKENS
    disturbed = CatchUp(100.0)
    disturbed.observe(64, 64.0)
    disturbed.observe(100, 1000.0)  # one chunk of ten times the time counts for a fifth
    assert disturbed.tokens == int(100.0 / 2.8)
    small = CatchUp(20.0, 32)  # steps of 32 tokens
    assert small.tokens == 32
    small.observe(32, 0.1)
    assert small.tokens == 32


def measured(pace, gain):
    """Measure four steps of each kind."""
    for _ in range(4):
        assert pace.begins(1)
        pace.observe(1, 2, 2, 2.0 / gain)
    for _ in range(4):
        pace.begins(1)
        pace.observe(1, 0, 1, 1.0)


def test_a_trial_waits_until_the_draft_model_has_caught_up():
    pace = DraftPace()
    measured(pace, 0.5)
    pause = 0
    while not pace.begins(1):
        pause += 1
        pace.observe(1, 0, 1, 1.0)
    assert pause == 64
    pace.postpone(1)
    for _ in range(9):
        assert pace.begins(1)  # still the first step of the trial
        pace.postpone(1)
    tried = 0
    while pace.begins(1):
        tried += 1
        pace.observe(1, 2, 2, 4.0)
    assert tried == 2


def test_a_first_measurement_is_not_postponed_into_a_trial():
    pace = DraftPace()
    for _ in range(100):
        assert pace.begins(1)
        pace.postpone(1)
    measured(pace, 2.0)
    steps = 0
    while pace.begins(1):
        steps += 1
    assert steps == 64


# ------------------------------------------------------------------ every schedule


def plain_text(prompt, count):
    target = CellTarget(16)
    room = Room(target)
    target.live = room.core._scheduler.by_key
    room.run(submit("plain", prompt, replace(PARAMS, max_tokens=count)))
    return room.tokens["plain"]


@pytest.mark.parametrize("seed", range(8))
def test_blocks_hold_what_they_are_said_to_hold_in_any_schedule(seed):
    """Small pools, preemptions, cancels, failures, masks that are late: every cell that is read is the reader's own."""
    draw = random.Random(seed)
    block_tokens = 16
    drafter = CellDrafter(
        block_tokens, draw, draw.choice((0.3, 0.8, 1.0)), draw.choice((0.0, 0.01)), draw.choice((0.0, 0.2))
    )
    target = CellTarget(block_tokens, draw, draw.choice((0.0, 0.2)))
    chunk = draw.choice((16, 30, 200))
    room = Room(
        target,
        draw.choice((combined_policy, decode_policy)),
        num_blocks=draw.choice((10, 14, 40)),
        speculation=drafted(
            draw.choice((1, 3, 8)),
            num_blocks=draw.choice((6, 8, 14)),
            chunk=chunk,
            vocabulary=VOCABULARY,
            caches=draw.random() < 0.8,
        ),
        drafter=drafter,
        max_batch_tokens=draw.choice((32, 64)),
        max_num_seqs=draw.choice((3, 6)),
    )
    target.live = drafter.live = room.core._scheduler.by_key
    prompts = [tuple(id_ % VOCABULARY for id_ in ids_of(draw.randint(1, 60), n)) for n in range(3)]
    cancelled, expected = set(), {}
    for number in range(10):
        prompt = (*draw.choice(prompts), *(draw.randrange(VOCABULARY) for _ in range(draw.choice((0, 1, 20)))))
        count = draw.randint(1, 40)
        name = f"s{number}"
        expected[name] = prompt, count
        room.send(submit(name, prompt, replace(PARAMS, max_tokens=count), priority=draw.choice((0, 1))))
        for _ in range(draw.randint(0, 12)):
            room.step()
        if draw.random() < 0.2:
            cancelled.add(name)
            room.send(CancelSequence(SequenceKey(name, 0)))
            room.core.check_integrity()
    room.run()
    for name, (prompt, count) in expected.items():
        text = plain_text(prompt, count)
        if name in cancelled:
            assert room.tokens.get(name, []) == text[: len(room.tokens.get(name, []))]
        else:
            assert room.tokens[name] == text
    holdings = room.core._scheduler.guess_planner.holdings
    assert room.pool.num_live == holdings.pool.num_live == 0
    holdings.check_integrity([])
    assert room.core.counters["draft_model_draft_tokens"] > 0
    assert drafter.most_caught_up <= chunk
