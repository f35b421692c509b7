"""What clients send beyond the plainest body, against a real cluster: each means here what it means elsewhere."""

import itertools
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from twostroke import Client

MODEL = "twostroke-bundled"
PROMPTS = ["def add(a, b):\n    ", "import os\n", "class Tree:\n"]
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 6}
USAGE = {"include_usage": True}


@pytest.fixture(scope="module")
def client(cluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=cluster.url + "/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


def post(cluster: Any, path: str = "/v1/completions", **body: Any) -> httpx.Response:
    return httpx.post(cluster.url + path, json=GREEDY | body, timeout=60)


def events(cluster: Any, path: str = "/v1/completions", **body: Any) -> list[dict[str, Any]]:
    reply = post(cluster, path, stream=True, **body)
    assert reply.status_code == 200, reply.text
    lines = [line.removeprefix("data: ") for line in reply.text.split("\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def explain(cluster: Any, request_id: str) -> dict[str, Any]:
    return httpx.get(f"{cluster.url}/v1/requests/{request_id}/explain").json()


# ---------------------------------------------------------------- lists of prompts


def test_a_list_of_prompts_answers_like_each_of_them(client):
    asked = GREEDY | {"n": 2, "seed": 3, "temperature": 1.0, "logprobs": 1, "echo": True}
    alone = [client.completions.create(**asked, prompt=prompt) for prompt in PROMPTS]
    together = client.completions.create(**asked, prompt=PROMPTS)
    expected = [choice for answer in alone for choice in answer.choices]
    assert [choice.index for choice in together.choices] == list(range(6))
    assert [choice.text for choice in together.choices] == [choice.text for choice in expected]
    assert [choice.finish_reason for choice in together.choices] == [choice.finish_reason for choice in expected]
    assert [c.logprobs.tokens for c in together.choices] == [c.logprobs.tokens for c in expected]
    assert [c.logprobs.token_logprobs[1] for c in together.choices] == pytest.approx(
        [c.logprobs.token_logprobs[1] for c in expected]
    )
    assert together.usage.prompt_tokens == sum(answer.usage.prompt_tokens for answer in alone)
    assert together.usage.completion_tokens == sum(answer.usage.completion_tokens for answer in alone)


def test_a_streamed_list_says_the_same_and_counts_once(client):
    asked = GREEDY | {"prompt": PROMPTS, "n": 2, "seed": 3, "temperature": 1.0}
    whole = client.completions.create(**asked)
    chunks = list(client.completions.create(**asked, stream=True, stream_options=USAGE))
    texts = [""] * 6
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]
    ends = [choice.index for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert sorted(ends) == list(range(6))
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert (chunks[-1].choices, chunks[-1].usage.total_tokens) == ([], whole.usage.total_tokens)


def test_token_ids_come_in_lists_too(client):
    lists = [[5, 6, 7], [8, 9], [5, 6, 7]]
    whole = client.completions.create(**GREEDY, prompt=lists, extra_body={"return_token_ids": True})
    alone = client.completions.create(**GREEDY, prompt=[5, 6, 7])
    assert [choice.text for choice in whole.choices][0::2] == [alone.choices[0].text] * 2
    assert [choice.prompt_token_ids for choice in whole.choices] == lists
    assert client.completions.create(**GREEDY, prompt=[[5, 6, 7]]).choices[0].text == alone.choices[0].text
    told = {"return_token_ids": True}
    told_of: dict[int, Any] = {}
    for chunk in client.completions.create(**GREEDY, prompt=lists, stream=True, extra_body=told):
        for choice in chunk.choices:
            if (ids := getattr(choice, "prompt_token_ids", None)) is not None:
                told_of[choice.index] = ids
    assert told_of == dict(enumerate(lists))


def test_usage_so_far_counts_every_prompt_of_a_list(cluster):
    lists = [[5, 6, 7], [8, 9]]
    options = USAGE | {"continuous_usage_stats": True}
    *chunks, last = events(cluster, prompt=lists, stream_options=options)
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {5} == {last["usage"]["prompt_tokens"]}


def test_only_a_chats_first_chunk_has_the_role(cluster):
    body = {"messages": [{"role": "user", "content": "x"}], "n": 2, "ignore_eos": True}
    chunks = events(cluster, "/v1/chat/completions", **body)
    for index in range(2):
        deltas = [c["choices"][0]["delta"] for c in chunks if c["choices"][0]["index"] == index]
        assert [delta.get("role") for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
        assert len(deltas) > 1


def test_an_echo_with_more_prompt_logprobs_than_logprobs_gives_both(cluster):
    (choice,) = post(cluster, prompt="def add", echo=True, logprobs=1, prompt_logprobs=3).json()["choices"]
    assert len(choice["prompt_logprobs"][1]) in (3, 4)
    assert len(choice["logprobs"]["top_logprobs"][1]) in (1, 2)


def test_every_prompt_of_a_list_is_explained(cluster, client):
    answer = client.completions.create(**GREEDY, prompt=PROMPTS, extra_body={"request_id": "many"})
    assert answer.id == "many"
    assert explain(cluster, "many-2")["tokens"]["prompt"] > 0
    known = explain(cluster, "many")
    assert (known["state"], known["num_prompts"]) == ("finished", 3)
    assert [one["request_id"] for one in known["prompts"]] == ["many-0", "many-1", "many-2"]


def test_a_bad_prompt_of_a_list_is_named_and_nothing_runs(cluster):
    before = httpx.get(cluster.url + "/v1/cluster").json()["counters"]["offered"]
    reply = post(cluster, prompt=["x", [1, 99_999_999], "y"], stream=True)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "prompt")
    assert "prompt 1 of 3: prompt[1] is 99999999" in reply.json()["error"]["message"]
    assert httpx.get(cluster.url + "/v1/cluster").json()["counters"]["offered"] == before


def test_aborting_a_list_ends_all_of_it(cluster, client):
    stream = client.completions.create(
        model=MODEL, prompt=PROMPTS, max_tokens=3000, stream=True, extra_body={"ignore_eos": True}
    )
    name = next(iter(stream)).id
    with Client(cluster.grpc) as sdk:
        assert sdk.abort(name)
        with pytest.raises(openai.APIError, match="aborted"):
            for _ in stream:
                pass
        assert not sdk.abort(name)
    assert {one["state"] for one in explain(cluster, name)["prompts"]} == {"cancelled"}


def test_who_leaves_a_list_leaves_all_of_it(cluster, client):
    asked: dict[str, Any] = {"model": MODEL, "prompt": PROMPTS, "max_tokens": 3000, "stream": True}
    with client.completions.create(**asked, extra_body={"ignore_eos": True}) as stream:
        name = next(iter(stream)).id
    end_s = time.monotonic() + 10
    while {one["state"] for one in explain(cluster, name)["prompts"]} != {"cancelled"}:
        assert time.monotonic() < end_s, explain(cluster, name)
        time.sleep(0.05)


# ---------------------------------------------------------------- prompts that are only scored


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_is_scored_without_an_answer(cluster, stream: bool):
    """What evaluations send: the prompt's own logprobs, for several prompts at once."""
    asked: dict[str, Any] = {"prompt": PROMPTS[:2], "echo": True, "logprobs": 1}
    longer = post(cluster, **asked, max_tokens=2).json()["choices"]
    if stream:
        *chunks, last = events(cluster, **asked, max_tokens=0, stream_options=USAGE)
        choices = [{}, {}]
        for chunk in chunks:
            (choice,) = chunk["choices"]
            told = {name: value for name, value in choice.items() if value not in (None, "")}
            assert "text" not in told or "text" not in choices[choice["index"]], "the prompt came twice"
            choices[choice["index"]] |= told
        usage = last["usage"]
    else:
        answer = post(cluster, **asked, max_tokens=0).json()
        choices, usage = answer["choices"], answer["usage"]
    assert [choice["text"] for choice in choices] == PROMPTS[:2]
    assert [choice["finish_reason"] for choice in choices] == ["length", "length"]
    assert usage["completion_tokens"] == 0
    assert usage["total_tokens"] == usage["prompt_tokens"]
    for choice, other in zip(choices, longer, strict=True):
        told = choice["logprobs"]
        assert told["token_logprobs"][0] is None
        assert len(told["tokens"]) == len(other["logprobs"]["tokens"]) - 2
        assert told["token_logprobs"][1:] == pytest.approx(other["logprobs"]["token_logprobs"][1:-2])
        assert "".join(told["tokens"][1:]) == choice["text"]  # the first one is the beginning-of-text token


# ---------------------------------------------------------------- counts and ids beside the text


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_usage_so_far_is_in_every_chunk(cluster, path: str):
    body = {"prompt": PROMPTS[0]} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "x"}]}
    (answer,) = post(cluster, path, **body, ignore_eos=True).json()["choices"]
    text = answer.get("text") or answer["message"]["content"]
    body |= {"stop": [text[:3] + "\0never"], "return_token_ids": True}  # so that tokens come without their text
    options = USAGE | {"continuous_usage_stats": True, "include_obfuscation": False}
    *chunks, last = events(cluster, path, **body, stream_options=options, ignore_eos=True)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == list(itertools.accumulate(len(chunk["choices"][0]["token_ids"]) for chunk in chunks))
    assert counts[-1] == last["usage"]["completion_tokens"] == 6
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {last["usage"]["prompt_tokens"]}
    assert all(u["total_tokens"] == u["prompt_tokens"] + u["completion_tokens"] for u in (c["usage"] for c in chunks))
    without = events(cluster, path, **body, stream_options={"continuous_usage_stats": True})
    assert all("usage" not in chunk for chunk in without)


def test_token_ids_are_returned_whole_and_in_chunks(cluster):
    with Client(cluster.grpc) as sdk:
        prompt_ids = list(sdk.tokenize(PROMPTS[0]).ids)
        answer_ids = list(sdk.generate(PROMPTS[0], max_tokens=6, temperature=0).choices[0].token_ids)
    (whole,) = post(cluster, prompt=PROMPTS[0], return_token_ids=True).json()["choices"]
    assert (whole["prompt_token_ids"], whole["token_ids"]) == (prompt_ids, answer_ids)
    chunks = [chunk["choices"][0] for chunk in events(cluster, prompt=PROMPTS[0], return_token_ids=True)]
    assert [chunk.get("prompt_token_ids") for chunk in chunks] == [prompt_ids] + [None] * (len(chunks) - 1)
    assert [one for chunk in chunks for one in chunk["token_ids"]] == answer_ids
    (plain,) = post(cluster, prompt=PROMPTS[0]).json()["choices"]
    assert "token_ids" not in plain


def test_a_chats_token_ids_stand_where_vllm_has_them(cluster):
    messages = [{"role": "user", "content": "What does os.path.join do?"}]
    asked: dict[str, Any] = {"messages": messages, "return_token_ids": True}
    whole = post(cluster, "/v1/chat/completions", **asked).json()
    assert len(whole["prompt_token_ids"]) == whole["usage"]["prompt_tokens"]
    assert len(whole["choices"][0]["token_ids"]) == whole["usage"]["completion_tokens"]
    chunks = events(cluster, "/v1/chat/completions", **asked)
    assert chunks[0]["prompt_token_ids"] == whole["prompt_token_ids"]
    assert [one for chunk in chunks for one in chunk["choices"][0]["token_ids"]] == whole["choices"][0]["token_ids"]


def test_logprobs_can_name_tokens_by_id(cluster):
    asked: dict[str, Any] = {"prompt": PROMPTS[0], "return_token_ids": True, "logprobs": 2}
    (plain,) = post(cluster, **asked).json()["choices"]
    (named,) = post(cluster, **asked, return_tokens_as_token_ids=True).json()["choices"]
    assert named["logprobs"]["tokens"] == [f"token_id:{one}" for one in named["token_ids"]]
    assert all(key.startswith("token_id:") for top in named["logprobs"]["top_logprobs"] for key in top)
    assert named["logprobs"]["text_offset"] == plain["logprobs"]["text_offset"]
    chat = {"messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 1}
    reply = post(cluster, "/v1/chat/completions", **chat, return_token_ids=True, return_tokens_as_token_ids=True)
    (choice,) = reply.json()["choices"]
    assert [one["token"] for one in choice["logprobs"]["content"]] == [f"token_id:{i}" for i in choice["token_ids"]]


# ---------------------------------------------------------------- values


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 6.0, "n": 1.0},
        {"max_tokens": None, "max_completion_tokens": 6},
        {"n": None, "stop": None, "logit_bias": None, "stream_options": None, "seed": None, "user": None},
        {"stop": [], "stop_token_ids": [], "bad_words": [], "logit_bias": {}},
        {"top_k": 10**9, "temperature": 0},
        {"top_k": -1},
        {"top_k": 0},
        {"top_p": 0, "temperature": 1},
        {"top_p": 1},
        {"best_of": 1, "tools": [], "tool_choice": "none", "suffix": "", "use_beam_search": False},
        {"seed": 2**64 - 1},
        {"seed": -1},
        {"logprobs": False},
    ],
    ids=str,
)
def test_ways_to_say_the_usual_thing(cluster, fields: dict[str, Any]):
    usual = post(cluster, prompt=PROMPTS[0]).json()["choices"]
    reply = post(cluster, prompt=PROMPTS[0], **fields)
    assert reply.status_code == 200, reply.text
    assert reply.json()["choices"] == usual
    assert "x-twostroke-ignored" not in reply.headers


@pytest.mark.parametrize(("said", "meant"), [(-1, 4093), (None, 16)])
def test_minus_one_is_until_the_context_is_full_and_null_is_openais_sixteen(cluster, client, said, meant):
    asked: dict[str, Any] = {"model": MODEL, "prompt": [5, 6, 7], "stream": True, "extra_body": {"ignore_eos": True}}
    with client.completions.create(**asked, max_tokens=said) as stream:
        name = next(iter(stream)).id
        assert explain(cluster, name)["sampling"]["max_tokens"] == meant


def test_true_asks_a_completion_for_the_likeliest_beside_each_token(cluster):
    (choice,) = post(cluster, prompt=PROMPTS[0], logprobs=True).json()["choices"]
    assert len(choice["logprobs"]["top_logprobs"]) == 6


# ---------------------------------------------------------------- unknown fields


def test_unknown_fields_are_ignored_named_and_counted(cluster):
    def count() -> float:
        text = httpx.get(cluster.url + "/metrics").text
        return float(text.split("\ntwostroke_ignored_fields_total ")[1].split()[0])

    before = count()
    odd = {"max_token": 1, "stream_options": {"colour": 1}, "a\r\nset-cookie: b": 1, "größe": 2, "x" * 100: 3}
    reply = post(cluster, prompt=PROMPTS[0], **odd)
    assert reply.json()["usage"]["completion_tokens"] == 6
    named = reply.headers["x-twostroke-ignored"].split(", ")
    assert named == ["max_token", "a??set-cookie??b", "gr??e", "x" * 64, "stream_options.colour"]
    assert count() == before + 5
    many = {f"field{place}": 1 for place in range(10_000)}
    reply = post(cluster, prompt=PROMPTS[0], **many)
    assert reply.headers["x-twostroke-ignored"].endswith("field15, 9984 more")
    refused = post(cluster, prompt=PROMPTS[0], max_token=1, temperature=-1)
    assert (refused.status_code, refused.headers["x-twostroke-ignored"]) == (400, "max_token")


# ---------------------------------------------------------------- salts


def test_prefixes_are_shared_among_equal_salts_only(cluster):
    prompt = [7 + place * 11 % 800 for place in range(320)]

    def cached(**fields: Any) -> int:
        return post(cluster, prompt=prompt, **fields).json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert cached(cache_salt="first") == 0
    assert cached(cache_salt="second") == 0
    assert cached() == 0
    assert cached(cache_salt="first") > 0
    assert cached() > 0


def test_who_salts_a_request_still_explains_and_aborts_it(cluster, client):
    stream = client.completions.create(
        model=MODEL, prompt="x", max_tokens=3000, stream=True, extra_body={"cache_salt": "s", "ignore_eos": True}
    )
    name = next(iter(stream)).id
    seen = explain(cluster, name)
    assert (seen["tenant"], seen["state"]) == ("public", "running")
    assert seen["isolation_domain"].startswith("public/salt-")
    with Client(cluster.grpc) as sdk:
        assert sdk.abort(name)
    with pytest.raises(openai.APIError):
        list(stream)


# ---------------------------------------------------------------- the wire


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_is_one_line_for_every_reader(cluster, stream: bool):
    odd = "a\u2028b\u2029c\x85d\x0be\x1cf"
    reply = post(cluster, prompt=odd, echo=True, max_tokens=1, stream=stream)
    lines = [line.removeprefix("data: ") for line in reply.text.splitlines() if line not in ("", "data: [DONE]")]
    answers = [json.loads(line) for line in lines]
    assert answers[0]["choices"][0]["text"].startswith(odd)
    assert len(answers) == 1 or stream


def test_a_slash_too_many_means_nothing(cluster):
    assert httpx.get(cluster.url + "/v1/models/").json()["object"] == "list"
    assert httpx.get(cluster.url + f"/v1//models/{MODEL}/").json()["id"] == MODEL
    body = {"messages": [{"role": "user", "content": "x"}]}
    for path in ("/v1/chat/completions/", "/v1//chat/completions"):
        assert post(cluster, path, **body).status_code == 200
    assert httpx.get(cluster.url + "/ping").status_code == httpx.head(cluster.url + "/health").status_code == 200
