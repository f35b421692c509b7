"""Snapshots of recurrent states: where they are kept, what a prompt finds, and that no token depends on them."""

from dataclasses import replace

import pytest
from support.engines.sampling_room import Room, ids_of, submit
from support.fakes.cell_store import FakeStore

from twostroke.core.errors import InternalError
from twostroke.core.request import SamplingParams, SequenceKey
from twostroke.engine.core import CoreLimits
from twostroke.engine.link.messages import CancelSequence, Source
from twostroke.engine.plan import StateMove, StepResult
from twostroke.engine.sequence import Sequence, new_sequence
from twostroke.engine.states import STATES_PER_SEAT, StateHoldings
from twostroke.kv.block import BlockIdentity
from twostroke.kv.cache.pool import OutOfBlocks
from twostroke.kv.cache.states import StatePool

SHORT = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
LONG = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
SEATS = 8


def names(*values: int) -> list[BlockIdentity]:
    return [BlockIdentity(bytes([value]) * 16) for value in values]


# ------------------------------------------------------------------ the pool


def test_a_match_ends_at_the_furthest_snapshot_within_the_held_blocks():
    pool, chain = StatePool(4, 16), names(1, 2, 3, 4, 5)
    places = [pool.take() for _ in range(3)]
    for place, end in zip(places, (1, 3, 5), strict=True):
        pool.publish(place, chain[end - 1], is_passing=False)
    assert [pool.furthest(chain, held) for held in range(6)] == [
        (0, 0), (1, places[0]), (1, places[0]), (3, places[1]), (3, places[1]), (5, places[2]),
    ]  # fmt: skip


def test_snapshots_are_looked_for_at_the_ends_of_physical_blocks():
    pool, chain = StatePool(4, 32), names(1, 2, 3, 4)
    place = pool.take()
    pool.publish(place, chain[0], is_passing=False)  # the middle of a block: a sequence could not go on there
    assert pool.furthest(chain, 4) == (0, 0)


def test_the_least_recently_used_snapshot_makes_room_and_an_owned_one_never_does():
    pool, chain = StatePool(3, 16), names(1, 2, 3)
    places = [pool.take() for _ in range(3)]
    for place, identity in zip(places, chain, strict=True):
        pool.publish(place, identity, is_passing=False)
    with pytest.raises(OutOfBlocks):
        pool.take()
    for place in places:
        pool.give_back(place)
    pool.retain(places[0])
    pool.give_back(places[0])  # used again: the youngest now
    assert [pool.take(), pool.take()] == [places[1], places[2]]
    assert pool.furthest(chain, 3) == (1, places[0])
    pool.check_integrity([places[1], places[2]])


def test_a_passing_snapshot_goes_when_its_sequence_has_a_later_one_unless_another_sequence_used_it():
    pool, chain = StatePool(4, 16), names(1, 2)
    first, second = pool.take(), pool.take()
    for place, identity in zip((first, second), chain, strict=True):
        pool.publish(place, identity, is_passing=True)
        pool.give_back(place)
    pool.retain(second)
    pool.give_back(second)
    for place, identity in zip((first, second), chain, strict=True):
        pool.pass_on(place, identity)
    assert pool.furthest(chain, 2) == (2, second)
    assert pool.furthest(chain, 1) == (0, 0)
    pool.check_integrity([])


def test_one_identity_has_one_snapshot():
    pool, chain = StatePool(4, 16), names(1)
    first, second = pool.take(), pool.take()
    pool.publish(first, chain[0], is_passing=True)
    pool.publish(second, chain[0], is_passing=False)
    assert pool.furthest(chain, 1) == (1, first)
    pool.pass_on(first, chain[0])  # somebody wants it to stay
    assert pool.furthest(chain, 1) == (1, first)
    pool.give_back(second)
    pool.check_integrity([first])


# ------------------------------------------------------------------ what prompts find


def room(*, snapshots: int = 32, num_blocks: int = 4096, **more) -> Room:
    """A core that counts states, over cells that know their prefix."""
    bounds = CoreLimits(num_states=STATES_PER_SEAT * SEATS + snapshots, num_seats=SEATS)
    return Room(FakeStore(16), bounds=bounds, num_blocks=num_blocks, **{"max_num_seqs": SEATS, **more})


def found(at: Room) -> int:
    return sum(at.promised.values())


SYSTEM = ids_of(500, seed=1)
PROMPTS = [SYSTEM + ids_of(30 + 7 * i, seed=100 + i) for i in range(40)]


def test_prompts_that_share_a_system_prompt_find_nearly_what_full_attention_finds():
    ours, theirs = room(), Room(FakeStore(16), num_blocks=4096, max_num_seqs=SEATS)
    for i, prompt in enumerate(PROMPTS):
        for at in (ours, theirs):
            at.run(submit(f"r{i}", prompt, SHORT))
    assert found(theirs) == 39 * (500 // 16 * 16)
    assert found(ours) >= 0.95 * found(theirs)
    assert [ours.promised[f"r{i}"] for i in range(3)] == [0, 0, 496]  # the second one leaves a snapshot where it parts


def test_prompts_that_come_together_find_all_that_full_attention_finds():
    ours, theirs = room(), Room(FakeStore(16), num_blocks=4096, max_num_seqs=SEATS)
    for at in (ours, theirs):
        at.run(*(submit(f"r{i}", prompt, SHORT) for i, prompt in enumerate(PROMPTS)))
    assert found(ours) == found(theirs) == 39 * 496


def test_the_same_prompt_and_the_next_turn_begin_at_the_last_block_before_their_own_tokens():
    at = room()
    at.run(submit("a", PROMPTS[0], LONG), submit("unlike", ids_of(90, seed=7), SHORT))
    at.run(submit("again", PROMPTS[0], SHORT))
    assert at.promised["again"] == (len(PROMPTS[0]) - 1) // 16 * 16
    turn = (*PROMPTS[0], *at.tokens["a"], *ids_of(20, seed=3))
    at.run(submit("next", turn, SHORT))
    assert at.promised["next"] == (len(PROMPTS[0]) + 59) // 16 * 16  # the last answer token was never computed


def test_a_prompt_of_whole_blocks_leaves_its_last_token_to_be_computed():
    at = room()
    at.run(submit("a", SYSTEM[:64], SHORT))
    at.run(submit("b", SYSTEM[:64], SHORT))
    assert at.promised["b"] == 48


def test_one_prompt_of_many_steps_keeps_one_snapshot_on_its_way():
    at = room(max_batch_tokens=64)
    at.run(submit("a", SYSTEM, SamplingParams(max_tokens=1, temperature=0.0)))
    assert dict(at.core.load(0.0).counters)["state_snapshots"] == 2  # its last whole block, and the last step before


@pytest.mark.campaign
def test_few_snapshots_cost_hits_and_never_a_token():
    ours, plain = room(snapshots=0), Room(FakeStore(16), num_blocks=4096, max_num_seqs=SEATS)
    for at in (ours, plain):
        for i in range(12):
            at.run(*(submit(f"r{i}.{j}", PROMPTS[i + j], LONG) for j in range(6)))
    assert ours.tokens == plain.tokens
    counters = dict(ours.core.load(0.0).counters)
    assert (counters["states"], counters["states_in_use"]) == (STATES_PER_SEAT * SEATS, 0)


def test_a_snapshot_never_takes_the_state_that_another_sequence_of_the_step_needs():
    pool = StatePool(STATES_PER_SEAT * 2, 16)
    states = StateHoldings(pool, 16, num_seats=2)
    works = [new_sequence(submit(f"r{i}", ids_of(120, seed=i), SHORT), i) for i in range(2)]
    for work in works:
        work.state_place, work.num_computed, work.wanted_states = pool.take(), 96, {112}
    assert [states.move(work, 120).marks for work in works] == [(), ()]
    states.check_integrity(works)


def step(states: StateHoldings, work: Sequence, end: int) -> None:
    """The next step of a sequence computes up to `end`, and publishes its whole blocks."""
    start = work.num_computed
    states.move(work, end)
    work.num_computed, work.num_published = end, end // 16
    states.moved(work, start)


def test_a_step_writes_its_snapshots_in_the_order_of_its_tokens():
    states = StateHoldings(StatePool(8, 16), 16, num_seats=1)
    work = new_sequence(submit("a", ids_of(120), SHORT), 0)
    for wanted in (48, 16, 80, 32):
        states.want(work, wanted)
    assert [rows for rows, _ in states.move(work, 64).marks] == [16, 32, 48]


def test_a_sequence_that_gave_all_back_wants_and_gives_up_nothing_of_its_earlier_run():
    pool = StatePool(16, 16)
    states = StateHoldings(pool, 16, num_seats=1)
    work = new_sequence(submit("a", ids_of(120), SHORT), 0)
    states.attach(work, 0)
    states.want(work, 48)
    step(states, work, 16)
    states.release(work)
    work.num_computed = work.num_published = 0
    passed = pool.furthest(work.identities, 1)
    assert passed[0] == 1
    states.attach(work, 0)
    assert [rows for rows, _ in states.move(work, 120).marks] == [112]
    states.stay(work)
    step(states, work, 32)
    assert pool.furthest(work.identities, 1) == passed, "snapshots stay findable"
    assert pool.furthest(work.identities, 2)[0] == 2
    states.check_integrity([work])


def test_a_step_whose_mask_is_late_is_computed_again_from_the_state_that_it_read():
    at = room()
    at.send(submit("a", SYSTEM[:40], SHORT))
    at.hear(at.core.tick(0.0))
    plan = at.core.plan(0.0)
    at.runner.run(plan)
    at.hear(at.core.apply(plan, StepResult(plan.step, ((),), deferred=frozenset({SequenceKey("a", 0)})), 0.0))
    at.run()
    assert at.tokens["a"] == room().run(submit("a", SYSTEM[:40], SHORT)).tokens["a"]


def test_preempted_sequences_go_on_from_a_snapshot():
    at = room(num_blocks=24)
    prompts = {f"r{i}": ids_of(100, seed=i) for i in range(4)}
    at.run(*(submit(name, prompt, LONG) for name, prompt in prompts.items()))
    assert dict(at.core.load(0.0).counters)["preemptions"] > 0
    alone = room()
    for name, prompt in prompts.items():
        alone.run(submit(name, prompt, LONG))
    assert at.tokens == alone.tokens


def test_a_cancel_gives_all_states_back():
    at = room()
    at.send(submit("a", PROMPTS[0], LONG), submit("b", PROMPTS[1], LONG))
    for _ in range(4):
        at.step()
    assert dict(at.core.load(0.0).counters)["states_in_use"] == 2
    at.send(CancelSequence(SequenceKey("a", 0)), CancelSequence(SequenceKey("b", 0)))
    assert dict(at.core.load(0.0).counters)["states_in_use"] == 0
    at.core.check_integrity()


@pytest.mark.parametrize("source", [Source.PEER, Source.FOR_PEER])
def test_a_hand_over_is_refused_by_name(source):
    at = room()
    at.send(submit("a", PROMPTS[0], SHORT, source=source))
    assert "not handed over" in at.ended["a"].error_message


# ------------------------------------------------------------------ the real numbers


SAMPLED = SamplingParams(max_tokens=24, temperature=0.8, seed=3, ignore_eos=True, logprobs=3)


@pytest.mark.parametrize("name", ["qwen3.5", "qwen3-next"])
@pytest.mark.parametrize("kernels", ["torch", "native"])
def test_a_cached_run_is_an_uncached_run_bit_for_bit(name, kernels, family_directory, make_runner):
    """In batches, in chunks, after a preemption, from snapshots and without them: the same tokens and logprobs."""

    def real(*, caches: bool, num_blocks: int, **limits) -> Room:
        bounds = CoreLimits(num_states=STATES_PER_SEAT * SEATS + 16, num_seats=SEATS)
        runner = make_runner(
            family_directory(name), num_blocks=num_blocks, num_states=bounds.num_states, kernels=kernels, kv_dtype="fp8"
        )
        return Room(runner, bounds=bounds, caches=caches, num_blocks=num_blocks, **{"max_num_seqs": SEATS, **limits})

    prompts = {f"r{i}": SYSTEM[:70] + ids_of(10 + 13 * i, seed=i) for i in range(5)}
    prompts["again"] = prompts["r0"]
    plain = real(caches=False, num_blocks=256)
    for key, prompt in prompts.items():
        plain.run(submit(key, prompt, SAMPLED))
    cached = real(caches=True, num_blocks=256, max_batch_tokens=48)
    cached.run(*(submit(key, prompt, SAMPLED) for key, prompt in prompts.items()))
    assert found(cached) >= 5 * 64
    short = real(caches=True, num_blocks=22, max_batch_tokens=32)
    short.run(*(submit(key, prompt, SAMPLED) for key, prompt in prompts.items()))
    assert dict(short.core.load(0.0).counters)["preemptions"] > 0
    for other in (cached, short):
        assert other.tokens == plain.tokens
        assert other.logprobs == plain.logprobs


def test_n_choices_share_the_prompt_and_differ_in_what_they_say(family_directory, make_runner):
    bounds = CoreLimits(num_states=STATES_PER_SEAT * SEATS + 16, num_seats=SEATS)
    runner = make_runner(family_directory("qwen3.5"), num_blocks=128, num_states=bounds.num_states)
    at = Room(runner, bounds=bounds, num_blocks=128, max_num_seqs=SEATS)
    prompt = ids_of(77, seed=5)
    choices = [submit(f"c{i}", prompt, SAMPLED) for i in range(3)]
    at.run(*(replace(one, key=SequenceKey(one.key.request_id, i)) for i, one in enumerate(choices)))
    assert sorted(at.promised.values()) == [0, 64, 64]
    assert len({tuple(tokens) for tokens in at.tokens.values()}) == 3


def test_a_step_that_would_read_a_wrong_state_fails(family_directory, make_runner):
    bounds = CoreLimits(num_states=8, num_seats=2)
    runner = make_runner(family_directory("qwen3.5"), num_blocks=64, num_states=8)
    at = Room(runner, bounds=bounds, num_blocks=64, max_num_seqs=2)
    at.send(submit("a", ids_of(20), SHORT))
    at.step()
    at.hear(at.core.tick(0.0))
    plan = at.core.plan(0.0)
    with pytest.raises(InternalError, match="covers 0 tokens, and a step begins at 20"):
        runner.run(replace(plan, states=(StateMove(0, plan.states[0].target),)))
