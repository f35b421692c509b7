"""Speculative decoding through the real core and runner: the tokens and logprobs of plain decoding, in fewer steps."""

import random
from dataclasses import replace

import pytest
from support.engines.sampling_room import Room, ids_of, submit
from support.fakes.guesses import guessing

from twostroke.core.request import FinishReason, SamplingParams, SequenceKey
from twostroke.decode_worker.policy import combined_policy, decode_policy
from twostroke.engine.link.messages import Bind, CancelSequence, KvComplete, PrefillLocally, Source
from twostroke.engine.speculation.ngram import NgramLimits, NgramProposer
from twostroke.engine.speculation.speculation import Speculation
from twostroke.kv.section import HeldTokens

GREEDY = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
SAMPLED = replace(GREEDY, temperature=0.9, seed=11)
SETTINGS = {
    "greedy": GREEDY,
    "greedy that ends by itself": replace(GREEDY, ignore_eos=False),
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
    "logprobs before an end": replace(SAMPLED, logprobs=2, stop_token_ids=tuple(range(20, 32))),
    "short": replace(GREEDY, max_tokens=3),
}


@pytest.fixture
def runner(write_tiny, make_runner):
    return make_runner(write_tiny({}), dtype="float32", kv_dtype="float32")


def ngrams(most=4, least=1, longest=3):
    return Speculation(lambda key, params: NgramProposer(NgramLimits(least, longest)), most)


def told(room, name):
    return room.tokens.get(name), room.logprobs.get(name), room.prompt_logprobs.get(name), room.ended[name].reason


def counted(room, what):
    return room.core.counters[f"spec_decode_num_{what}"]


def text(room, command):
    return (*command.prompt_ids, *room.tokens[command.key.request_id])


def steps_of(room, *commands):
    room.send(*commands)
    count = 0
    while room.step():
        count += 1
    return count


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("wrong", [0.0, 0.3, 1.0])
def test_says_what_plain_decoding_says(runner, name, wrong):
    work = [submit(f"a{n}", ids_of(length, n), SETTINGS[name]) for n, length in enumerate((1, 15, 16, 17, 40))]
    plain = Room(runner)
    num_plain = steps_of(plain, *work)
    for most in (1, 4, 20):
        room = Room(runner, speculation=guessing({w.key.request_id: text(plain, w) for w in work}, most, wrong))
        num_steps = steps_of(room, *work)
        for command in work:
            assert told(room, command.key.request_id) == told(plain, command.key.request_id)
        assert room.pool.num_live == 0
        assert counted(room, "draft_tokens") >= counted(room, "accepted_tokens")
        if wrong == 0.0:
            # the draft that ends a sequence is right, and computed for nothing
            assert counted(room, "draft_tokens") - counted(room, "accepted_tokens") <= len(work)
            assert num_steps < num_plain or num_plain <= 5
        if wrong == 1.0:
            assert counted(room, "accepted_tokens") == 0


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_ngrams_of_a_text_that_repeats_itself(runner, params):
    period = ids_of(7)
    work = [submit(f"r{n}", period * 6 + period[:n], params) for n in range(4)]
    plain = Room(runner).run(*work)
    room = Room(runner, speculation=ngrams()).run(*work)
    assert counted(room, "drafts") > 0
    for command in work:
        assert told(room, command.key.request_id) == told(plain, command.key.request_id)


@pytest.mark.parametrize("seed", range(6))
def test_the_same_in_small_batches_beside_prompts_and_in_a_pool_that_is_too_small(runner, seed):
    draw = random.Random(seed)
    params = list(SETTINGS.values())
    work = [
        submit(f"x{n}", ids_of(draw.randint(1, 60), n), draw.choice(params), priority=draw.choice((0, 0, 1)))
        for n in range(6)
    ]
    plain = Room(runner).run(*work)
    room = Room(
        runner,
        draw.choice((combined_policy, decode_policy)),
        num_blocks=draw.choice((7, 9, 12)),
        speculation=guessing({w.key.request_id: text(plain, w) for w in work}, draw.choice((2, 4, 9)), 0.2),
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
    assert counted(room, "accepted_tokens") > 0
    assert room.pool.num_live == 0


def test_preemption_keeps_nothing_of_rejected_tokens(runner):
    work = [submit(f"x{n}", ids_of(40, n), replace(SETTINGS["sampled logprobs"], max_tokens=40)) for n in range(3)]
    plain = Room(runner).run(*work)
    texts = {w.key.request_id: text(plain, w) for w in work}
    room = Room(runner, num_blocks=9, max_batch_tokens=32, speculation=guessing(texts, 6, 0.3)).run(*work)
    assert sum(ended.preemptions for ended in room.ended.values()) > 0
    for command in work:
        assert told(room, command.key.request_id) == told(plain, command.key.request_id)


def test_generated_blocks_are_found_and_hold_what_plain_decoding_stores(runner):
    first = submit("a", ids_of(30), GREEDY)
    plain = Room(runner).run(first)
    whole = text(plain, first)
    again = submit("b", (*whole, *ids_of(5, 9)), replace(SAMPLED, max_tokens=10, logprobs=3))
    plain.run(again)
    room = Room(runner, speculation=guessing({"a": whole, "b": text(plain, again)}, 5, 0.4))
    room.run(first).run(again)
    assert room.ended["b"].cached_tokens == plain.ended["b"].cached_tokens == 64
    assert told(room, "b") == told(plain, "b")


def test_what_is_sealed_is_what_was_accepted(runner, write_tiny, make_runner):
    prompt = ids_of(27)
    other = make_runner(write_tiny({}), dtype="float32", kv_dtype="float32")  # its seals are not in our store
    plain = Room(other).run(submit("a", prompt, GREEDY))
    room = Room(runner, speculation=guessing({"a": (*prompt, *plain.tokens["a"])}, 20, 0.15))
    room.send(submit("a", prompt, GREEDY))
    num_sealed, num_beyond = 0, 0
    while room.step():
        for sequence in room.core._scheduler.by_key.values():
            table = [*room.core._scheduler.holdings.table(sequence, len(sequence.tokens))]
            whole = sequence.num_computed // 16
            assert runner.store.verify(HeldTokens(*table, 0, 16 * whole))
            num_sealed = max(num_sealed, whole)
            if len(table[0]) > whole:  # the block may hold rejected tokens
                assert not runner.store.is_sealed(HeldTokens(*table, 16 * whole, 1))
                num_beyond += 1
    assert (num_sealed, counted(room, "accepted_tokens") > 9, num_beyond > 5) == (3, True, True)
    assert counted(room, "draft_tokens") > counted(room, "accepted_tokens")


@pytest.mark.parametrize("first_known", [True, False])
def test_a_handed_over_sequence_and_one_sent_again(runner, first_known):
    """KV that a peer computed stays in the same store here, so `PrefillLocally` and a re-dispatch stand for both."""
    prompt = ids_of(37)
    plain = Room(runner).run(submit("a", prompt, SETTINGS["sampled"]))
    said = plain.tokens["a"]
    emitted = 9 if not first_known else 0
    command = submit("a", (*prompt, *said[:emitted]), SETTINGS["sampled"], Source.PEER, num_emitted=emitted)
    room = Room(runner, decode_policy, speculation=guessing({"a": (*prompt, *said)}, 4, 0.2))
    room.send(command)
    room.step()
    room.send(Bind(command.key), PrefillLocally(command.key, 0, said[0] if first_known else None))
    room.run()
    known = 1 if first_known else emitted
    assert room.tokens["a"] == said[known:]
    assert counted(room, "accepted_tokens") > 0


def test_a_peers_kv_decodes_with_drafts(runner):
    prompt = ids_of(32)
    plain = Room(runner).run(submit("a", prompt, GREEDY))
    room = Room(runner, decode_policy, speculation=guessing({"p": (*prompt, *plain.tokens["a"])}, 4, 0.2))
    room.run(submit("warm", (*prompt, 5), replace(GREEDY, max_tokens=1)))  # the prompt's KV is cached
    command = submit("p", prompt, GREEDY, Source.PEER)
    room.send(command)
    room.step()
    assert room.promised["p"] == 16
    room.send(Bind(command.key), KvComplete(command.key, plain.tokens["a"][0]))
    room.run()
    assert room.tokens["p"] == plain.tokens["a"][1:]
    assert counted(room, "accepted_tokens") > 0


def test_a_cancel_during_a_step_with_drafts_frees_everything(runner):
    prompt = ids_of(30)
    plain = Room(runner).run(submit("a", prompt, GREEDY))
    whole = (*prompt, *plain.tokens["a"])
    room = Room(runner, speculation=guessing({"a": whole, "b": whole}, 8, 0.0))
    room.send(submit("a", prompt, GREEDY))
    room.step()
    room.hear(room.core.tick(0.0))
    plan = room.core.plan(0.0)
    assert plan.sequences[0].draft_ids
    room.send(CancelSequence(SequenceKey("a", 0)))
    room.hear(room.core.apply(plan, runner.run(plan), 0.0))
    room.core.check_integrity()
    assert room.ended["a"].reason is FinishReason.CANCELLED
    assert room.pool.num_live == 0
    assert room.run(submit("b", prompt, GREEDY)).tokens["b"] == plain.tokens["a"]


def test_a_draft_whose_keys_are_not_finite_is_as_if_it_was_wrong(runner, monkeypatch):
    prompt = ids_of(20)
    plain = Room(runner).run(submit("a", prompt, GREEDY))
    room = Room(runner, speculation=guessing({"a": (*prompt, *plain.tokens["a"])}, 4, 0.0))
    room.send(submit("a", prompt, GREEDY))
    room.step()
    original = type(runner._decoder).hidden

    def hidden(self, batch, store, taps=()):
        found = original(self, batch, store, taps)
        if len(batch.sampled) > 2:
            found.non_finite[2] = 1  # the second draft's
            found = found._replace(num_refused=1)
        return found

    monkeypatch.setattr(type(runner._decoder), "hidden", hidden)
    room.run()
    assert room.tokens["a"] == plain.tokens["a"]
    assert room.ended["a"].reason is FinishReason.LENGTH
    assert counted(room, "accepted_tokens") < counted(room, "draft_tokens")
