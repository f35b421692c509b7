"""Every sampling parameter through a real cluster: the official client, whole and streamed, and the SDK beside it."""

import re
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from twostroke import Client

MODEL = "twostroke-bundled"
PROMPT = "def add(a, b):\n    "
LONG = [5 + place * 7 % 900 for place in range(80)]  # several blocks, so that it is handed over
HELLO = [{"role": "user", "content": "What does os.path.join do?"}]


@pytest.fixture(scope="module")
def cluster(run_cluster) -> Iterator[Any]:
    """Every prompt that can be handed over is."""
    with run_cluster(
        cluster__launcher="inprocess",
        cluster__prefill=1,
        cluster__decode=1,
        step__num_threads=1,
        cache__tokens=16384,
        router__local_prefill=False,
    ) as running:
        yield running


@pytest.fixture(scope="module")
def client(cluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=cluster.url + "/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


@pytest.fixture(scope="module")
def sdk(cluster) -> Iterator[Client]:
    with Client(cluster.grpc, timeout_s=60) as made:
        yield made


def complete(client: openai.OpenAI, **fields: Any) -> Any:
    known = {"prompt", "max_tokens", "temperature", "seed", "n", "stop", "logprobs", "echo", "logit_bias", "stream"}
    given = {"model": MODEL, "prompt": PROMPT, "max_tokens": 12, "temperature": 0} | fields
    extra = {name: given.pop(name) for name in list(given) if name not in known | {"model"}}
    return client.completions.create(**given, extra_body=extra)


def text_of(client: openai.OpenAI, **fields: Any) -> str:
    return str(complete(client, **fields).choices[0].text)


# ---------------------------------------------------------------- logprobs


def test_a_chats_logprobs_spell_its_content_whole_and_streamed(client):
    asked: dict[str, Any] = {
        "model": MODEL,
        "messages": HELLO,
        "max_tokens": 14,
        "seed": 3,
        "logprobs": True,
        "top_logprobs": 3,
    }
    choice = client.chat.completions.create(**asked).choices[0]
    entries = choice.logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == choice.message.content
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob <= 0
        assert entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob >= entry.top_logprobs[2].logprob
        named = {top.token: top.logprob for top in entry.top_logprobs}
        assert named.get(entry.token, entry.logprob) == entry.logprob
    said, streamed = "", []
    for chunk in client.chat.completions.create(**asked, stream=True):
        (part,) = chunk.choices
        said += part.delta.content or ""
        streamed += part.logprobs.content if part.logprobs else []
        assert b"".join(bytes(entry.bytes) for entry in streamed).decode(errors="ignore") == said
    assert streamed == entries


def test_a_completions_logprobs_stand_where_their_text_stands(client):
    choice = complete(client, logprobs=2).choices[0]
    told = choice.logprobs
    assert "".join(told.tokens) == choice.text
    assert [choice.text[at : at + len(t)] for at, t in zip(told.text_offset, told.tokens, strict=True)] == told.tokens
    for token, logprob, top in zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True):
        assert max(top, key=top.get) == token  # greedy
        assert top[token] == logprob
        assert len(top) == 2
    parts = [c.choices[0].logprobs for c in complete(client, logprobs=2, stream=True) if c.choices[0].logprobs]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [one for part in parts for one in getattr(part, name)] == getattr(told, name)


def test_who_asks_for_none_gets_none(client):
    assert complete(client).choices[0].logprobs is None
    assert client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=2).choices[0].logprobs is None
    assert complete(client, logprobs=0).choices[0].logprobs.token_logprobs


def test_logprobs_of_what_a_stop_string_cut_off_are_never_shown(client):
    free = complete(client, max_tokens=24, logprobs=1).choices[0]
    for start in range(3, 14):
        stop = free.text[start : start + 4]
        text = free.text[: free.text.index(stop)]
        ends = [at + len(t) for at, t in zip(free.logprobs.text_offset, free.logprobs.tokens, strict=True)]
        count = sum(1 for at in free.logprobs.text_offset if at < len(text))
        whole = complete(client, max_tokens=24, logprobs=1, stop=stop).choices[0]
        assert whole.text == text
        assert whole.logprobs is None if count == 0 else whole.logprobs.tokens == free.logprobs.tokens[:count]
        said, shown = "", 0
        for chunk in complete(client, max_tokens=24, logprobs=1, stop=stop, stream=True):
            (part,) = chunk.choices
            said += part.text
            shown += len(part.logprobs.tokens) if part.logprobs else 0
            assert shown == 0 or ends[shown - 1] <= len(said) or shown == count
        assert (said, shown) == (text, count)


def test_prompt_logprobs_are_what_decoding_said_of_the_same_tokens(cluster, client, sdk):
    """Also where a prefill worker has computed them and the prompt was cached before."""
    said = sdk.generate(LONG, max_tokens=8, temperature=0, logprobs=2, ignore_eos=True).choices[0]
    prompt = [*LONG, *said.token_ids]
    answer = complete(client, prompt=prompt, max_tokens=1, prompt_logprobs=2, request_id="scored-1")
    told = answer.choices[0].prompt_logprobs
    assert told[0] is None
    assert len(told) == len(prompt)
    for token_id, one, entry in zip(said.token_ids, said.logprobs, told[len(LONG) :], strict=True):
        assert entry[str(token_id)]["logprob"] == one.logprob
        assert entry[str(token_id)]["rank"] == one.rank == 1
        assert {int(i) for i in entry} == {i for i, _ in one.top}
    explained = httpx.get(f"{cluster.url}/v1/requests/scored-1/explain").json()
    assert "offered" in explained["timeline"]  # a prefill worker computed it
    assert explained["tokens"]["cached"] == 0
    again = sdk.generate(prompt, max_tokens=1, prompt_logprobs=2, n=2, temperature=0)
    assert [one.token_id for one in again.prompt_logprobs] == prompt[1:]
    assert [one.logprob for one in again.prompt_logprobs[len(LONG) - 1 :]] == [one.logprob for one in said.logprobs]


def test_a_chats_prompt_logprobs_stand_beside_its_choices(client, sdk):
    asked = {"model": MODEL, "messages": HELLO, "max_tokens": 1}
    answer = client.chat.completions.create(**asked, extra_body={"prompt_logprobs": 0})
    assert answer.prompt_logprobs[0] is None
    assert len(answer.prompt_logprobs) == answer.usage.prompt_tokens
    scored = sdk.chat(HELLO, max_tokens=1, prompt_logprobs=0).prompt_logprobs
    assert [entry[str(one.token_id)]["logprob"] for entry, one in zip(answer.prompt_logprobs[1:], scored, strict=True)]


def test_echo_puts_the_prompt_and_its_logprobs_in_front(client):
    plain = complete(client, logprobs=1, n=2, seed=4, temperature=0.8)
    answer = complete(client, logprobs=1, n=2, seed=4, temperature=0.8, echo=True)
    for choice, bare in zip(answer.choices, plain.choices, strict=True):
        assert choice.text == PROMPT + bare.text
        told = choice.logprobs
        assert told.token_logprobs[0] is told.top_logprobs[0] is None
        assert "".join(told.tokens[: answer.usage.prompt_tokens]).endswith(PROMPT)
        assert told.tokens[answer.usage.prompt_tokens :] == bare.logprobs.tokens
        assert choice.text[told.text_offset[-1] :] == told.tokens[-1]
    assert text_of(client, prompt=LONG, echo=True).endswith(text_of(client, prompt=LONG))
    one = complete(client, logprobs=1, echo=True).choices[0]
    parts = [c.choices[0] for c in complete(client, logprobs=1, echo=True, stream=True)]
    assert "".join(part.text for part in parts) == one.text
    assert [t for part in parts if part.logprobs for t in part.logprobs.text_offset] == one.logprobs.text_offset


def test_choices_have_their_own_logprobs_and_seed(client, sdk):
    asked = {"n": 3, "seed": 7, "temperature": 1.0, "max_tokens": 10}
    answer = complete(client, logprobs=1, **asked)
    assert ["".join(c.logprobs.tokens) for c in answer.choices] == [c.text for c in answer.choices]
    assert len({c.text for c in answer.choices}) == 3
    said = sdk.generate(PROMPT, logprobs=1, **asked)
    assert [c.text for c in said.choices] == [c.text for c in answer.choices]
    assert said.usage.completion_tokens == sum(len(c.token_ids) for c in said.choices) == answer.usage.completion_tokens


# ---------------------------------------------------------------- what changes the text


def test_a_bias_forces_and_forbids(client, sdk):
    free = sdk.generate(PROMPT, max_tokens=6, temperature=0).choices[0].token_ids
    held = sdk.generate(PROMPT, max_tokens=6, temperature=0, logit_bias={free[0]: -100}).choices[0].token_ids
    assert free[0] not in held
    forced = sdk.generate(PROMPT, max_tokens=4, temperature=1, logit_bias={77: 100}, ignore_eos=True)
    assert forced.choices[0].token_ids == (77,) * 4
    assert text_of(client, max_tokens=4, logit_bias={"77": 100}, ignore_eos=True) == forced.text


def test_bad_words_are_not_said_with_or_without_a_space(client, sdk):
    def says(ids: tuple[int, ...], word: str) -> bool:
        """Whether the tokens of a word stand in a text's; other tokens may spell it still."""
        num_special = len(sdk.tokenize("0").ids) - 1
        text = "," + ",".join(map(str, ids)) + ","
        return any(f",{','.join(map(str, sdk.tokenize(w).ids[num_special:]))}," in text for w in (word, " " + word))

    asked: dict[str, Any] = {"max_tokens": 24, "temperature": 0, "ignore_eos": True}
    free = sdk.generate(PROMPT, **asked).choices[0]
    words = [word for word in dict.fromkeys(re.findall("[a-z]+", free.text)) if says(free.token_ids, word)]
    assert len(words) > 1
    for word in words[:3]:
        held = sdk.generate(PROMPT, **asked, bad_words=[word]).choices[0]
        assert not says(held.token_ids, word)
        assert text_of(client, **asked, bad_words=[word]) == held.text


def test_penalties_make_a_text_that_repeats_less(client, sdk):
    def variety(**fields: Any) -> int:
        asked: dict[str, Any] = {"max_tokens": 30, "temperature": 0, "ignore_eos": True} | fields
        said = sdk.generate("a a a a a a a a", **asked).choices[0]
        assert said.text == text_of(client, prompt="a a a a a a a a", **asked)
        return len(set(said.token_ids))

    free = variety()
    for penalty in ({"repetition_penalty": 1.8}, {"frequency_penalty": 2.0}, {"presence_penalty": 2.0}):
        assert variety(**penalty) > free


def test_min_p_of_one_leaves_the_likeliest_alone(client, sdk):
    """And its equals: bfloat16 logits have some."""
    asked: dict[str, Any] = {"max_tokens": 12, "temperature": 1.5, "seed": 3, "ignore_eos": True, "logprobs": 1}
    said = sdk.generate(PROMPT, min_p=1.0, **asked).choices[0]
    assert all(one.logprob == one.top[0][1] for one in said.logprobs)
    assert text_of(client, min_p=1.0, **asked) == said.text != text_of(client, **asked)


def test_min_tokens_holds_stop_strings_back_and_an_included_one_stays(client):
    free = complete(client, max_tokens=24, logprobs=0).choices[0]
    stop = free.text[2:4]
    assert text_of(client, max_tokens=24, stop=stop) == free.text[:2]
    assert text_of(client, max_tokens=24, stop=stop, include_stop_str_in_output=True) == free.text[:4]
    held = complete(client, max_tokens=24, stop=stop, min_tokens=6)
    begun = sum(map(len, free.logprobs.tokens[:6]))
    place = free.text.find(stop, begun - len(stop) + 1)
    assert held.choices[0].text == (free.text if place < 0 else free.text[:place])
    assert held.usage.completion_tokens > 6


def test_the_sdk_says_what_http_says(client, sdk):
    asked: dict[str, Any] = {
        "max_tokens": 16,
        "temperature": 0.9,
        "seed": 21,
        "top_p": 0.95,
        "min_p": 0.01,
        "repetition_penalty": 1.1,
        "frequency_penalty": 0.3,
        "presence_penalty": 0.2,
        "bad_words": ["return"],
        "logprobs": 2,
    }
    over_http = complete(client, **asked, logit_bias={"40": 1.5}).choices[0]
    said = sdk.generate(PROMPT, **asked, logit_bias={40: 1.5}).choices[0]
    assert (said.text, str(said.finish_reason)) == (over_http.text, over_http.finish_reason)
    assert tuple(one.token_id for one in said.logprobs) == said.token_ids
    shown = over_http.logprobs.token_logprobs
    assert [one.logprob for one in said.logprobs][: len(shown)] == shown
    chunks = list(sdk.generate_stream(PROMPT, **asked, logit_bias={40: 1.5}))
    assert tuple(one for chunk in chunks for one in chunk.logprobs) == said.logprobs
