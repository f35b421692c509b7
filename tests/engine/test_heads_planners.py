"""The decisions around heads: which rows they compute, for whom they guess, and what becomes of their blocks."""

import pytest

from twostroke.core.request import SamplingParams, SequenceKey
from twostroke.engine.link.messages import Source, Submit
from twostroke.engine.plan import History, SequenceStep
from twostroke.engine.sequence import SequenceState, new_sequence
from twostroke.engine.speculation.draft_model.holdings import DraftHoldings
from twostroke.engine.speculation.draft_model.plan import DraftResult, all_failed
from twostroke.engine.speculation.drafting import Drafting
from twostroke.engine.speculation.heads.layer_planner import LayerPlanner
from twostroke.engine.speculation.heads.planner import HeadsPlanner
from twostroke.engine.speculation.length import DraftLength

PARAMS = SamplingParams(max_tokens=60, temperature=0.7, seed=3, logprobs=2, repetition_penalty=1.2)


def sequence_of(planner, tokens, *, num_prompt=2, source=Source.LOCAL, name="a"):
    """A decoding sequence whose guesses `planner` plans."""
    submit = Submit(SequenceKey(name, 0), source, tuple(tokens[:num_prompt]), (), b"root", PARAMS, num_emitted=0)
    sequence = new_sequence(submit, 0)
    sequence.tokens += tokens[num_prompt:]
    sequence.state = SequenceState.DECODING
    sequence.drafting = Drafting(planner.start(PARAMS), DraftLength(4))
    return sequence


# ------------------------------------------------------------------ without keys and values


def test_heads_guess_after_the_last_token_as_many_as_they_are():
    planner = HeadsPlanner(3)
    one, two = (sequence_of(planner, [4, 5, 6, 7], name=name) for name in "ab")
    plan = planner.plan([(one, 2), (two, 5)])
    assert plan.lengths == (2, 3)
    assert plan.catch_up.sequences == ()
    step = plan.guesses.sequences[0]
    assert (step.start, step.token_ids, step.end, step.num_generated) == (3, (7,), 4, 2)
    assert step.history == History((4, 5), (6, 7))
    assert (step.params.logprobs, step.params.seed) == (None, 3)
    planner.take({one.key: one, two.key: two}, plan, DraftResult(((8, 9), ())))
    assert one.drafting.proposer.propose(one.tokens, 1) == (8,)
    assert one.drafting.proposer.propose([*one.tokens, 8], 2) == ()
    assert two.drafting.proposer.propose(two.tokens, 2) == ()


def test_heads_that_failed_for_a_sequence_are_not_asked_for_it_again():
    planner = HeadsPlanner(3)
    sequence = sequence_of(planner, [4, 5, 6])
    plan = planner.plan([(sequence, 2)])
    planner.take({sequence.key: sequence}, plan, DraftResult(((8, 9),), frozenset({sequence.key})))
    assert sequence.drafting.proposer.propose(sequence.tokens, 2) == ()
    assert planner.plan([(sequence, 2)]) is None


# ------------------------------------------------------------------ with keys and values


def layer(num_blocks=4, max_rows=100):
    return LayerPlanner(max_rows, DraftHoldings(num_blocks, 16, finds_prefixes=False))


def step_of(sequence, start, end):
    """A step of the model that computed the positions [start, end)."""
    ids = tuple(sequence.tokens[start:end])
    return SequenceStep(sequence.key, start, ids, (), (), samples=True, params=PARAMS, num_generated=0)


def ran(planner, sequence, start, end):
    """The model computed positions [start, end) of a sequence."""
    sequence.num_computed = end
    planner.computed(sequence, step_of(sequence, start, end))


def took(planner, sequence, plan, *guesses):
    planner.take({sequence.key: sequence}, plan, DraftResult(guesses))
    planner.holdings.check_integrity([sequence])


def test_a_layer_follows_the_models_steps_from_the_first_one_here_and_guesses_after_the_last_row():
    planner = layer()
    sequence = sequence_of(planner, list(range(100, 160)), num_prompt=60)
    ran(planner, sequence, 32, 48)  # the prefix was cached
    plan = planner.plan([])
    (step,) = plan.catch_up.sequences
    assert (step.start, step.end, step.token_ids, step.samples) == (0, 16, tuple(range(133, 149)), False)
    assert (len(step.block_table), plan.ahead, plan.guesses.sequences) == (1, (32,), ())
    took(planner, sequence, plan)
    sequence.tokens.append(7)
    ran(planner, sequence, 48, 60)
    plan = planner.plan([(sequence, 3)])
    (step,) = plan.guesses.sequences
    assert (step.start, step.end, step.token_ids) == (16, 28, (*range(149, 160), 7))
    assert (step.samples, step.num_generated, step.history.output_ids) == (True, 1, (7,))
    assert (plan.lengths, plan.ahead, plan.catch_up.sequences) == ((3,), (32,), ())
    took(planner, sequence, plan, (8, 9, 10))
    assert sequence.drafting.proposer.propose(sequence.tokens, 9) == (8, 9, 10)
    assert planner.plan([(sequence, 3)]) is None  # no step since


def test_rows_of_guesses_have_blocks_and_the_last_guess_has_no_row():
    planner = layer()
    sequence = sequence_of(planner, list(range(16)))
    ran(planner, sequence, 0, 15)
    plan = planner.plan([(sequence, 2)])
    assert len(plan.guesses.sequences[0].block_table) == 1  # 15 rows and one
    took(planner, sequence, plan, (8, 9))
    sequence.tokens += [8]
    ran(planner, sequence, 15, 16)
    plan = planner.plan([(sequence, 2)])
    assert len(plan.guesses.sequences[0].block_table) == 2  # 16 rows and one


def test_a_gap_begins_anew_and_gives_the_blocks_back():
    planner = layer()
    sequence = sequence_of(planner, list(range(40)))
    ran(planner, sequence, 0, 32)
    took(planner, sequence, planner.plan([]))
    assert planner.holdings.pool.num_live == 2
    ran(planner, sequence, 36, 39)
    plan = planner.plan([(sequence, 1)])
    assert (plan.ahead, plan.guesses.sequences[0].start, planner.holdings.pool.num_live) == ((36,), 0, 1)


@pytest.mark.parametrize("state", [SequenceState.WAITING, SequenceState.ENDED, SequenceState.SWAPPED])
def test_a_sequence_that_stopped_running_gets_no_blocks(state):
    planner = layer()
    sequence = sequence_of(planner, list(range(40)))
    ran(planner, sequence, 0, 39)
    sequence.state = state
    assert planner.plan([]) is None
    assert planner.holdings.pool.num_live == 0


def test_a_prompt_for_a_peer_is_left_alone():
    planner = layer()
    sequence = sequence_of(planner, list(range(40)), source=Source.FOR_PEER)
    ran(planner, sequence, 0, 32)
    assert planner.plan([]) is None


def test_the_row_whose_next_token_is_not_known_waits():
    planner = layer()
    sequence = sequence_of(planner, list(range(40)), num_prompt=40)
    ran(planner, sequence, 0, 40)  # computed to its end, and not sampled
    assert planner.plan([(sequence, 1)]).guesses.sequences[0].end == 39


@pytest.mark.parametrize(("num_blocks", "max_rows"), [(1, 100), (4, 20)])
def test_without_room_there_is_no_guess_and_no_block_is_kept(num_blocks, max_rows):
    planner = layer(num_blocks, max_rows)
    sequence = sequence_of(planner, list(range(40)))
    ran(planner, sequence, 0, 16)
    took(planner, sequence, planner.plan([]))
    ran(planner, sequence, 16, 39)
    assert planner.plan([(sequence, 2)]) is None
    assert planner.holdings.pool.num_live == 0
    sequence.tokens += [7]
    ran(planner, sequence, 39, 40)  # and it begins anew
    assert planner.plan([(sequence, 2)]).ahead == (39,)


def test_at_the_end_of_its_rows_the_last_guess_needs_none():
    planner = layer(max_rows=16)
    sequence = sequence_of(planner, list(range(17)))
    ran(planner, sequence, 0, 16)
    assert planner.plan([(sequence, 4)]).lengths == (1,)


def test_a_failure_gives_the_blocks_back_for_good():
    planner = layer()
    sequence = sequence_of(planner, list(range(20)))
    ran(planner, sequence, 0, 19)
    plan = planner.plan([(sequence, 2)])
    planner.take({sequence.key: sequence}, plan, all_failed(plan))
    assert planner.holdings.pool.num_live == 0
    ran(planner, sequence, 0, 19)
    assert planner.plan([(sequence, 2)]) is None
    planner.holdings.check_integrity([sequence])
