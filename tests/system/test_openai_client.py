"""The official client against a real cluster: whatever it can read of chats, completions, streams and errors."""

import json
import re
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from twostroke import Client

MODEL = "twostroke-bundled"
HELLO = [{"role": "user", "content": "What does os.path.join do?"}]
PROMPT = "def add(a, b):\n    "
USAGE = {"include_usage": True}


@pytest.fixture(scope="module")
def client(cluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=cluster.url + "/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


def texts(chunks: list[Any], num_choices: int) -> list[str]:
    found = [""] * num_choices
    for chunk in chunks:
        for choice in chunk.choices:
            found[choice.index] += choice.text if hasattr(choice, "text") else (choice.delta.content or "")
    return found


def reasons(chunks: list[Any]) -> dict[int, str]:
    ends = [(c.index, c.finish_reason) for chunk in chunks for c in chunk.choices if c.finish_reason]
    assert len(ends) == len(dict(ends)), "a choice ended twice"
    return dict(ends)


def test_models(client):
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id).id == MODEL == model.id
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")


def test_a_chat_whole_and_streamed_say_the_same(client):
    asked: dict[str, Any] = {"model": MODEL, "messages": HELLO, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options=USAGE))
    assert whole.object == "chat.completion"
    assert whole.choices[0].message.role == "assistant"
    assert texts(chunks, 1) == [whole.choices[0].message.content]
    assert reasons(chunks) == {0: whole.choices[0].finish_reason}
    assert chunks[0].choices[0].delta.role == "assistant"
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    usage = chunks[-1].usage
    assert chunks[-1].choices == []
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, whole.usage.completion_tokens)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_three_choices_differ_and_each_streams_like_it_is_whole(client):
    asked: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "n": 3, "seed": 7, "max_tokens": 10, "temperature": 1.0}
    whole = client.completions.create(**asked)
    chunks = list(client.completions.create(**asked, stream=True, stream_options=USAGE))
    expected = [choice.text for choice in sorted(whole.choices, key=lambda c: c.index)]
    assert texts(chunks, 3) == expected
    assert len(set(expected)) == 3
    assert reasons(chunks) == {choice.index: choice.finish_reason for choice in whole.choices}
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens <= 30


def test_without_the_option_no_usage_comes(client):
    chunks = list(client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=3, stream=True))
    assert all(chunk.choices for chunk in chunks)
    assert all(chunk.usage is None for chunk in chunks)


def test_a_seed_makes_a_sampled_text_again_and_none_does_not(client):
    def say(**fields: Any) -> str:
        asked = {"model": MODEL, "prompt": PROMPT, "max_tokens": 12, "temperature": 1.0, **fields}
        return client.completions.create(**asked).choices[0].text

    assert say(seed=5) == say(seed=5) != say(seed=6)
    assert len({say() for _ in range(4)}) > 1


def test_a_stop_string_ends_the_text_before_it_wherever_tokens_part(client):
    asked: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 24, "temperature": 0}
    free = client.completions.create(**asked).choices[0].text
    assert len(free) > 12
    for start in range(3, min(len(free) - 4, 15), 2):
        stop = free[start : start + 4]
        want = free[: free.index(stop)]
        whole = client.completions.create(**asked, stop=stop)
        chunks = list(client.completions.create(**asked, stop=[stop, "\0never"], stream=True))
        assert (whole.choices[0].text, whole.choices[0].finish_reason) == (want, "stop")
        assert (texts(chunks, 1), reasons(chunks)) == ([want], {0: "stop"})


def test_a_prompt_in_a_list_of_one_and_token_ids_are_taken(client):
    asked: dict[str, Any] = {"model": MODEL, "max_tokens": 4, "temperature": 0}
    plain = client.completions.create(**asked, prompt=PROMPT).choices[0].text
    assert client.completions.create(**asked, prompt=[PROMPT]).choices[0].text == plain
    assert client.completions.create(**asked, prompt=[[5, 6, 7]]).choices[0].text == (
        client.completions.create(**asked, prompt=[5, 6, 7]).choices[0].text
    )


def test_who_says_no_max_tokens_gets_what_fits(client):
    answer = client.completions.create(model=MODEL, prompt=[5] * 4092, temperature=0, extra_body={"ignore_eos": True})
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (4, "length")


def test_routing_knows_how_fast_kv_travels(cluster, client):
    """After a hand-over of more than a few blocks: measured, and not the default."""
    prompt = [5 + place * 7 % 900 for place in range(1500)]
    answer = client.completions.create(model=MODEL, prompt=prompt, max_tokens=2)
    explained = httpx.get(f"{cluster.url}/v1/requests/{answer.id}/explain").json()
    assert explained["kv_bytes_moved"] > 64 << 10
    end_s = time.monotonic() + 5
    while time.monotonic() < end_s:
        workers = httpx.get(cluster.url + "/v1/cluster").json()["workers"]
        if all(w["coefficients"]["handover_bytes_per_s"] != 5e8 for w in workers):
            return
        time.sleep(0.1)
    raise AssertionError([w["coefficients"] for w in workers])


def test_every_answer_has_an_id_that_explain_knows(cluster, client):
    raw = client.completions.with_raw_response.create(model=MODEL, prompt="x", max_tokens=1)
    assert raw.headers["x-request-id"] == raw.parse().id
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="x", temperature=-1)
    assert re.fullmatch(r"cmpl-[0-9a-f]{24}", caught.value.request_id or "")
    named = {"model": MODEL, "prompt": "x", "temperature": -1, "request_id": "mine-1"}
    assert httpx.post(cluster.url + "/v1/completions", json=named).headers["x-request-id"] == "mine-1"
    evil = named | {"request_id": "a\r\nset-cookie: b"}
    reply = httpx.post(cluster.url + "/v1/completions", json=evil)
    assert reply.status_code == 400
    assert reply.headers["x-request-id"].startswith("req-")
    assert "set-cookie" not in reply.headers
    for path in ("/v1/nothing", "/v1/completions", "/v1/models/none", "/health"):
        assert httpx.get(cluster.url + path).headers["x-request-id"].startswith("req-")


def test_the_classes_of_errors(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="x", best_of=3)
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "best_of")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt=[5] * 5000)
    assert caught.value.code == "context_length_exceeded"


def test_an_error_within_a_stream_reaches_the_client_as_one(cluster, client):
    stream = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=3000, stream=True, extra_body={"ignore_eos": True}
    )
    request_id = next(iter(stream)).id
    with Client(cluster.grpc) as sdk:
        assert sdk.abort(request_id)
    with pytest.raises(openai.APIError, match="aborted"):
        for _ in stream:
            pass
    assert state_of(cluster, request_id) == "cancelled"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_early_frees_everything(cluster, stream):
    """It goes before any piece, and in the midst of them."""
    host, port = cluster.url.removeprefix("http://").split(":")
    for pause_s in (0.0, 0.005, 0.05, 0.5):
        name = f"gone-{stream}-{pause_s}"
        body = {"prompt": PROMPT * 30, "max_tokens": 2000, "stream": stream, "ignore_eos": True, "request_id": name}
        data = json.dumps(body).encode()
        with socket.create_connection((host, int(port))) as connection:
            head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n\r\n"
            connection.sendall(head.encode() + data)
            time.sleep(pause_s)
    assert_idle(cluster)


def test_a_client_that_leaves_while_it_sends_its_body_is_nobodys_error(cluster, caplog):
    host, port = cluster.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        time.sleep(0.2)
    time.sleep(0.3)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def state_of(cluster: Any, request_id: str) -> str:
    end_s = time.monotonic() + 5
    while True:
        state = httpx.get(f"{cluster.url}/v1/requests/{request_id}/explain").json().get("state", "")
        if state != "running" or time.monotonic() > end_s:
            return state
        time.sleep(0.05)


def assert_idle(cluster: Any, timeout_s: float = 5.0) -> None:
    end_s = time.monotonic() + timeout_s
    while True:
        seen = httpx.get(cluster.url + "/v1/cluster").json()
        loads = [worker["load"] | worker["blocks"] for worker in seen["workers"]]
        busy = [x for x in loads if x["running"] or x["waiting"] or x["promised"] or x["free"] != x["total"]]
        if not busy and not seen["router"]["in_flight_requests"]:
            return
        assert time.monotonic() < end_s, (busy, seen["router"])
        time.sleep(0.05)
