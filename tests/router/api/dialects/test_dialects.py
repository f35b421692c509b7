"""The dialects' translators: fields in, and whole answers and streams with reasoning and calls out.

Streams come from a real router with a scripted worker, read by the official clients.
"""

import json
from pathlib import Path
from typing import Any

import anthropic
import httpx
import ollama
import pytest
from support.fakes.scripted_router import HELLO, router, worker
from support.fakes.scripted_worker import MODEL, make_model

from twostroke.core.errors import InvalidRequest, Overloaded, Unauthenticated, Unavailable, UnsupportedParameter
from twostroke.router.api.dialects.anthropic_requests import asked_of
from twostroke.router.api.dialects.errors import error_form
from twostroke.router.api.dialects.ollama_requests import asked_of_chat, asked_of_generate

SCHEMA: dict[str, Any] = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
OSLO, ROME = {"city": "Oslo – Østkanten"}, {"city": "Rome"}
BODY: dict[str, Any] = {"model": MODEL, "max_tokens": 16, "messages": HELLO}


def call_text(arguments: dict[str, Any]) -> str:
    return (
        f"<tool_call>\n{json.dumps({'name': 'get_weather', 'arguments': arguments}, ensure_ascii=False)}\n</tool_call>"
    )


SAID = f"<think>Rain.</think>Let me see.\n{call_text(OSLO)}\n{call_text(ROME)}"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model")


# ---------------------------------------------------------------- Anthropic


async def test_a_message_has_thinking_text_and_calls_whole_and_streamed(model):
    tools: list[Any] = [{"name": "get_weather", "input_schema": SCHEMA}]
    asked: dict[str, Any] = {"model": MODEL, "messages": HELLO, "max_tokens": 400, "tools": tools}
    async with router() as there, anthropic.AsyncAnthropic(base_url=there.url, api_key="none") as client:
        scripted = await there.add(worker(model, SAID.removeprefix("<think>")))  # the prompt ends with it
        whole = await client.messages.create(**asked, thinking={"type": "adaptive"})
        assert [block.type for block in whole.content] == ["thinking", "text", "tool_use", "tool_use"]
        assert whole.content[0].thinking == "Rain."
        assert whole.content[1].text == "Let me see."
        assert [block.input for block in whole.content[2:]] == [OSLO, ROME]
        assert whole.stop_reason == "tool_use"
        async with client.messages.stream(**asked, thinking={"type": "adaptive"}) as stream:
            kinds = [event.type async for event in stream]
            final = await stream.get_final_message()
        assert [block.model_dump(exclude={"id"}) for block in final.content] == [
            block.model_dump(exclude={"id"}) for block in whole.content
        ]
        assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 4
        assert (final.stop_reason, final.usage.output_tokens) == ("tool_use", whole.usage.output_tokens)
        scripted.says = SAID
        silent = await client.messages.create(**asked, extra_headers={"x-request-timeout": "100"})
        assert [block.type for block in silent.content] == ["text", "tool_use", "tool_use"]
        assert 0 < scripted.submits[-1].timeout_ms <= 100_000 < scripted.submits[0].timeout_ms, "its own deadline"


def test_a_conversation_becomes_a_chat():
    messages = [
        {"role": "user", "content": "Hi"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": "s"},
                {"type": "text", "text": "Let me see."},
                {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": 1}},
                {"type": "tool_use", "id": "t2", "name": "f", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": "one", "is_error": True},
                {"type": "tool_result", "tool_use_id": "t2", "content": []},
                {"type": "text", "text": "And now?", "cache_control": {"type": "ephemeral"}},
            ],
        },
    ]
    asked, ignored = asked_of(
        {**BODY, "messages": messages, "system": [{"type": "text", "text": "Be brief."}]}, strict=True
    )
    calls = [
        {"id": "t1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}},
        {"id": "t2", "type": "function", "function": {"name": "f", "arguments": "{}"}},
    ]
    assert asked.chat.messages == [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": "Hi"},
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "Let me see."}],
            "reasoning_content": "Hm.",
            "tool_calls": calls,
        },
        {"role": "tool", "tool_call_id": "t1", "content": "one"},
        {"role": "tool", "tool_call_id": "t2", "content": ""},
        {"role": "user", "content": [{"type": "text", "text": "And now?"}]},
    ]
    assert ignored == ["messages.content.is_error"]
    assert asked.chat.continue_final_message is None
    begun, _ = asked_of({**BODY, "messages": [*HELLO, {"role": "assistant", "content": "It"}]}, strict=True)
    assert begun.chat.continue_final_message is True


@pytest.mark.parametrize(
    ("choice", "tool_choice", "parallel"),
    [
        ({"type": "auto"}, "auto", None),
        ({"type": "any", "disable_parallel_tool_use": True}, "required", False),
        ({"type": "none"}, "none", None),
        ({"type": "tool", "name": "f"}, {"type": "function", "function": {"name": "f"}}, None),
    ],
)
def test_every_choice_of_a_tool_has_its_word(choice, tool_choice, parallel):
    tools = [{"name": "f", "input_schema": SCHEMA, "type": "custom"}]
    asked, _ = asked_of({**BODY, "tools": tools, "tool_choice": choice}, strict=True)
    assert asked.chat.tools == [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}]
    assert (asked.chat.tool_choice, asked.chat.parallel_tool_calls) == (tool_choice, parallel)


def test_edits_of_the_context_are_named_as_ignored():
    """Claude Code sends them with every request."""
    edits = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}
    _, ignored = asked_of({**BODY, "context_management": edits}, strict=False)
    assert ignored == ["context_management"]


@pytest.mark.parametrize(
    ("more", "kind", "param"),
    [
        ({"max_tokens": None}, InvalidRequest, "max_tokens"),
        ({"max_tokens": -1}, InvalidRequest, "max_tokens"),
        ({"container": "c"}, UnsupportedParameter, "container"),
        ({"stop_sequence": "x"}, InvalidRequest, "stop_sequence"),
        ({"thinking": {"type": "deep"}}, InvalidRequest, "thinking"),
        ({"output_config": {"format": {"type": "xml"}}}, InvalidRequest, "output_config"),
        ({"tools": [{"name": "f"}]}, InvalidRequest, "tools[0].input_schema"),
        (
            {"messages": [{"role": "user", "content": [{"type": "document"}]}]},
            UnsupportedParameter,
            "messages[0].content[0].type",
        ),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f"}]}]},
            InvalidRequest,
            "messages[0].content[0].input",
        ),
    ],
)
def test_a_wrong_message_body_is_refused_by_name(more, kind, param):
    with pytest.raises(kind) as caught:
        asked_of({**BODY, **more}, strict=True)
    assert caught.value.param == param


# ---------------------------------------------------------------- Ollama


async def test_an_ollama_chat_has_thinking_and_calls_whole_and_streamed(model):
    tools: list[Any] = [{"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}}]
    async with router() as there:
        await there.add(worker(model, SAID))
        client = ollama.AsyncClient(host=there.url)
        whole = await client.chat(MODEL, HELLO, tools=tools)
        assert (whole.message.thinking, whole.message.content) == ("Rain.", "Let me see.")
        assert [call.function.arguments for call in whole.message.tool_calls] == [OSLO, ROME]
        assert whole.done_reason == "stop"
        parts = [part async for part in await client.chat(MODEL, HELLO, tools=tools, stream=True)]
        assert "".join(part.message.content for part in parts) == "Let me see."
        assert "".join(part.message.thinking or "" for part in parts) == "Rain."
        calls = [call for part in parts for call in part.message.tool_calls or ()]
        assert [call.function.arguments for call in calls] == [OSLO, ROME]
        assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
        silent = await client.chat(MODEL, HELLO, tools=tools, think=False)
        assert silent.message.thinking is None


async def test_a_wish_to_think_without_effect_has_the_dialects_name(tmp_path):
    path = make_model(tmp_path / "plain", "{% for m in messages %}{{ m.content }}{% endfor %}")
    async with router() as there, httpx.AsyncClient(base_url=there.url) as client:
        await there.add(worker(path, "Hi."))
        for route, wish, name in (
            ("/v1/messages", {"thinking": {"type": "enabled"}}, "thinking"),
            ("/v1/messages", {"output_config": {"effort": "low"}}, "output_config.effort"),
            ("/api/chat", {"think": True, "stream": False}, "max_tokens, think"),
        ):
            reply = await client.post(route, json={**BODY, **wish})
            assert (reply.status_code, reply.headers["x-twostroke-ignored"]) == (200, name)


def test_results_follow_the_calls_of_their_name():
    calls = [{"function": {"name": name, "arguments": {}}} for name in ("f", "g", "f")]
    results = [{"role": "tool", "content": name, "tool_name": name} for name in ("g", "f", "f")]
    messages = [*HELLO, {"role": "assistant", "tool_calls": calls}, *results]
    asked, _ = asked_of_chat({"model": MODEL, "messages": messages}, strict=True)
    assert asked.chat is not None
    ids = [call["id"] for call in asked.chat.messages[1]["tool_calls"]]
    assert len(set(ids)) == 3
    assert [message["tool_call_id"] for message in asked.chat.messages[2:]] == [ids[1], ids[0], ids[2]]


def test_options_have_their_names_here_and_others_are_named():
    options = {
        "num_predict": 7,
        "repeat_penalty": 1.1,
        "top_k": 3,
        "num_ctx": 512,
        "num_gpu": 1,
        "tfs_z": 1,
        "verve": 2,
    }
    asked, ignored = asked_of_chat({"model": MODEL, "messages": HELLO, "options": options}, strict=True)
    assert asked.chat is not None
    assert asked.chat.sampling_options() == {"max_tokens": 7, "repetition_penalty": 1.1, "top_k": 3}
    assert ignored == ["options.num_ctx", "options.verve"]
    for odd in ({"mirostat": 1}, {"tfs_z": 0.5}):
        with pytest.raises(UnsupportedParameter, match=f"options.{next(iter(odd))} is not served"):
            asked_of_chat({"model": MODEL, "messages": HELLO, "options": odd}, strict=True)


def test_a_generation_is_a_chat_or_a_completion():
    asked, _ = asked_of_generate({"model": MODEL, "prompt": "x", "system": "y"}, strict=True)
    assert asked.chat is not None
    assert [message["role"] for message in asked.chat.messages] == ["system", "user"]
    assert asked.completion is None
    asked, _ = asked_of_generate({"model": MODEL, "prompt": "x", "raw": True}, strict=True)
    assert asked.chat is None
    assert asked.completion is not None
    assert (asked.completion.prompt, asked.is_streamed) == ("x", True)
    with pytest.raises(UnsupportedParameter, match="context is not served"):
        asked_of_generate({"model": MODEL, "prompt": "x", "context": [1]}, strict=True)
    with pytest.raises(InvalidRequest, match="system is given with raw"):
        asked_of_generate({"model": MODEL, "prompt": "x", "raw": True, "system": "y"}, strict=True)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (InvalidRequest("x"), "invalid_request_error"),
        (Unauthenticated("x"), "authentication_error"),
        (Overloaded("x"), "rate_limit_error"),
        (Unavailable("x"), "overloaded_error"),
    ],
)
def test_an_error_has_the_form_of_its_path(error, kind):
    assert error_form("/v1/messages")(error) == {"type": "error", "error": {"type": kind, "message": "x"}}
    assert error_form("/v1/messages/count_tokens") is error_form("/v1/messages")
    assert error_form("/api/chat")(error) == {"error": "x"}
    assert error_form("/v1/chat/completions")(error)["error"]["code"] == error.code


async def test_a_route_that_is_not_there_answers_in_the_form_of_its_dialect() -> None:
    async with router() as there, httpx.AsyncClient(base_url=there.url) as client:
        anthropics = await client.get("/v1/messages")
        assert (anthropics.status_code, anthropics.json()["type"]) == (405, "error")
        ollamas = await client.get("/api/chat")
        assert (ollamas.status_code, ollamas.json()) == (405, {"error": "/api/chat does not take GET"})
        others = await client.get("/v1/nothing")
        assert (others.status_code, others.json()["error"]["code"]) == (404, "not_found")
