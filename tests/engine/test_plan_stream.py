"""Step plans as differences: equal plans at the other end, and an error wherever they could not be equal."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.engines.plans import PARAMS, WITH_PAST, Life

from twostroke.core.request import SamplingParams, SequenceKey
from twostroke.engine.link.plan_stream import MAX_ABSENT_STEPS, PlanGap, PlanReceiver, PlanSender
from twostroke.engine.link.steady import STEADY
from twostroke.engine.link.wire import WireError, decode, encode
from twostroke.engine.plan import History, SequenceStep, StepPlan


def decode_step(
    name: str, length: int, num_generated: int = 5, params: SamplingParams = PARAMS, block_tokens: int = 16
) -> SequenceStep:
    """A decode over `length` known tokens; everything of it follows from these numbers."""
    table = tuple(1000 + n for n in range(length // block_tokens + 1))
    history = None
    if params.needs_history:
        tokens = tuple(range(length + 1))
        history = History(tokens[: length + 1 - num_generated], tokens[length + 1 - num_generated :])
    return SequenceStep(
        *(SequenceKey(name, 0), length, (length,), table, (2,) * len(table), True, params, num_generated),
        history=history,
    )


def test_a_sequence_is_whole_once_then_only_its_token_and_its_new_blocks():
    sender, receiver = PlanSender(), PlanReceiver()
    sizes = []
    for step in range(40):
        plan = StepPlan(step, tuple(decode_step(f"r{n}", 4000 + step, 1 + step) for n in range(8)))
        data = sender.encode(plan)
        sizes.append(len(data))
        assert receiver.decode(data) == plan
    assert sizes[0] > 8 * 2000
    assert max(sizes[1:]) < 8 * 40, "blocks were added, no table was sent"


def test_the_past_that_penalties_look_at_travels_once():
    sender, receiver = PlanSender(), PlanReceiver()
    sizes = []
    for step in range(20):
        plan = StepPlan(step, (decode_step("r", 3000 + step, 1 + step, WITH_PAST),))
        data = sender.encode(plan)
        sizes.append(len(data))
        assert receiver.decode(data) == plan
    assert max(sizes[1:]) < 100


def test_a_sequence_that_pauses_is_known_for_a_while_and_whole_again_afterwards():
    for absent, is_whole in ((MAX_ABSENT_STEPS - 1, False), (MAX_ABSENT_STEPS + 1, True)):
        sender, receiver = PlanSender(), PlanReceiver()
        data = b""
        lengths = [100, *[None] * absent, 101]
        for step, length in enumerate(lengths):
            paused = () if length is None else (decode_step("paused", length, length),)
            plan = StepPlan(step, (decode_step("other", 500 + step, 1 + step), *paused))
            data = sender.encode(plan)
            assert receiver.decode(data) == plan
        assert (b"paused" in data) == is_whole
        assert b"other" not in data


def test_slots_of_sequences_that_are_gone_are_used_again():
    sender = PlanSender()
    for step in range(300):
        rows = decode(sender.encode(StepPlan(step, (decode_step(f"r{step}", 20),))))[3]
        assert max(rows) <= MAX_ABSENT_STEPS + 1


def test_a_receiver_that_missed_a_message_says_so_until_the_sender_resets():
    sender, receiver, late = PlanSender(), PlanReceiver(), PlanReceiver()
    plans = [StepPlan(step, (decode_step("r", 100 + step, 1 + step),)) for step in range(6)]
    first, missed, gap, after = (sender.encode(plan) for plan in plans[:4])
    assert receiver.decode(first) == plans[0]
    with pytest.raises(PlanGap, match="reset"):
        receiver.decode(gap)
    with pytest.raises(PlanGap, match="none"):
        late.decode(after)
    sender.reset()
    again = sender.encode(plans[4])
    for each in (receiver, late):
        assert each.decode(again) == plans[4]
    following = sender.encode(plans[5])
    assert receiver.decode(following) == late.decode(following) == plans[5]
    with pytest.raises(PlanGap):
        receiver.decode(missed)


@given(st.binary(max_size=60))
def test_bytes_that_are_no_plan_are_refused(data: bytes):
    with pytest.raises(WireError):
        PlanReceiver().decode(data)


@pytest.mark.parametrize(
    "message",
    [
        (1, True, 1, (0,), (), (), (), (), ()),  # a slot that nothing filled
        (1, True, 1, (0,), (), (), (), (0, "no step"), ()),
        (1, True, 1, (), (), (), (), (), (7,)),
        (1, True, 1, (), (), (0, 9, 1), (), (), ()),
        (1, True, 1, 5, (), (), (), (), ()),
        (1, True, 1),
        ("one", False, 1, (), (), (), (), (), ()),
        (1, True, 1, (0,), (1,), (), (0, {"no_field": 1}), (), ()),
    ],
)
def test_a_message_that_does_not_fit_is_refused(message: object):
    with pytest.raises(WireError):
        PlanReceiver().decode(encode(message))


def test_a_message_with_an_unknown_field_is_refused():
    sender, receiver = PlanSender(), PlanReceiver()
    receiver.decode(sender.encode(StepPlan(1, (decode_step("r", 10),))))
    with pytest.raises(WireError, match="does not fit"):
        receiver.decode(encode((2, False, 2, (0,), (11,), (), (0, {"no_field": 1}), (), ())))


@pytest.mark.parametrize("seed", range(60))
def test_any_plans_arrive_as_they_were_sent_at_any_number_of_ranks(seed: int):
    draw = random.Random(seed)
    sender, ranks, late = PlanSender(), [PlanReceiver(), PlanReceiver()], PlanReceiver()
    lives: list[Life] = []
    is_late = True
    for step in range(MAX_ABSENT_STEPS * 2):
        lives += [Life(f"r{step}.{n}", draw) for n in range(draw.choice([0, 0, 1, 2]))]
        lives = [life for life in lives if draw.random() > 0.05]
        chosen = [life for life in lives if draw.random() < 0.8]
        draw.shuffle(chosen)
        plan = StepPlan(step, tuple(life.step() for life in chosen))
        if draw.random() < 0.05:
            sender.reset()
            is_late = False
        data = sender.encode(plan)
        assert [rank.decode(data) for rank in ranks] == [plan, plan]
        if not is_late:
            assert late.decode(data) == plan


def steady(step: int, num_sequences: int = 20) -> StepPlan:
    """Decodes whose tables grow at different steps."""
    return StepPlan(step, tuple(decode_step(f"r{n}", 100 + n + step, 1 + step) for n in range(num_sequences)))


def test_a_plan_of_decodes_alone_costs_a_word_per_sequence():
    sender, receiver = PlanSender(), PlanReceiver()
    tables: list[dict] = []
    for step in range(100):
        plan = steady(step)
        if step:  # objects that did not change are the same ones, as a scheduler has them
            again = [
                each._replace(block_table=old.block_table, generations=old.generations)
                if each.block_table == old.block_table
                else each
                for each, old in zip(plan.sequences, tables[-1].sequences, strict=True)
            ]
            plan = StepPlan(step, tuple(again))
        tables.append(plan)
        data = sender.encode(plan)
        assert receiver.decode(data) == plan
        assert step == 0 or data.startswith(STEADY)
        assert step == 0 or len(data) <= 40 + 4 * 20 + 2 * 32


@pytest.mark.parametrize(
    "change", ["absent", "order", "key", "start", "table", "generation", "params", "number", "large"]
)
def test_a_plan_that_only_looks_like_decodes_alone_arrives_too(change: str):
    sender, receiver = PlanSender(), PlanReceiver()
    for step in range(3):
        assert receiver.decode(sender.encode(steady(step))) == steady(step)
    rows = list(steady(3).sequences)
    first = rows[0]
    other = {
        "absent": [],
        "order": [rows[1], first],
        "key": [first._replace(key=SequenceKey("another", 0)), rows[1]],
        "start": [first._replace(start=first.start + 1), rows[1]],
        "table": [first._replace(block_table=(7, *first.block_table[1:])), rows[1]],
        "generation": [first._replace(generations=(7, *first.generations[1:])), rows[1]],
        "params": [first._replace(params=WITH_PAST), rows[1]],
        "number": [first._replace(num_generated=9), rows[1]],
        "large": [first._replace(token_ids=(1 << 40,)), rows[1]],
    }
    plan = StepPlan(3, tuple(other[change] + rows[2:]))
    data = sender.encode(plan)
    assert not data.startswith(STEADY)
    assert receiver.decode(data) == plan
    following = StepPlan(4, tuple(steady(4).sequences))
    assert receiver.decode(sender.encode(following)) == following


@pytest.mark.parametrize("bad", ["cut", "long", "count", "growth", "row", "repeated", "fewer"])
def test_a_damaged_plan_of_decodes_alone_is_refused(bad: str):
    sender, receiver = PlanSender(), PlanReceiver()
    for step in range(12):
        data = sender.encode(steady(step))
        assert receiver.decode(data) == steady(step)
    data = sender.encode(steady(12))
    grown = 1 + 8 + 8 + 4
    assert data.startswith(STEADY)
    assert data[-32:-24] != bytes(8)  # it ends with a growth of one block
    changed = {
        "cut": data[:-1],
        "long": data + b"\0",
        "count": data[: grown - 4] + bytes([1]) + data[grown - 3 :],
        "growth": data[:-24] + bytes([9]) + data[-23:],
        "row": data[:-32] + bytes([200]) + data[-31:],
        "repeated": data,
        "fewer": b"",
    }
    if bad == "fewer":  # a message for a receiver of other sequences
        other = PlanSender()
        changed["fewer"] = [other.encode(steady(step, 19)) for step in range(13)][-1]
    if bad == "repeated":
        receiver.decode(data)
    with pytest.raises(WireError):
        receiver.decode(changed[bad])
    sender.reset()
    assert receiver.decode(sender.encode(steady(13))) == steady(13)
