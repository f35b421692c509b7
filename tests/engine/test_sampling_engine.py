"""Sampling through the real core and runner: logprobs against torch, and nothing hangs on what befalls a request."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.engines.sampling_room import Room, ids_of, submit

from twostroke.core.clock import MonotonicClock
from twostroke.core.request import FinishReason, SamplingParams, SequenceKey
from twostroke.decode_worker.policy import combined_policy, decode_policy
from twostroke.engine.link.messages import (
    Bind,
    KvComplete,
    PeerBound,
    PrefillLocally,
    Source,
)
from twostroke.engine.loop import Engine
from twostroke.engine.plan import History, SampledPlace, SequenceStep
from twostroke.engine.sequence import new_sequence
from twostroke.model.sampling import step as sampling_step
from twostroke.model.sampling.masks import NO_MASKS
from twostroke.prefill_worker.policy import prefill_policy

BASE = SamplingParams(max_tokens=14, temperature=0.0, ignore_eos=True)
SCORED = replace(BASE, logprobs=4, prompt_logprobs=3)
EVERYTHING = replace(
    *(BASE,),
    temperature=0.9,
    seed=11,
    top_p=0.95,
    repetition_penalty=1.3,
    frequency_penalty=0.5,
    presence_penalty=0.7,
    logit_bias=((40, 6.0), (41, -100.0)),
    bad_words=((40, 40), (77,)),
    min_tokens=3,
)


class EngineRoom(Room):
    """The same with an engine that takes the steps, without its thread."""

    def __init__(self, runner):
        super().__init__(runner)
        self.engine = Engine(self.core, runner, runner.store, self, MonotonicClock())

    def emit(self, events):
        self.hear(events)

    def step(self) -> bool:
        self.hear(self.core.tick(0.0))
        plan = self.core.plan(0.0)
        if plan is not None:
            self.engine._step(plan)
        self.core.check_integrity()
        return plan is not None


@pytest.fixture
def make_room(write_tiny, make_runner):
    def make(policy=combined_policy, **limits):
        return Room(make_runner(write_tiny({}), dtype="float32", kv_dtype="float32"), policy, **limits)

    return make


@pytest.fixture
def make_engine(write_tiny, make_runner):
    return lambda: EngineRoom(make_runner(write_tiny({}), dtype="float32", kv_dtype="float32"))


def test_logprobs_are_log_softmax_of_the_models_own_logits(write_tiny, make_room):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(write_tiny({}), dtype=torch.float32)
    prompt = ids_of(37)
    # Whatever the request does to the distribution, its logprobs are the model's.
    params = replace(EVERYTHING, logprobs=5, prompt_logprobs=2)
    room = make_room(max_batch_tokens=16).run(submit("a", prompt, params))
    ids = [*prompt, *room.tokens["a"]]
    with torch.no_grad():
        want = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1).numpy()
    told = [*room.prompt_logprobs["a"], *room.logprobs["a"]]
    assert len(told) == len(ids) - 1
    for row, token_id, one in zip(want[:-1], ids[1:], told, strict=True):
        num_top = 2 if len(one.top) == 2 else 5
        order = np.argsort(-row)
        assert one.token_id == token_id
        assert one.logprob == pytest.approx(row[token_id], abs=2e-4)
        assert abs(row[order[one.rank - 1]] - row[token_id]) < 2e-4
        assert [lp for _, lp in one.top] == pytest.approx(row[order[:num_top]].tolist(), abs=2e-4)
        assert [lp for _, lp in one.top] == sorted((lp for _, lp in one.top), reverse=True)


def told(room, name):
    return room.tokens[name], room.logprobs[name], room.prompt_logprobs.get(name)


@pytest.mark.parametrize("length", [1, 2, 16, 17, 33, 50])
def test_chunks_and_company_change_no_logprob(make_room, length):
    prompt = ids_of(length)
    whole = told(make_room().run(submit("a", prompt, SCORED)), "a")
    assert len(whole[2] or ()) == length - 1
    crowded = make_room(max_batch_tokens=16)
    others = [submit(f"o{n}", ids_of(30, n), EVERYTHING) for n in range(3)]
    crowded.run(others[0], submit("a", prompt, SCORED), *others[1:])
    assert told(crowded, "a") == whole


def test_a_scored_prompt_is_computed_even_where_it_is_cached_and_can_be_found_afterwards(make_room):
    prompt = ids_of(50)
    fresh = make_room().run(submit("a", prompt, SCORED))
    room = make_room().run(submit("plain", prompt, BASE)).run(submit("a", prompt, SCORED))
    assert told(room, "a") == told(fresh, "a")
    assert room.ended["a"].cached_tokens == 0
    assert fresh.run(submit("later", prompt, BASE)).ended["later"].cached_tokens == 48


def test_a_preempted_sequence_says_the_same_once(make_room):
    alone = [make_room().run(submit("x", ids_of(40, n), replace(SCORED, max_tokens=40))) for n in range(3)]
    room = make_room(num_blocks=9, max_batch_tokens=32)
    room.run(*(submit(f"x{n}", ids_of(40, n), replace(SCORED, max_tokens=40)) for n in range(3)))
    assert sum(ended.preemptions for ended in room.ended.values()) > 0
    for n, one in enumerate(alone):
        assert told(room, f"x{n}") == told(one, "x")


@pytest.mark.parametrize("is_cached", [True, False])
def test_a_prompt_preempted_within_keeps_the_scores_it_has(make_room, is_cached):
    prompt = ids_of(50)
    whole = make_room().run(submit("a", prompt, SCORED))
    room = make_room(max_batch_tokens=16)
    room.send(submit("a", prompt, SCORED))
    assert room.step()
    assert room.step()
    scheduler = room.core._scheduler
    (sequence,) = scheduler.by_key.values()
    assert len(sequence.scores) == 32
    scheduler.preempt(sequence)
    if not is_cached:
        sequence.identities = []  # as if its blocks had gone to others
    room.run()
    assert told(room, "a") == told(whole, "a")


@pytest.mark.parametrize("params", [BASE, EVERYTHING], ids=["greedy", "everything"])
def test_a_request_that_is_sent_again_goes_on_as_if_nothing_had_happened(make_room, params):
    """Emitted tokens stand in the prompt, and count as output for every penalty and every bad word."""
    prompt = ids_of(21)
    params = replace(params, frequency_penalty=1.5, presence_penalty=1.0, repetition_penalty=1.2, logprobs=2)
    whole = make_room().run(submit("a", prompt, params))
    tokens = whole.tokens["a"]
    for emitted in range(1, len(tokens)):
        again = make_room().run(submit("b", (*prompt, *tokens[:emitted]), params, num_emitted=emitted))
        assert again.tokens["b"] == tokens[emitted:], emitted
        assert again.logprobs["b"] == whole.logprobs["a"][emitted:]


def test_prompt_logprobs_are_not_said_again_when_tokens_were_emitted(make_room):
    prompt = ids_of(21)
    whole = make_room().run(submit("a", prompt, SCORED))
    again = make_room().run(submit("b", (*prompt, *whole.tokens["a"][:4]), SCORED, num_emitted=4))
    assert "b" not in again.prompt_logprobs
    assert again.logprobs["b"] == whole.logprobs["a"][4:]


def test_a_sequence_knows_prompt_and_output_apart():
    params = replace(BASE, repetition_penalty=2.0)
    sequence = new_sequence(submit("a", (5, 6, 7, 8), params, num_emitted=2), 0)
    sequence.tokens.append(9)
    assert sequence.history == History((5, 6), (7, 8, 9))
    assert new_sequence(submit("a", (5, 6), BASE), 0).history is None


def test_a_prefill_worker_sends_the_scores_with_the_first_token(make_room):
    prompt = ids_of(45)
    whole = make_room().run(submit("a", prompt, SCORED))
    room = make_room(prefill_policy, max_batch_tokens=16).run(submit("a", prompt, SCORED, Source.FOR_PEER))
    room.run(PeerBound(SequenceKey("a", 0)))
    assert room.tokens["a"] == whole.tokens["a"][:1]
    assert room.logprobs["a"] == whole.logprobs["a"][:1]
    assert room.prompt_logprobs["a"] == whole.prompt_logprobs["a"]


def test_a_decode_worker_whose_peer_is_lost_scores_by_itself_unless_the_first_token_came(make_room):
    prompt, key = ids_of(45), SequenceKey("a", 0)
    whole = make_room().run(submit("a", prompt, SCORED))
    for first, is_bound in ((None, False), (None, True), (whole.tokens["a"][0], False), (whole.tokens["a"][0], True)):
        room = make_room(decode_policy).run(submit("plain", prompt, BASE))
        room.run(submit("a", prompt, SCORED, Source.PEER))
        room.run(*[Bind(key)] * is_bound)
        assert room.promised["a"] == 0  # nothing that is cached spares the peer the whole prompt
        room.run(PrefillLocally(key, 32, first))
        skipped = 0 if first is None else 1
        assert room.tokens["a"] == whole.tokens["a"][skipped:]
        assert room.logprobs["a"] == whole.logprobs["a"][skipped:]
        assert room.prompt_logprobs.get("a") == (whole.prompt_logprobs["a"] if first is None else None)


def test_kv_complete_with_gaps_goes_on_locally_without_scores(make_room):
    prompt, key = ids_of(45), SequenceKey("a", 0)
    whole = make_room().run(submit("a", prompt, SCORED))
    room = make_room(decode_policy).run(submit("a", prompt, SCORED, Source.PEER)).run(Bind(key))
    room.run(KvComplete(key, whole.tokens["a"][0]))
    assert room.tokens["a"] == whole.tokens["a"][1:]
    assert "a" not in room.prompt_logprobs
    assert room.ended["a"].reason is FinishReason.LENGTH


BROKEN = [
    {"logit_bias": ((9999, 1.0),)},  # beyond the vocabulary: an IndexError in the middle of the step
    {"min_tokens": 5, "stop_token_ids": (9999,)},
    {"logprobs": "many"},
    {"temperature": "hot"},  # raises before any row is looked at
    {"prompt_logprobs": "many"},
]


@pytest.mark.parametrize("fields", BROKEN, ids=lambda fields: next(iter(fields)))
def test_a_row_that_cannot_be_sampled_is_its_sequences_failure_alone(make_room, make_engine, caplog, fields):
    """Whatever a request says, and whichever check let it through."""
    others = {"a": ids_of(30), "c": ids_of(21, 5)}
    alone = {name: make_room().run(submit(name, ids, SCORED)) for name, ids in others.items()}
    room = make_engine()
    broken = submit("b", ids_of(25, 3), replace(BASE, **fields))
    room.run(submit("a", others["a"], SCORED), broken, submit("c", others["c"], SCORED))
    assert (room.ended["b"].reason, room.ended["b"].error_code) == (FinishReason.ERROR, "internal_error")
    assert "Error" in room.ended["b"].error_message
    assert "b" not in room.tokens
    for name, one in alone.items():
        assert told(room, name) == told(one, name)
        assert room.ended[name].reason is FinishReason.LENGTH
    assert sum(record.levelname == "ERROR" for record in caplog.records) == 1
    assert ("fails alone" in caplog.text) == ("temperature" in fields)  # the others never break the step
    room.run(submit("b", ids_of(25, 3), BASE))  # nothing of it is left
    assert len(room.tokens["b"]) == BASE.max_tokens


def test_an_end_that_only_the_tokenizer_knows_and_the_model_cannot_say_is_ignored(write_tiny, make_runner):
    runner = make_runner(write_tiny({}), dtype="float32", kv_dtype="float32", end_ids=(7, 160, 9999))
    assert runner.spec.eos_ids == (1, 7)
    room = Room(runner).run(submit("a", ids_of(20), replace(BASE, min_tokens=5)))
    assert room.ended["a"].reason is FinishReason.LENGTH


def test_scores_come_in_parts_of_whole_tiles(make_room, monkeypatch):
    prompt = ids_of(50)
    whole = make_room().run(submit("a", prompt, SCORED))
    monkeypatch.setattr(sampling_step, "SCORED_NUMBERS", 1)
    assert told(make_room().run(submit("a", prompt, SCORED)), "a") == told(whole, "a")


def test_bad_words_never_come_about(make_room):
    prompt = ids_of(30)
    free = make_room().run(submit("a", prompt, BASE)).tokens["a"]
    word = tuple(free[3:5])
    held = make_room().run(submit("a", prompt, replace(BASE, bad_words=(word,)))).tokens["a"]
    assert held[:4] == free[:4] or free[:4].count(word[0]) > 1  # its beginning may still be said
    assert word not in itertools.pairwise(held)
    single = make_room().run(submit("a", prompt, replace(BASE, bad_words=((free[2],),)))).tokens["a"]
    assert free[2] not in single


def test_penalties_count_the_token_of_the_step_in_flight():
    history, place = History((1, 2), (5,)), SampledPlace(1, 0)
    known = SequenceStep(SequenceKey("r", 0), 3, (5,), (), (), True, EVERYTHING, 1, history=history)
    flying = known._replace(from_place=place)
    assert sampling_step._draw(known, 9, NO_MASKS).history == history
    assert sampling_step._draw(flying, 9, NO_MASKS).history == History((1, 2), (5, 9))
