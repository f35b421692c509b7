"""A draft model through the real core and runners: the tokens and logprobs of plain decoding, in fewer steps."""

import asyncio
import random
from dataclasses import replace
from itertools import pairwise

import pytest
from support.engines.draft_models import drafted
from support.engines.sampling_room import Room, ids_of, submit

from twostroke.core.clock import MonotonicClock
from twostroke.core.request import FinishReason, SamplingParams, SequenceKey
from twostroke.decode_worker.policy import combined_policy, decode_policy
from twostroke.engine.link.messages import Bind, CancelSequence, Ended, KvComplete, Source, StepTokens, Stop
from twostroke.engine.link.thread_link import ThreadLink
from twostroke.engine.loop import Engine
from twostroke.engine.speculation.draft_model.holdings import proposer_of
from twostroke.model.drafter import ModelDrafter

GREEDY = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
SAMPLED = replace(GREEDY, temperature=0.9, seed=11)
SETTINGS = {
    "greedy": GREEDY,
    "greedy that ends by itself": replace(GREEDY, ignore_eos=False, logit_bias=((1, 4.0),)),
    "sampled": SAMPLED,
    "filtered": replace(SAMPLED, top_p=0.9, top_k=20, min_p=0.01),
    "penalised": replace(SAMPLED, repetition_penalty=1.3, frequency_penalty=0.5, presence_penalty=0.7),
    "greedy and penalised": replace(GREEDY, repetition_penalty=1.2, frequency_penalty=0.3),
    "biased": replace(SAMPLED, logit_bias=((40, 6.0), (41, -100.0), (1, 4.0)), ignore_eos=False),
    "bad words": replace(GREEDY, bad_words=((40, 40), (77,), (12, 13, 14))),
    "no end before": replace(SAMPLED, min_tokens=9, ignore_eos=False, logit_bias=((1, 5.0),)),
    "stop ids": replace(SAMPLED, stop_token_ids=(20, 21, 22, 23, 24, 25), min_tokens=3),
    "logprobs": replace(GREEDY, logprobs=4, prompt_logprobs=2),
    "sampled logprobs": replace(SAMPLED, logprobs=2, top_p=0.95),
    "short": replace(GREEDY, max_tokens=3),
}


@pytest.fixture
def runner(write_tiny, make_runner):
    return make_runner(write_tiny({}), dtype="float32", kv_dtype="float32")


@pytest.fixture
def itself(write_tiny, make_runner):
    """The target as its own draft model."""
    return ModelDrafter(make_runner(write_tiny({}), dtype="float32", kv_dtype="float32"))


@pytest.fixture
def smaller(write_tiny, make_runner):
    """A draft model that is right now and then: the target without its second layer."""
    return ModelDrafter(make_runner(write_tiny({"layers": 1}), dtype="float32", kv_dtype="float32"))


def told(room, name):
    return room.tokens.get(name), room.logprobs.get(name), room.prompt_logprobs.get(name), room.ended[name].reason


def counted(room, what):
    return room.core.counters[f"spec_decode_num_{what}"]


def planner(room):
    return room.core._scheduler.guess_planner


def is_all_free(room):
    return room.pool.num_live == 0 and planner(room).holdings.pool.num_live == 0


@pytest.mark.parametrize("name", SETTINGS)
def test_says_what_plain_decoding_says_and_the_target_as_its_own_draft_model_is_always_right(
    runner, itself, smaller, name
):
    work = [submit(f"a{n}", ids_of(length, n), SETTINGS[name]) for n, length in enumerate((1, 16, 17, 40))]
    plain = Room(runner).run(*work)
    for drafter, most in ((itself, 4), (smaller, 6)):
        room = Room(runner, speculation=drafted(most), drafter=drafter).run(*work)
        for command in work:
            assert told(room, command.key.request_id) == told(plain, command.key.request_id)
        assert counted(room, "draft_tokens") > 0
        if drafter is itself:
            assert counted(room, "accepted_tokens") == counted(room, "draft_tokens")
        assert is_all_free(room)


@pytest.mark.parametrize("seed", range(3))
def test_the_same_in_small_batches_beside_prompts_and_in_pools_that_are_too_small(runner, itself, smaller, seed):
    draw = random.Random(seed)
    params = list(SETTINGS.values())
    work = [
        submit(f"x{n}", ids_of(draw.randint(1, 60), n), draw.choice(params), priority=draw.choice((0, 0, 1)))
        for n in range(6)
    ]
    plain = Room(runner).run(*work)
    sizes = {"num_blocks": draw.choice((3, 6, 12)), "chunk": draw.choice((16, 64)), "caches": draw.random() < 0.7}
    room = Room(
        runner,
        draw.choice((combined_policy, decode_policy)),
        num_blocks=draw.choice((7, 9, 12)),
        speculation=drafted(draw.choice((2, 4, 9)), **sizes),
        drafter=draw.choice((itself, smaller)),
        max_batch_tokens=draw.choice((16, 32, 64)),
        max_num_seqs=draw.choice((3, 8)),
    )
    room.send(*work[:3])
    for late in work[3:]:
        for _ in range(draw.randint(0, 9)):
            room.step()
        room.send(late)
    room.run()
    for command in work:
        assert told(room, command.key.request_id) == told(plain, command.key.request_id)
    assert counted(room, "draft_tokens") > 0
    assert is_all_free(room)


def test_choices_of_one_prompt(runner, itself):
    prompt, keys = ids_of(37), [SequenceKey("n", choice) for choice in range(3)]
    work = [replace(submit("n", prompt, SAMPLED), key=key) for key in keys]

    def said(room):
        tokens = {key: [] for key in keys}
        room.send(*work)
        while True:
            room.core.tick(0.0)
            room.guess()
            plan = room.core.plan(0.0)
            if plan is None:
                return tokens
            result = runner.run(plan)
            for step, told in zip(plan.sequences, result.tokens, strict=True):
                tokens[step.key] += told
            room.core.apply(plan, result, 0.0)

    plain, room = said(Room(runner)), Room(runner, speculation=drafted(4), drafter=itself)
    guessed = said(room)
    assert {key: ids[: GREEDY.max_tokens] for key, ids in guessed.items()} == plain
    assert len({tuple(ids) for ids in plain.values()}) == 3
    assert counted(room, "accepted_tokens") == counted(room, "draft_tokens") > 0


def test_preemption_takes_the_draft_blocks_along_and_the_prefix_is_found_again(runner, itself):
    work = [submit(f"x{n}", ids_of(40, n), replace(SAMPLED, max_tokens=40)) for n in range(3)]
    plain = Room(runner).run(*work)
    room = Room(runner, num_blocks=9, max_batch_tokens=32, speculation=drafted(6), drafter=itself)
    room.send(*work)
    while room.step():
        for sequence in room.core._scheduler.by_key.values():
            proposer = proposer_of(sequence)
            if proposer is not None and not sequence.blocks:
                assert not proposer.blocks
    assert sum(ended.preemptions for ended in room.ended.values()) > 0
    for command in work:
        assert told(room, command.key.request_id) == told(plain, command.key.request_id)
    assert counted(room, "accepted_tokens") == counted(room, "draft_tokens")
    assert is_all_free(room)


@pytest.mark.parametrize("chunk", [16, 1024])
def test_a_prompt_from_a_peer_is_caught_up_in_chunks_while_tokens_go_on(runner, itself, chunk):
    prompt = ids_of(200)
    plain = Room(runner).run(submit("a", prompt, GREEDY))
    room = Room(runner, decode_policy, speculation=drafted(4, chunk=chunk), drafter=itself)
    room.run(submit("warm", (*prompt, 5), replace(GREEDY, max_tokens=1)))  # the prompt's KV is cached
    command = submit("p", prompt, GREEDY, Source.PEER)
    room.send(command)
    room.step()
    room.send(Bind(command.key), KvComplete(command.key, plain.tokens["a"][0]))
    counts = []
    while room.step():
        counts.append(len(room.tokens.get("p", ())))
    assert room.tokens["p"] == plain.tokens["a"][1:]
    # 200 tokens and the new ones take 13 steps of 16, or one; each of them gives a token
    first_guess = next(n for n, (one, two) in enumerate(pairwise(counts)) if two - one > 1)
    assert first_guess == (12 if chunk == 16 else 0)
    assert counts[first_guess] == first_guess + 1
    assert room.core.counters["draft_model_caught_up_tokens"] >= 200
    assert counted(room, "accepted_tokens") == counted(room, "draft_tokens") > 0


def test_a_prefix_is_found_in_the_draft_models_cache(runner, itself):
    prompt = ids_of(100)
    room = Room(runner, speculation=drafted(4), drafter=itself)
    room.run(submit("a", prompt, GREEDY))
    before = room.core.counters["draft_model_caught_up_tokens"]
    assert before == 64 + 37  # the prompt, and what came during the first chunk
    room.run(submit("b", (*prompt, 7, 8, 9), SAMPLED))
    assert room.core.counters["draft_model_caught_up_tokens"] == before  # 96 found, and few more in the first call
    assert counted(room, "accepted_tokens") == counted(room, "draft_tokens")


def test_a_cancel_between_and_during_steps_frees_everything(runner, itself):
    prompt = ids_of(30)
    plain = Room(runner).run(submit("a", prompt, GREEDY))
    room = Room(runner, speculation=drafted(8), drafter=itself)
    room.send(submit("a", prompt, GREEDY), submit("c", prompt, SAMPLED))
    for _ in range(4):
        room.step()
    assert proposer_of(room.core._scheduler.by_key[SequenceKey("c", 0)]).blocks
    room.send(CancelSequence(SequenceKey("c", 0)))
    room.core.check_integrity()
    room.hear(room.core.tick(0.0))
    room.guess()
    plan = room.core.plan(0.0)
    assert plan.sequences[0].draft_ids
    room.send(CancelSequence(SequenceKey("a", 0)))
    room.hear(room.core.apply(plan, runner.run(plan), 0.0))
    room.core.check_integrity()
    assert {room.ended[name].reason for name in "ac"} == {FinishReason.CANCELLED}
    assert is_all_free(room)
    assert room.run(submit("b", prompt, GREEDY)).tokens["b"] == plain.tokens["a"]


def test_a_sequence_that_comes_back_after_a_loss_says_the_same(runner, itself):
    prompt = ids_of(37)
    plain = Room(runner).run(submit("a", prompt, SAMPLED))
    said = plain.tokens["a"]
    again = submit("a", (*prompt, *said[:9]), SAMPLED, num_emitted=9)
    room = Room(runner, speculation=drafted(4), drafter=itself).run(again)
    assert room.tokens["a"] == said[9:]
    assert counted(room, "accepted_tokens") == counted(room, "draft_tokens") > 0


def test_draft_keys_that_are_not_finite_end_guessing_for_this_sequence_only(runner, itself, monkeypatch):
    work = [submit(f"x{n}", ids_of(20, n), GREEDY) for n in range(2)]
    plain = Room(runner).run(*work)
    original, calls = type(itself.runner).run, []

    def run(self, plan):
        result = original(self, plan)
        if self is itself.runner and plan.sequences:
            calls.append(plan)
            if len(calls) > 4:
                bad = frozenset({work[0].key})
                kept = [() if s.key in bad else t for s, t in zip(plan.sequences, result.tokens, strict=True)]
                return replace(result, non_finite=bad & {s.key for s in plan.sequences}, tokens=tuple(kept))
        return result

    monkeypatch.setattr(type(itself.runner), "run", run)
    room = Room(runner, speculation=drafted(3), drafter=itself).run(*work)
    for command in work:
        assert told(room, command.key.request_id) == told(plain, command.key.request_id)
    assert room.core.counters["draft_model_failures"] == 1
    assert is_all_free(room)
    by_name = {name: ended.draft_tokens for name, ended in room.ended.items()}
    assert by_name["x0"] < by_name["x1"]


def test_beyond_the_draft_models_context_decoding_is_plain(runner, itself):
    command = submit("a", ids_of(20), GREEDY)
    plain = Room(runner).run(command)
    room = Room(runner, speculation=drafted(4, context=32), drafter=itself)
    room.send(command)
    most = 0
    while room.step():
        for sequence in room.core._scheduler.by_key.values():
            most = max(most, getattr(proposer_of(sequence), "num_computed", 0))
    assert told(room, "a") == told(plain, "a")
    assert 28 <= most <= 32
    assert counted(room, "accepted_tokens") == counted(room, "draft_tokens") > 0


def test_tokens_that_the_draft_model_does_not_have_end_guessing(runner, itself):
    command = submit("a", (*ids_of(20), 150), replace(SAMPLED, logit_bias=((5, 30.0),)))
    other = submit("b", tuple(min(id_, 99) for id_ in ids_of(20)), replace(SAMPLED, logit_bias=((5, 30.0),)))
    plain = Room(runner).run(command, other)
    room = Room(runner, speculation=drafted(4, vocabulary=100), drafter=itself).run(command, other)
    assert [told(room, name) for name in "ab"] == [told(plain, name) for name in "ab"]
    assert room.ended["a"].draft_tokens == 0 < room.ended["b"].draft_tokens
    assert is_all_free(room)


class Raising:
    """A drafter that raises from its third call on, as for lack of memory."""

    def __init__(self, drafter):
        self._drafter, self.num_calls = drafter, 0
        self.catch_up = drafter.catch_up

    def warm_up(self):
        self._drafter.warm_up()

    def guess(self, plan):
        self.num_calls += 1
        if self.num_calls > 2:
            raise MemoryError("no room for activations")
        return self._drafter.guess(plan)


@pytest.mark.parametrize("raises", [False, True])
async def test_in_the_engines_thread_a_draft_model_guesses_and_its_failure_fails_no_request(runner, itself, raises):
    work = [submit(f"x{n}", ids_of(30, n), SAMPLED) for n in range(2)]
    plain = Room(runner).run(*work)
    core = Room(runner, speculation=drafted(4)).core
    drafter, link = Raising(itself) if raises else itself, ThreadLink()
    engine = Engine(core, runner, runner.store, link, MonotonicClock(), drafter=drafter)
    engine.start()
    for command in work:
        link.send(command)
    tokens, ended = {}, {}
    async with asyncio.timeout(60):
        while len(ended) < len(work):
            for event in await link.receive():
                if isinstance(event, StepTokens):
                    for news in event.news:
                        tokens.setdefault(news.key.request_id, []).extend(news.token_ids)
                elif isinstance(event, Ended):
                    ended[event.key.request_id] = event
    link.send(Stop())
    assert engine.join(60)
    assert tokens == {name: plain.tokens[name] for name in ("x0", "x1")}
    assert {one.reason for one in ended.values()} == {FinishReason.LENGTH}
    assert (core.counters["draft_model_failures"] > 0) == raises
    assert core.counters["draft_model_draft_tokens"] > 0
    assert core._scheduler.guess_planner.holdings.pool.num_live == 0
