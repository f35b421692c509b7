"""A request goes on at another worker after each of its tokens: ids, text, logprobs, end and usage are as undisturbed.

The model gives random bytes, so characters and stop strings are cut at many of these places.
"""

import pytest
from support.engines.workers import EOS, Answer, RouterHand

from twostroke.core.request import Role
from twostroke.decode_worker.choice import ChoiceText
from twostroke.kv.messages import sampling_from_wire
from twostroke.protos import common_pb2
from twostroke.text.tokenizer import Tokenizer

LENGTH, STOP = common_pb2.FINISH_REASON_LENGTH, common_pb2.FINISH_REASON_STOP
PROMPT_TOKENS = 40
NUM_TOKENS = 20
PLAIN = {"max_tokens": NUM_TOKENS, "temperature": 0.0, "seed": 1, "ignore_eos": True}
SAMPLED = {**PLAIN, "temperature": 1.0, "seed": 5}
KINDS = {
    "greedy": PLAIN,
    "seeded": SAMPLED,
    "logprobs": {**SAMPLED, "logprobs": 3},
    "prompt_logprobs": {**PLAIN, "logprobs": 1, "prompt_logprobs": 2},
    "penalties": {**SAMPLED, "repetition_penalty": 1.3, "frequency_penalty": 0.7, "presence_penalty": 0.4},
    "filters": {**SAMPLED, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "logit_bias": {65: 2.0}},
    "min_tokens": {**SAMPLED, "ignore_eos": False, "min_tokens": 12, "logit_bias": {257: 100.0}},
    "specials": {**SAMPLED, "logit_bias": {258: 8.0, 259: 8.0}, "skip_special_tokens": False},
}


class Whole:
    """What a run said, token by token."""

    def __init__(self, hand: RouterHand, name: str, choice: int, answer: Answer) -> None:
        parts = [
            part
            for message in hand.messages
            for part in message.step.tokens
            if (part.request_id, part.choice) == (name, choice)
        ]
        self.text = answer.text
        self.token_ids = answer.token_ids
        self.end = answer.end
        self.logprobs = [one for part in parts for one in part.logprobs]
        self.num_prompt_scores = sum(len(part.prompt_logprobs) for part in parts)
        self.ends_of_messages = dict(accumulate_texts(parts))


def accumulate_texts(parts):
    """Number of tokens and text so far, after each message."""
    text = ""
    for part in parts:
        text += part.text
        yield part.first_index + len(part.token_ids), text


def texts_before(tokenizer, prompt, sampling, whole: Whole) -> list[str]:
    """The text that a client has after each number of tokens; agrees with every message of the run."""
    params = sampling_from_wire(common_pb2.SamplingParams(**sampling))
    choice = ChoiceText(tokenizer, params, {EOS}, prompt_ids=prompt)
    texts = [""]
    for place, token_id in enumerate(whole.token_ids):
        texts.append(texts[-1] + choice.push(place, [token_id]).text)
    assert all(texts[count] == text for count, text in whole.ends_of_messages.items())
    return texts


async def run(hand, prompt, peers, sampling, *, name, emitted=(), choice=0):
    answer = hand.answers.setdefault((name, choice), Answer())
    answer.token_ids += emitted
    await hand.submit(
        name, prompt + list(emitted), peers, sampling=sampling, emitted_tokens=len(emitted), choice=choice, domain=name
    )
    return answer


async def assert_resumes_everywhere(tokenizer, hands, prompt, peers, sampling, *, choice=0) -> Whole:
    """Run it whole on the first worker, and from each token on on the second one."""
    first, second = hands
    answer = await (await run(first, prompt, peers, sampling, name="whole", choice=choice)).ended()
    whole = Whole(first, "whole", choice, answer)
    count = len(whole.token_ids)
    before = texts_before(tokenizer, prompt, sampling, whole)
    answers = [
        await run(second, prompt, peers, sampling, name=f"r{k}", emitted=whole.token_ids[:k], choice=choice)
        for k in range(count + 1)
    ]
    for k, answer in enumerate(answers):
        await answer.ended()
        resumed = Whole(second, f"r{k}", choice, answer)
        assert resumed.token_ids == whole.token_ids, k
        assert before[k] + resumed.text == whole.text, k
        assert resumed.logprobs == whole.logprobs[k:], k
        assert resumed.num_prompt_scores == (0 if k else whole.num_prompt_scores), k
        assert (resumed.end.reason, resumed.end.shown_tokens) == (whole.end.reason, whole.end.shown_tokens), k
        usage = resumed.end.usage
        assert (usage.prompt_tokens, usage.completion_tokens) == (PROMPT_TOKENS, count), k
        assert usage.cached_tokens <= PROMPT_TOKENS, k
    return whole


@pytest.fixture
async def workers(start_worker):
    return [await start_worker(Role.DECODE) for _ in range(2)], [await start_worker(Role.PREFILL)]


@pytest.fixture
def tokenizer(tiny_checkpoint):
    return Tokenizer.load(tiny_checkpoint)


@pytest.fixture
async def hands(workers, router_of):
    return [await router_of(worker) for worker in workers[0]]


@pytest.mark.parametrize("with_peer", [False, True])
@pytest.mark.parametrize("kind", KINDS)
async def test_it_goes_on_after_every_token(workers, hands, tokenizer, make_prompt, all_free, *, kind, with_peer):
    decode, prefill = workers
    whole = await assert_resumes_everywhere(
        tokenizer, hands, make_prompt(PROMPT_TOKENS), prefill if with_peer else [], KINDS[kind]
    )
    assert whole.end.reason == (STOP if kind == "min_tokens" else LENGTH)
    assert len(whole.token_ids) == (13 if kind == "min_tokens" else NUM_TOKENS)
    assert bool(whole.logprobs) == ("logprobs" in KINDS[kind])
    assert whole.num_prompt_scores == (PROMPT_TOKENS - 1 if kind == "prompt_logprobs" else 0)
    await all_free(*decode, *prefill)


@pytest.mark.parametrize("with_peer", [False, True])
async def test_each_choice_goes_on_with_its_own_randomness(workers, hands, tokenizer, make_prompt, with_peer):
    peers = workers[1] if with_peer else []
    texts = set()
    for choice in range(3):
        whole = await assert_resumes_everywhere(
            tokenizer, hands, make_prompt(PROMPT_TOKENS), peers, SAMPLED, choice=choice
        )
        texts.add(whole.text)
        for hand in hands:
            hand.messages.clear()
            hand.answers.clear()
    assert len(texts) == 3


@pytest.mark.parametrize("with_peer", [False, True])
@pytest.mark.parametrize("place", [1, 6, 11])
@pytest.mark.parametrize("include", [False, True])
async def test_a_stop_string_is_found_across_the_places(
    workers, hands, tokenizer, make_prompt, *, place, include, with_peer
):
    peers = workers[1] if with_peer else []
    prompt = make_prompt(PROMPT_TOKENS)
    plain = await (await run(hands[0], prompt, peers, SAMPLED, name="plain")).ended()
    stop = plain.text[place : place + 3]
    never = plain.text[place - 1 : place + 2] + "never"  # its beginning is withheld, and then not
    sampling = {**SAMPLED, "stop": [never, stop], "include_stop_str_in_output": include, "logprobs": 0}
    whole = await assert_resumes_everywhere(tokenizer, hands, prompt, peers, sampling)
    assert whole.end.reason == STOP
    end = plain.text.index(stop) + (len(stop) if include else 0)
    assert whole.text == plain.text[:end]


@pytest.mark.parametrize("with_peer", [False, True])
async def test_a_context_that_is_full_after_its_last_token_ends_as_it_would_have(
    workers, hands, make_prompt, with_peer
):
    peers = workers[1] if with_peer else []
    prompt = make_prompt(2048 - 8)
    sampling = {**SAMPLED, "max_tokens": 8}
    whole = await (await run(hands[0], prompt, peers, sampling, name="whole")).ended()
    for k in range(9):
        resumed = await run(hands[1], prompt, peers, sampling, name=f"r{k}", emitted=whole.token_ids[:k])
        await resumed.ended()
        assert resumed.token_ids == whole.token_ids
        assert resumed.end.reason == LENGTH
        assert resumed.end.usage.completion_tokens == 8


async def test_an_order_after_the_end_of_its_choice_is_refused_typed(workers, hands, make_prompt):
    stopped = {**SAMPLED, "stop_token_ids": [7]}
    answer = await (await run(hands[0], make_prompt(PROMPT_TOKENS), [], stopped, name="r", emitted=[5, 7, 9])).ended()
    assert answer.end.error.code == "internal_error"


async def test_generated_tokens_do_not_count_as_cached_prompt(workers, hands, make_prompt):
    prompt = make_prompt(PROMPT_TOKENS)
    whole = await (await hands[0].submit("whole", prompt, sampling=PLAIN)).ended()
    resumed = hands[0].answers.setdefault(("again", 0), Answer())
    resumed.token_ids += whole.token_ids[:15]
    await hands[0].submit("again", prompt + whole.token_ids[:15], sampling=PLAIN, emitted_tokens=15)
    await resumed.ended()
    assert resumed.end.handover.tokens_held == 48
    assert resumed.end.usage.cached_tokens == PROMPT_TOKENS
