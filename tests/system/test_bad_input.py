"""Hostile and mistaken requests over both faces: the documented status, field and remedy; the workers never notice."""

import json
from typing import Any

import grpc
import httpx
import openai
import pytest

from twostroke import Client, TwostrokeError
from twostroke.client.status import from_rpc_error
from twostroke.protos import common_pb2, inference_pb2, inference_pb2_grpc

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]
CALLING = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}

# path, body, status, code, param
BAD_BODIES: list[tuple[str, Any, int, str, str | None]] = [
    (CHAT, b"", 400, "invalid_value", None),
    (CHAT, b"not json", 400, "invalid_value", None),
    (CHAT, b'{"messages": "\xff\xfe"}', 400, "invalid_value", None),
    (CHAT, b"[" * 50_000 + b"]" * 50_000, 400, "invalid_value", None),
    (CHAT, b'{"messages": [], "temperature": NaN}', 400, "invalid_value", None),
    (CHAT, {}, 400, "invalid_value", "messages"),
    (CHAT, {"messages": []}, 400, "invalid_value", "messages"),
    (CHAT, {"messages": "hello"}, 400, "invalid_value", "messages"),
    (CHAT, {"messages": ["hello"]}, 400, "invalid_value", "messages"),
    (CHAT, {"messages": [{"role": "wizard", "content": "x"}]}, 400, "invalid_value", "messages[0].role"),
    (CHAT, {"messages": [{"role": "user"}]}, 400, "invalid_value", "messages[0].content"),
    (CHAT, {"messages": [{"role": "user", "content": 7}]}, 400, "invalid_value", "messages[0].content"),
    (CHAT, {"messages": HELLO, "model": "gpt-9"}, 404, "model_not_found", "model"),
    (CHAT, {"messages": HELLO, "n": 10**9}, 400, "invalid_value", "n"),
    (CHAT, {"messages": HELLO, "n": 0}, 400, "invalid_value", "n"),
    (CHAT, {"messages": HELLO, "temperature": -1}, 400, "invalid_value", "temperature"),
    (
        CHAT,
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}',
        400,
        "invalid_value",
        "temperature",
    ),
    (CHAT, {"messages": HELLO, "temperature": "hot"}, 400, "invalid_value", "temperature"),
    (CHAT, {"messages": HELLO, "temperature": True}, 400, "invalid_value", "temperature"),
    (CHAT, {"messages": HELLO, "top_p": -0.1}, 400, "invalid_value", "top_p"),
    (CHAT, {"messages": HELLO, "top_p": 1.5}, 400, "invalid_value", "top_p"),
    (CHAT, {"messages": HELLO, "top_k": -2}, 400, "invalid_value", "top_k"),
    (CHAT, {"messages": HELLO, "max_tokens": 0}, 400, "invalid_value", "max_tokens"),
    (CHAT, {"messages": HELLO, "max_tokens": 1.5}, 400, "invalid_value", "max_tokens"),
    (CHAT, {"messages": HELLO, "max_tokens": 10**7}, 400, "context_length_exceeded", "max_tokens"),
    (CHAT, {"messages": HELLO, "seed": 2**80}, 400, "invalid_value", "seed"),
    (CHAT, {"messages": HELLO, "stop": [""]}, 400, "invalid_value", "stop"),
    (CHAT, {"messages": HELLO, "stop": ["x"] * 99}, 400, "invalid_value", "stop"),
    (CHAT, {"messages": HELLO, "max_tokens": "5"}, 400, "invalid_value", "max_tokens"),
    (CHAT, {"messages": HELLO, "max_tokens": -2}, 400, "invalid_value", "max_tokens"),
    (CHAT, {"messages": HELLO, "n": 1.5}, 400, "invalid_value", "n"),
    (CHAT, {"messages": HELLO, "cache_salt": ""}, 400, "invalid_value", "cache_salt"),
    (CHAT, {"messages": HELLO, "cache_salt": "x" * 1025}, 400, "invalid_value", "cache_salt"),
    (CHAT, {"messages": HELLO, "cache_salt": ["x"]}, 400, "invalid_value", "cache_salt"),
    (CHAT, {"messages": HELLO, "echo": True}, 400, "unsupported_parameter", "echo"),
    (CHAT, {"messages": HELLO, "stream_options": {"include_usage": 1}}, 400, "invalid_value", "stream_options"),
    (CHAT, {"messages": HELLO, "logprobs": 5}, 400, "invalid_value", "logprobs"),
    (CHAT, {"messages": HELLO, "top_logprobs": 5}, 400, "invalid_value", "top_logprobs"),
    (CHAT, {"messages": HELLO, "logprobs": True, "top_logprobs": 21}, 400, "invalid_value", "top_logprobs"),
    (CHAT, {"messages": HELLO, "prompt_logprobs": 1, "stream": True}, 400, "invalid_value", "prompt_logprobs"),
    (CHAT, {"messages": HELLO, "frequency_penalty": 2.1}, 400, "invalid_value", "frequency_penalty"),
    (CHAT, {"messages": HELLO, "presence_penalty": -3}, 400, "invalid_value", "presence_penalty"),
    (CHAT, {"messages": HELLO, "repetition_penalty": 0}, 400, "invalid_value", "repetition_penalty"),
    (CHAT, {"messages": HELLO, "min_p": 1.5}, 400, "invalid_value", "min_p"),
    (CHAT, {"messages": HELLO, "logit_bias": {"7": 101}}, 400, "invalid_value", "logit_bias[7]"),
    (CHAT, {"messages": HELLO, "logit_bias": {"x": 1}}, 400, "invalid_value", "logit_bias"),
    (CHAT, {"messages": HELLO, "logit_bias": {"99999999": 1}}, 400, "invalid_value", "logit_bias"),
    (CHAT, {"messages": HELLO, "logit_bias": {"7": 1, "07": 2}}, 400, "invalid_value", "logit_bias"),
    (CHAT, {"messages": HELLO, "bad_words": [""]}, 400, "invalid_value", "bad_words"),
    (CHAT, {"messages": HELLO, "bad_words": "word"}, 400, "invalid_value", "bad_words"),
    (CHAT, {"messages": HELLO, "bad_words": ["x"] * 200}, 400, "invalid_value", "bad_words"),
    (CHAT, {"messages": HELLO, "min_tokens": 9, "max_tokens": 8}, 400, "invalid_value", "min_tokens"),
    (
        CHAT,
        {"messages": HELLO, "tools": [{"type": "function", "function": {"name": "f"}}]},
        400,
        "unsupported_parameter",
        "tools",
    ),
    (CHAT, {"messages": [{"role": "user", "content": "word " * 6000}]}, 400, "context_length_exceeded", "messages"),
    (CHAT, b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "invalid_value", "messages[0].content"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": ["text"], "text": "x"}]}]},
        400,
        "invalid_value",
        "messages[0].content[0].type",
    ),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        400,
        "invalid_value",
        "messages[0].content[0].type",
    ),
    (CHAT, {"messages": [{"role": ["user"], "content": "x"}]}, 400, "invalid_value", "messages[0].role"),
    (CHAT, {"messages": [*HELLO, CALLING]}, 400, "invalid_value", "messages[1].tool_calls"),
    (CHAT, {"messages": HELLO, "chat_template": "{{ x }}"}, 400, "unsupported_parameter", "chat_template"),
    (
        CHAT,
        {"messages": HELLO, "chat_template_kwargs": {"messages": []}},
        400,
        "invalid_value",
        "chat_template_kwargs.messages",
    ),
    (CHAT, {"messages": HELLO, "chat_template_kwargs": [1]}, 400, "invalid_value", "chat_template_kwargs"),
    (CHAT, {"messages": HELLO, "documents": [{"text": "x"}]}, 400, "unsupported_parameter", "documents"),
    (CHAT, {"messages": HELLO, "reasoning_effort": "a lot"}, 400, "invalid_value", "reasoning_effort"),
    (
        CHAT,
        {"messages": HELLO, "continue_final_message": True, "add_generation_prompt": True},
        400,
        "invalid_value",
        "continue_final_message",
    ),
    (TEXT, {"prompt": ""}, 400, "invalid_value", "prompt"),
    (TEXT, {"prompt": []}, 400, "invalid_value", "prompt"),
    (TEXT, {"messages": HELLO}, 400, "invalid_value", "prompt"),
    (TEXT, {"prompt": {"a": 1}}, 400, "invalid_value", "prompt"),
    (TEXT, {"prompt": ["a", 5]}, 400, "invalid_value", "prompt"),
    (TEXT, {"prompt": [5, "a"]}, 400, "invalid_value", "prompt"),
    (TEXT, {"prompt": ["a", ""]}, 400, "invalid_value", "prompt"),
    (TEXT, {"prompt": ["a", [1, 99_999_999]]}, 400, "invalid_value", "prompt"),
    (TEXT, {"prompt": ["a"] * 257}, 400, "invalid_value", "prompt"),
    (TEXT, {"prompt": ["a", "word " * 6000]}, 400, "context_length_exceeded", "prompt"),
    (TEXT, {"prompt": "x", "max_tokens": 0}, 400, "invalid_value", "max_tokens"),
    (TEXT, {"prompt": "x", "n": 2, "best_of": 3}, 400, "unsupported_parameter", "best_of"),
    (TEXT, {"prompt": "x", "seed": 2**64}, 400, "invalid_value", "seed"),
    (TEXT, {"prompt": [1, -5]}, 400, "invalid_value", "prompt"),
    (TEXT, {"prompt": [1, 99_999_999]}, 400, "invalid_value", "prompt"),
    (TEXT, {"prompt": "x", "stop_token_ids": [-1]}, 400, "invalid_value", "stop_token_ids[0]"),
    (TEXT, {"prompt": "x", "logprobs": 21}, 400, "invalid_value", "logprobs"),
    (TEXT, {"prompt": "x", "logprobs": "1"}, 400, "invalid_value", "logprobs"),
    (TEXT, {"prompt": "x", "prompt_logprobs": -1}, 400, "invalid_value", "prompt_logprobs"),
    (TEXT, {"prompt": "x", "echo": True, "logprobs": 1, "n": 2, "stream": True}, 400, "invalid_value", "echo"),
    (TEXT, {"prompt": "x" * 300_000}, 413, "body_too_large", None),
]


def _name(case: tuple[str, Any, int, str, str | None]) -> str:
    body = case[1] if isinstance(case[1], bytes) else json.dumps(case[1]).encode()
    return body[:60].decode(errors="replace")


@pytest.mark.parametrize("case", BAD_BODIES, ids=_name)
def test_http_names_status_code_and_field(cluster, case):
    path, body, status, code, param = case
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    reply = httpx.post(cluster.url + path, content=content, timeout=60)
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert (error["code"], error["param"]) == (code, param), error
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]


SAMPLING_CASES: list[tuple[dict[str, Any], str]] = [
    ({"temperature": -1.0}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"temperature": float("inf")}, "temperature"),
    ({"top_p": 0.0}, "top_p"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 4_000_000_000}, "max_tokens"),
    ({"stop": [""]}, "stop"),
    ({"stop_token_ids": [4_000_000_000]}, "stop_token_ids[0]"),
    ({"min_p": -0.1}, "min_p"),
    ({"repetition_penalty": float("nan")}, "repetition_penalty"),
    ({"frequency_penalty": float("inf")}, "frequency_penalty"),
    ({"presence_penalty": 2.5}, "presence_penalty"),
    ({"logit_bias": {4_000_000_000: 1.0}}, "logit_bias"),
    ({"logit_bias": {3: float("nan")}}, "logit_bias[3]"),
    ({"bad_words": [""]}, "bad_words"),
    ({"bad_word_ids": [common_pb2.TokenIds(ids=[1])]}, "bad_word_ids"),
    ({"logprobs": 21}, "logprobs"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"),
]


@pytest.mark.parametrize(("fields", "param"), SAMPLING_CASES, ids=str)
def test_grpc_gives_the_same_verdict(cluster, fields: dict[str, Any], param: str):
    with grpc.insecure_channel(cluster.grpc) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        request = inference_pb2.GenerateRequest(text="x", sampling=common_pb2.SamplingParams(**fields))
        with pytest.raises(grpc.RpcError) as caught:
            stub.Generate(request, timeout=60)
        error = from_rpc_error(caught.value)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert error.param == param


@pytest.mark.parametrize(
    ("request_", "status", "code"),
    [
        (inference_pb2.GenerateRequest(), "INVALID_ARGUMENT", "invalid_value"),
        (inference_pb2.GenerateRequest(text=""), "INVALID_ARGUMENT", "invalid_value"),
        (inference_pb2.GenerateRequest(text="x", model="gpt-9"), "NOT_FOUND", "model_not_found"),
        (inference_pb2.GenerateRequest(text="x", num_choices=10**9), "INVALID_ARGUMENT", "invalid_value"),
        (inference_pb2.GenerateRequest(text="x", request_id="a b"), "INVALID_ARGUMENT", "invalid_value"),
        (inference_pb2.GenerateRequest(text="word " * 9000), "INVALID_ARGUMENT", "context_length_exceeded"),
    ],
    ids=["no prompt", "empty", "unknown model", "huge n", "bad id", "too long"],
)
def test_grpc_statuses(cluster, request_, status: str, code: str):
    with grpc.insecure_channel(cluster.grpc) as channel, pytest.raises(grpc.RpcError) as caught:
        inference_pb2_grpc.InferenceStub(channel).Generate(request_, timeout=60)
    assert caught.value.code() is grpc.StatusCode[status]
    assert from_rpc_error(caught.value).code == code


def test_grpc_refuses_a_message_over_the_limit(cluster):
    with grpc.insecure_channel(cluster.grpc) as channel, pytest.raises(grpc.RpcError) as caught:
        inference_pb2_grpc.InferenceStub(channel).Generate(
            inference_pb2.GenerateRequest(text="x" * 400_000), timeout=60
        )
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_body_that_lies_about_its_length_is_cut_off(cluster):
    def parts():
        for _ in range(600):
            yield b"x" * 1024

    reply = httpx.post(cluster.url + CHAT, content=parts(), timeout=60)
    assert reply.status_code == 413


def test_unknown_routes_and_methods_are_json_too(cluster):
    assert httpx.get(cluster.url + "/v1/nothing").json()["error"]["code"] == "not_found"
    reply = httpx.get(cluster.url + CHAT)
    assert (reply.status_code, reply.json()["error"]["code"]) == (405, "method_not_allowed")


def test_the_official_client_raises_its_own_classes(cluster):
    client = openai.OpenAI(base_url=cluster.url + "/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-9", messages=[{"role": "user", "content": "x"}])
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="twostroke-bundled", prompt="x", temperature=-1)
    assert caught.value.param == "temperature"


def test_the_sdk_raises_typed_errors(cluster):
    with Client(cluster.grpc, timeout_s=20) as client, pytest.raises(TwostrokeError) as caught:
        client.generate("x", max_tokens=0)
    assert caught.value.param == "max_tokens"


def test_the_workers_never_noticed(cluster):
    """Runs last in this module: after all that, the cluster is whole, idle, and answers."""
    with Client(cluster.grpc, timeout_s=60) as client:
        workers = client.cluster()["workers"]
        assert {w["state"] for w in workers} == {"live"}
        assert all(w["load"]["running"] == 0 and w["load"]["waiting"] == 0 for w in workers)
        assert client.generate("def add(a, b):", max_tokens=4, temperature=0).usage.completion_tokens > 0
    assert not [line for line in cluster.said if "ended" in line]
