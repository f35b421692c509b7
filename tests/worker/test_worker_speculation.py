"""Workers that guess tokens say what workers that do not say: ids, text, logprobs, ends, after every cut."""

import asyncio

import pytest

from twostroke.core.request import Role
from twostroke.engine.config import SpeculationConfig
from twostroke.engine.speculation.pace import DraftPace
from twostroke.kv.config import CacheConfig

NGRAM = SpeculationConfig(method="ngram", num_speculative_tokens=5, prompt_lookup_max=3, prompt_lookup_min=1)
# A random model rarely repeats itself: a bias on few bytes makes a text of which much can be guessed.
BIASED = {"max_tokens": 40, "temperature": 0.7, "seed": 5, "logit_bias": {65: 9.0, 66: 9.0, 67: 8.0}}
KINDS = {
    "greedy": {"max_tokens": 60, "temperature": 0.0, "ignore_eos": True},
    "sampled": {**BIASED, "ignore_eos": True},
    "may end": {**BIASED, "logit_bias": {65: 9.0, 66: 9.0, 257: 6.0}, "min_tokens": 5},
    "stop string": {**BIASED, "stop": ["ABBA", "AAAC"], "include_stop_str_in_output": True},
    "logprobs": {**BIASED, "logprobs": 3},
    "penalties": {**BIASED, "repetition_penalty": 1.1, "frequency_penalty": 0.2, "presence_penalty": 0.1},
    "cut": {**BIASED, "max_tokens": 7},
}


def told(answer, hand, name):
    logprobs = [one for m in hand.messages for p in m.step.tokens if p.request_id == name for one in p.logprobs]
    end = answer.end
    return answer.token_ids, answer.text, logprobs, end.reason, end.usage.completion_tokens, end.shown_tokens


@pytest.fixture(autouse=True)
def _guesses_always(monkeypatch):
    """Whether guessing pays here, measured step times say: a test must not depend on them."""
    monkeypatch.setattr(DraftPace, "begins", lambda *_: True)
    monkeypatch.setattr(DraftPace, "is_on", lambda *_: True)


@pytest.mark.parametrize("kind", KINDS)
async def test_guessing_changes_nothing_alone_handed_over_and_after_a_loss(
    start_worker, router_of, make_prompt, all_free, kind
):
    plain = await start_worker(Role.COMBINED)
    guesses = await start_worker(Role.COMBINED, speculation=NGRAM)
    prefill = await start_worker(Role.PREFILL, speculation=NGRAM)
    decode = await start_worker(Role.DECODE, speculation=NGRAM)
    hands = [await router_of(worker) for worker in (plain, guesses, decode)]
    options = {"sampling": KINDS[kind]}
    for place, length in enumerate((5, 40, 48)):
        name, ids = f"r{place}", make_prompt(length, place)
        answers = [
            await hands[0].submit(name, ids, **options),
            await hands[1].submit(name, ids, **options),
            await hands[2].submit(name, ids, [prefill], **options),
        ]
        said = [told(await answer.ended(), hand, name) for answer, hand in zip(answers, hands, strict=True)]
        assert said[1] == said[2] == said[0]
        whole = answers[0].token_ids
        assert answers[0].end.usage.draft_tokens == 0
        for cut in range(1, len(whole), 5):  # its worker was lost after `cut` tokens
            again = f"{name} after {cut}"
            rest = await hands[1].submit(again, [*ids, *whole[:cut]], emitted_tokens=cut, **options)
            rest.token_ids += whole[:cut]
            assert told(await rest.ended(), hands[1], again)[0] == whole
            assert rest.end.reason == answers[0].end.reason
    usages = [end.usage for hand in hands[1:] for answer in hand.answers.values() for end in answer.ends]
    drafted, accepted = sum(u.draft_tokens for u in usages), sum(u.accepted_tokens for u in usages)
    assert drafted > accepted >= (0 if kind == "cut" else 1)
    await all_free(plain, guesses, prefill, decode)

    def counted(what):
        return [dict(worker.dispatcher.last_load.counters).get(f"spec_decode_num_{what}", 0) for worker in workers]

    workers = guesses, decode
    async with asyncio.timeout(60):
        while sum(counted("draft_tokens")) != drafted:  # the last beat may be older than the last step
            await asyncio.sleep(0.02)
    assert sum(counted("accepted_tokens")) == accepted
    assert all(counted("drafts"))


async def test_a_pool_that_is_too_small_and_swap_space(start_worker, router_of, make_prompt, all_free):
    sampling = {**BIASED, "max_tokens": 70, "ignore_eos": True}
    texts = []
    small = CacheConfig(tokens=192, swap_space=0.001)
    for changes in ({}, {"cache": small, "speculation": NGRAM}):
        worker = await start_worker(Role.COMBINED, **changes)
        hand = await router_of(worker)
        answers = [await hand.submit(f"r{i}", make_prompt(20 + 3 * i, i), sampling=sampling) for i in range(4)]
        texts.append([(await answer.ended()).text for answer in answers])
    assert texts[0] == texts[1]
    await all_free(worker)
    counters = dict(worker.dispatcher.last_load.counters)
    assert counters["preemptions"] > 0
    assert counters["spec_decode_num_accepted_tokens"] > 0
