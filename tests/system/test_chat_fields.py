"""Fields of chat messages over both faces of a real cluster, under a template that reads them."""

import json
import shutil
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from twostroke import Client
from twostroke.client.messages import add_messages
from twostroke.protos import inference_pb2, inference_pb2_grpc
from twostroke.text.tokenizer import Tokenizer

BUNDLED = Path(__file__).parents[2] / "model" / "bundled"
TEMPLATE = """\
{%- for m in messages %}
{%- if m.role in ['system', 'user'] %}{{ '<|user|>' + m.role + ': ' + m.content + '<|end|>' }}
{%- elif m.role == 'assistant' %}{{ '<|assistant|>' ~ (m.reasoning_content or '') ~ (m.content or '') }}
{%- for c in m.tool_calls or [] %}{{ c.function.name ~ c.function.arguments | tojson }}{% endfor %}{{ '<|end|>' }}
{%- elif m.role == 'tool' %}{{ '<|user|>' ~ m.tool_call_id ~ ': ' ~ m.content ~ '<|end|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}{{ 'thinking' if enable_thinking }}"""

ASKED: list[dict[str, Any]] = [{"role": "user", "content": "weather?"}]
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
CALLED = [*ASKED, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
CHATS: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str]] = {
    "one turn": (ASKED, {}, "<|user|>user: weather?<|end|><|assistant|>"),
    "developer": (
        [{"role": "developer", "content": "Be brief."}, *ASKED],
        {},
        "<|user|>system: Be brief.<|end|><|user|>user: weather?<|end|><|assistant|>",
    ),
    "calls": (
        [*CALLED, {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "sunny"}]}],
        {},
        '<|user|>user: weather?<|end|><|assistant|>weather{"city": "Paris"}<|end|>'
        "<|user|>c1: sunny<|end|><|assistant|>",
    ),
    "reasoning": (
        [*ASKED, {"role": "assistant", "content": "b", "reasoning_content": "a"}],
        {"add_generation_prompt": False},
        "<|user|>user: weather?<|end|><|assistant|>ab<|end|>",
    ),
    "continued": (
        [*ASKED, {"role": "assistant", "content": "It is"}],
        {"continue_final_message": True},
        "<|user|>user: weather?<|end|><|assistant|>It is",
    ),
    "options": (
        ASKED,
        {"chat_template_kwargs": {"enable_thinking": True}},
        "<|user|>user: weather?<|end|><|assistant|>thinking",
    ),
    "effort": (ASKED, {"reasoning_effort": "low"}, "<|user|>user: weather?<|end|><|assistant|>thinking"),
}


@pytest.fixture(scope="module")
def reading(tmp_path_factory, run_cluster):
    folder = tmp_path_factory.mktemp("model") / "reading"
    shutil.copytree(BUNDLED, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    with run_cluster(
        model__path=str(folder),
        cluster__launcher="inprocess",
        cluster__prefill=0,
        cluster__decode=1,
        step__num_threads=1,
        cache__tokens=8192,
    ) as cluster:
        yield cluster


@pytest.mark.parametrize("name", CHATS)
def test_both_faces_render_a_chat_alike(reading, name):
    messages, options, expected = CHATS[name]
    with Client(reading.grpc, timeout_s=60) as client:
        as_text = client.generate(list(client.tokenize(messages, **options).ids), max_tokens=1, temperature=0)
        over_grpc = client.chat(messages, max_tokens=1, temperature=0, **options)
        ids = client.tokenize(messages, **options).ids
    assert list(ids) == Tokenizer.load(BUNDLED).encode(expected, add_special_tokens=False)
    body = {"messages": messages, "max_tokens": 1, "temperature": 0, **options}
    over_http = httpx.post(reading.url + "/v1/chat/completions", json=body, timeout=60).json()
    assert over_http["usage"]["prompt_tokens"] == len(ids) == over_grpc.usage.prompt_tokens
    assert over_http["choices"][0]["message"]["content"] == over_grpc.text == as_text.text


def test_what_nothing_reads_is_told(reading):
    messages = [{**ASKED[0], "name": "ann"}]
    request = inference_pb2.ChatRequest()
    add_messages(request, messages)
    request.sampling.max_tokens = 1
    with grpc.insecure_channel(reading.grpc) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        reply, call = stub.Chat.with_call(request, timeout=60)
        assert dict(call.initial_metadata())["x-twostroke-ignored"] == "messages.name"
        stream = stub.ChatStream(request, timeout=60)
        assert dict(stream.initial_metadata())["x-twostroke-ignored"] == "messages.name"
        assert len(list(stream)) >= 1
        add_messages(request, [{"role": "assistant", "content": "x"}])
        del request.messages[0]
        _, call = stub.Chat.with_call(request, timeout=60)
        assert "x-twostroke-ignored" not in dict(call.initial_metadata())
    with Client(reading.grpc, timeout_s=60) as client:
        assert client.explain(reply.request_id)["ignored_fields"] == ["messages.name"]
    body = {"messages": [{**ASKED[0], "agent": "build"}], "max_tokens": 1, "request_id": "fields-1"}
    assert httpx.post(reading.url + "/v1/chat/completions", json=body, timeout=60).status_code == 200
    explained = httpx.get(reading.url + "/v1/requests/fields-1/explain", timeout=60).json()
    assert explained["ignored_fields"] == ["messages.agent"]
