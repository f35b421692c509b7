"""The decisions of speculative decoding: what is guessed, how much, and when it pays."""

import random

import pytest

from twostroke.core.request import SamplingParams, SequenceKey
from twostroke.engine.cache_manager import KvCacheManager
from twostroke.engine.link.messages import Source, Submit
from twostroke.engine.plan import SequenceStep, StepPlan, StepResult
from twostroke.engine.sequence import new_sequence
from twostroke.engine.speculation.drafting import Drafting
from twostroke.engine.speculation.length import FIRST_REST, LONGEST_REST, DraftLength
from twostroke.engine.speculation.ngram import INDEXED_PER_LOOKUP, MAX_MATCHES, NgramLimits, NgramProposer
from twostroke.engine.speculation.pace import MARGIN, DraftPace
from twostroke.engine.speculation.speculation import Speculation
from twostroke.kv.block import BlockId
from twostroke.kv.cache.pool import BlockPool
from twostroke.kv.cache.prefix import PrefixCache

# ------------------------------------------------------------------ n-grams


def guess(tokens, most=4, least=2, longest=4):
    return NgramProposer(NgramLimits(least, longest)).propose(tokens, most)


def test_guesses_what_followed_the_last_tokens_before():
    assert guess([1, 2, 3, 4, 5, 9, 2, 3]) == (4, 5, 9, 2)
    assert guess([1, 2, 3, 4, 5, 9, 2, 3], most=1) == (4,)
    assert guess([1, 2, 3, 4, 5, 9, 2, 3], most=0) == ()


def test_guesses_nothing_without_an_earlier_match():
    assert guess([1, 2, 3, 4, 5]) == ()
    assert guess([1, 2, 3, 9, 3]) == ()  # one token is less than the shortest match
    assert guess([1, 2, 3, 9, 3], least=1) == (9, 3, 9, 3)
    assert guess([7]) == guess([]) == ()


def test_the_longest_match_wins_and_of_equal_ones_the_latest():
    assert guess([1, 2, 3, 50, 9, 2, 3, 60, 1, 2, 3], most=1) == (50,)
    assert guess([2, 3, 50, 9, 2, 3, 60, 1, 2, 3], most=1) == (60,)
    # beyond the longest length all matches are equal
    assert guess([8, 1, 2, 50, 9, 1, 2, 60, 8, 1, 2], most=1, longest=2) == (60,)


def test_a_match_at_the_end_is_continued_with_its_period():
    assert guess([5, 6, 7, 5, 6, 7, 5, 6], most=7) == (7, 5, 6, 7, 5, 6, 7)
    assert guess([4, 4, 4, 4], most=3) == (4, 4, 4)


def test_guesses_the_same_token_by_token_as_at_once_and_as_by_a_search():
    draw = random.Random(1)
    text = [draw.randrange(4) for _ in range(400)]
    grown = NgramProposer(NgramLimits(2, 4))
    for end in range(1, len(text)):
        told = grown.propose(text[:end], 3)
        if end <= INDEXED_PER_LOOKUP:
            assert told == guess(text[:end], 3)
        assert (told[:1] or None) == searched(text[:end])


def searched(tokens):
    """Next token after the longest of the latest matches, by looking at each."""
    places = [p for p in range(2, len(tokens)) if tokens[p - 2 : p] == tokens[-2:]][-MAX_MATCHES:]
    best = max(((same(tokens, p), p) for p in places), default=None)
    return None if best is None else (tokens[best[1]],)


def same(tokens, place):
    length = 0
    while length < min(4, place) and tokens[place - 1 - length] == tokens[-1 - length]:
        length += 1
    return length


def test_a_long_prompt_is_indexed_in_parts():
    tokens = list(range(3 * INDEXED_PER_LOOKUP))
    proposer = NgramProposer(NgramLimits())
    late = [*tokens, *tokens[2 * INDEXED_PER_LOOKUP :][:2]]
    assert proposer.propose(late, 2) == ()  # its place is not indexed yet
    proposer.propose(late, 2)
    assert proposer.propose(late, 2) == tuple(tokens[2 * INDEXED_PER_LOOKUP + 2 :][:2])


class Colliding(int):
    """Numbers that all have one hash."""

    def __hash__(self):
        return 7


def test_runs_with_one_hash_are_told_apart():
    tokens = [Colliding(n) for n in (1, 2, 3, 4, 9, 8, 1, 2)]
    assert guess(tokens, most=2) == (3, 4)
    assert guess(tokens[:6]) == ()


# ------------------------------------------------------------------ length


def test_the_length_grows_by_one_and_is_halved():
    length = DraftLength(6)
    for expected in (1, 2, 3):
        assert length.at(expected) == expected
        length.judge(expected, expected, 4)
    assert length.at(4) == 4
    length.judge(4, 2, 7)
    assert length.at(7) == 4  # half were right
    length.judge(4, 1, 9)
    assert length.at(9) == 2
    for n in range(9):
        length.judge(length.at(n), length.at(n), n)
    assert length.at(99) == 6


def test_a_guess_is_under_way_until_it_is_judged():
    drafting = Drafting(Counting(), DraftLength(8, length=4))
    drafting.propose([1, 2, 3], 0, 3)
    assert drafting.num_under_way == 3
    drafting.judge(3, 1, 2)
    assert (drafting.num_under_way, drafting.num_drafted, drafting.num_accepted) == (0, 3, 1)


def test_a_shorter_guess_that_was_right_does_not_lengthen():
    length = DraftLength(8, length=4)
    length.judge(2, 2, 3)
    assert length.at(3) == 4


def test_a_request_that_cannot_be_guessed_rests_longer_and_longer():
    length = DraftLength(1)
    now, rests = 0, []
    for _ in range(8):
        assert length.at(now) == 1
        length.judge(1, 0, now)
        begin = now
        while not length.at(now):
            now += 1
        rests.append(now - begin)
    assert rests[:3] == [FIRST_REST, 2 * FIRST_REST, 4 * FIRST_REST]
    assert rests[-1] == LONGEST_REST
    length.judge(1, 1, now)
    length.judge(1, 0, now + 2)
    assert not length.at(now + 1 + FIRST_REST)
    assert length.at(now + 2 + FIRST_REST)


# ------------------------------------------------------------------ pace


def drive(pace, num_seqs, times_ms, gain, steps):
    """Steps of an engine; returns how many of them guessed."""
    guessed, (plain_ms, drafted_ms) = 0, times_ms
    for _ in range(steps):
        if pace.begins(num_seqs):
            guessed += 1
            pace.observe(num_seqs, 2 * num_seqs, round(gain * num_seqs), drafted_ms)
        else:
            pace.observe(num_seqs, 0, num_seqs, plain_ms)
    return guessed


def test_without_measurements_every_step_guesses():
    pace = DraftPace()
    assert all(pace.begins(16) for _ in range(1000))


def test_guesses_where_it_gains_and_hardly_ever_where_it_costs():
    assert drive(DraftPace(), 1, (10.0, 11.0), 2, 1000) > 950
    slow = drive(DraftPace(), 16, (10.0, 22.0), 2, 4000)
    assert 4 <= slow < 40
    none = drive(DraftPace(), 16, (10.0, 10.0), 1, 4000)
    assert none < 40  # no gain is no reason to guess


def test_batch_sizes_are_decided_apart():
    pace = DraftPace()
    drive(pace, 1, (10.0, 11.0), 2, 200)
    drive(pace, 16, (10.0, 40.0), 2, 200)
    assert pace.is_on(1)
    assert not pace.is_on(16)
    assert pace.is_on(9) is pace.is_on(16)  # one class


def test_is_found_again_when_it_begins_to_pay_and_dropped_when_it_ceases():
    pace = DraftPace()
    drive(pace, 4, (10.0, 30.0), 2, 300)
    assert not pace.is_on(4)
    drive(pace, 4, (10.0, 10.0), 3, 4000)
    assert pace.is_on(4)
    drive(pace, 4, (10.0, 40.0), 2, 200)
    assert not pace.is_on(4)


def test_one_disturbed_step_changes_nothing():
    pace = DraftPace()
    drive(pace, 1, (10.0, 11.0), 2, 200)
    pace.observe(1, 2, 2, 10_000.0)
    assert pace.is_on(1)


def test_the_margin_is_asked_for():
    pace = DraftPace()
    for _ in range(50):
        pace.observe(1, 0, 100, 10.0)
        pace.observe(1, 2, 100, 10.0 / (MARGIN - 0.01))
    assert not pace.is_on(1)
    for _ in range(200):
        pace.observe(1, 2, 100, 10.0 / (MARGIN + 0.01))
    assert pace.is_on(1)


# ------------------------------------------------------------------ a step


class Counting:
    """Guesses the numbers that follow the last token."""

    def propose(self, tokens, most):
        return tuple(range(tokens[-1] + 1, tokens[-1] + 1 + most))


PARAMS = SamplingParams(max_tokens=100)


def decoding(holdings, name, length, params=PARAMS):
    submit = Submit(SequenceKey(name, 0), Source.LOCAL, tuple(range(length)), (), b"root", params)
    sequence = new_sequence(submit, 1)
    sequence.tokens.append(length)
    sequence.num_computed = length
    holdings.extend(sequence, length + 1)
    sequence.drafting = Drafting(Counting(), DraftLength(8, length=4))
    return sequence


@pytest.fixture
def holdings():
    pool = BlockPool(4, 16)
    return KvCacheManager(pool, PrefixCache(pool), b"key")


def speculation(most=4):
    return Speculation(lambda key, params: Counting(), most)


def drafts_of(speculation, *arguments):
    assert speculation.begin(*arguments) is None  # no draft model
    return speculation.drafts(*arguments)


def test_drafts_come_with_the_blocks_for_their_kv(holdings):
    one = decoding(holdings, "a", 13)  # 14 tokens in a block of 16
    found = drafts_of(speculation(8), [one], 64, holdings, 0)
    assert found == {one.key: (14, 15, 16, 17)}
    assert len(one.blocks) == 2
    holdings.trim(one, 14)
    assert len(one.blocks) == 1


def test_drafts_take_no_block_that_is_promised_or_missing(holdings):
    one = decoding(holdings, "a", 13)
    assert drafts_of(speculation(8), [one], 64, holdings, 3) == {one.key: (14, 15)}
    others = holdings.pool.take(3)
    assert drafts_of(speculation(8), [one], 64, holdings, 0) == {one.key: (14, 15)}
    assert len(one.blocks) == 1
    holdings.pool.give_back(others)


def test_drafts_take_the_rows_that_are_left_in_order(holdings):
    one, two = decoding(holdings, "a", 3), decoding(holdings, "b", 5)
    assert drafts_of(speculation(8), [one, two], 6, holdings, 0) == {one.key: (4, 5, 6, 7), two.key: (6, 7)}
    assert drafts_of(speculation(8), [one, two], 0, holdings, 0) == {}


def test_the_last_token_is_never_guessed(holdings):
    for left, expected in ((1, ()), (2, (4,)), (3, (4, 5))):
        one = decoding(holdings, "a", 3, SamplingParams(max_tokens=1 + left))
        assert drafts_of(speculation(8), [one], 64, holdings, 0).get(one.key, ()) == expected
        holdings.release(one)


def test_the_first_guess_of_a_sequence_is_one_token(holdings):
    one = decoding(holdings, "a", 3)
    one.drafting = None
    assert drafts_of(speculation(8), [one], 64, holdings, 0) == {one.key: (4,)}


def test_steps_with_prompts_are_not_measured(holdings):
    one = decoding(holdings, "a", 3)
    table = ((BlockId(0),), (0,))
    decode = SequenceStep(one.key, 3, (3,), *table, True, PARAMS, 1)
    chunk = SequenceStep(SequenceKey("p", 0), 0, (1, 2, 3), *table, False, PARAMS, 0)
    measured = speculation()
    for number in range(100):
        plan = StepPlan(number, (decode._replace(draft_ids=(4, 5)), chunk))
        measured.observe(plan, StepResult(number, ((4,), ())), 1000.0)
    assert drafts_of(measured, [one], 64, holdings, 0)
    for number in range(8):
        drafts = drafts_of(measured, [one], 64, holdings, 0).get(one.key, ())
        plan = StepPlan(number, (decode._replace(draft_ids=drafts),))
        measured.observe(plan, StepResult(number, ((9,),)), 1000.0 if drafts else 1.0)
    assert not drafts_of(measured, [one], 64, holdings, 0)
