"""Enforced tool calls, Responses, and the dialects of Anthropic and Ollama: official clients, a real cluster.

The model is the bundled one with a chat template that prints tools: its texts mean nothing, but a grammar forces calls.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import jsonschema
import ollama
import openai
import pytest
from support.fakes.scripted_worker import BUNDLED, HERMES

from twostroke import Client

KEY = "a-secret"
HELLO: list[Any] = [{"role": "user", "content": "What does os.path.join do?"}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"$ref": "#/$defs/days"}},
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 9}},
}
WEATHER = {"name": "get_weather", "description": "The weather of a city.", "parameters": SCHEMA}
TOOLS: list[Any] = [
    {"type": "function", "function": WEATHER},
    {"type": "function", "function": {"name": "get_time"}},
]
GREEDY: dict[str, Any] = {"extra_body": {"temperature": 0}}  # the newest client has no such parameter
REASONS = {"length": "max_tokens", "stop": "end_turn"}
THEIR_TOOLS: list[Any] = [{"name": "get_weather", "description": "The weather.", "input_schema": SCHEMA}]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, run_cluster: Any) -> Iterator[Any]:
    folder: Path = tmp_path_factory.mktemp("model") / "calling"
    shutil.copytree(BUNDLED, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": HERMES}))
    with run_cluster(
        model__path=str(folder),
        cluster__launcher="inprocess",
        cluster__prefill=1,
        cluster__decode=1,
        step__num_threads=1,
        cache__tokens=16384,
        router__api_keys=(KEY,),
        router__max_body_bytes=256 * 1024,
        router__local_prefill=False,
        router__reasoning_parser="none",  # a grammar lets the model reason first, which this one would do without end
    ) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def model(served: Any) -> str:
    answer = httpx.get(f"{served.url}/v1/models", headers={"x-api-key": KEY})
    return str(answer.json()["data"][0]["id"])


@pytest.fixture(scope="module")
def by_openai(served: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=served.url + "/v1", api_key=KEY, max_retries=0, timeout=60) as made:
        yield made


@pytest.fixture(scope="module")
def by_anthropic(served: Any) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=served.url, api_key=KEY, max_retries=0, timeout=60) as made:
        yield made


@pytest.fixture(scope="module")
def by_ollama(served: Any) -> ollama.Client:
    return ollama.Client(host=served.url, headers={"authorization": f"Bearer {KEY}"}, timeout=60)


# ---------------------------------------------------------------- enforced calls


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_required_gives_calls_with_valid_arguments(by_openai, model, seed):
    asked: dict[str, Any] = {"model": model, "messages": HELLO, "tools": TOOLS[:1], "seed": seed, "max_tokens": 400}
    (choice,) = by_openai.chat.completions.create(**asked, tool_choice="required", parallel_tool_calls=False).choices
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    assert call.function.name == "get_weather"
    jsonschema.validate(json.loads(call.function.arguments), SCHEMA)
    assert not choice.message.content


def test_a_named_function_is_called_whole_streamed_and_over_grpc(served, by_openai, model):
    named = {"type": "function", "function": {"name": "get_time"}}
    asked: dict[str, Any] = {"tools": TOOLS, "tool_choice": named, "parallel_tool_calls": False, "max_tokens": 60}
    whole = by_openai.chat.completions.create(model=model, messages=HELLO, seed=4, **asked).choices[0]
    (call,) = whole.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_time", {})
    with by_openai.chat.completions.stream(model=model, messages=HELLO, seed=4, **asked) as stream:
        final = stream.get_final_completion().choices[0]
    assert final.message.tool_calls[0].function.name == "get_time"
    with Client(served.grpc, api_key=KEY) as sdk:
        (called,) = sdk.chat(HELLO, seed=4, **asked).choices[0].tool_calls
        assert (called.name, json.loads(called.arguments)) == ("get_time", {})


def test_strict_leaves_the_text_as_it_was(by_openai, model):
    strict = [{"type": "function", "function": {**WEATHER, "strict": True}}]
    asked: dict[str, Any] = {"model": model, "messages": HELLO, "max_tokens": 12, "temperature": 0}
    plain = by_openai.chat.completions.create(**asked, tools=TOOLS[:1]).choices[0].message.content
    assert by_openai.chat.completions.create(**asked, tools=strict).choices[0].message.content == plain


# ---------------------------------------------------------------- Responses


def test_a_response_says_what_a_chat_says_whole_streamed_stored_and_in_the_background(by_openai, model):
    asked: dict[str, Any] = {"model": model, "input": HELLO, "max_output_tokens": 12, "instructions": "Be brief."}
    asked |= GREEDY
    whole = by_openai.responses.create(**asked)
    chat = by_openai.chat.completions.create(
        model=model, messages=[{"role": "system", "content": "Be brief."}, *HELLO], max_tokens=12, temperature=0
    )
    assert whole.output_text == chat.choices[0].message.content
    assert whole.status == {"length": "incomplete", "stop": "completed"}[chat.choices[0].finish_reason]
    assert (whole.usage.input_tokens, whole.usage.output_tokens) == (
        chat.usage.prompt_tokens,
        chat.usage.completion_tokens,
    )
    with by_openai.responses.create(**asked, stream=True) as stream:
        events = list(stream)
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text
    assert events[-1].response.output_text == whole.output_text
    kept = by_openai.responses.retrieve(events[-1].response.id)
    assert kept == events[-1].response
    then = by_openai.responses.create(**{**asked, "input": "Why?"}, previous_response_id=kept.id)
    assert then.usage.input_tokens_details.cached_tokens > 0
    begun = by_openai.responses.create(**asked, background=True)
    while begun.status in ("queued", "in_progress"):
        begun = by_openai.responses.retrieve(begun.id)
    assert begun.output_text == whole.output_text
    rest = list(by_openai.responses.retrieve(begun.id, stream=True, starting_after=4))
    assert rest[0].sequence_number == 5
    assert rest[-1].response == begun


def test_a_function_is_called_and_its_output_goes_on(by_openai, model):
    tools: list[Any] = [{"type": "function", **WEATHER}]
    choice: Any = {"type": "function", "name": "get_weather"}
    asked: dict[str, Any] = {"model": model, "tools": tools, "max_output_tokens": 400, **GREEDY}
    short = {**asked, "max_output_tokens": 4}
    first = by_openai.responses.create(input=HELLO, tool_choice=choice, parallel_tool_calls=False, **asked)
    (call,) = first.output
    jsonschema.validate(json.loads(call.arguments), SCHEMA)
    with by_openai.responses.stream(
        model=model, input=HELLO, tools=tools, tool_choice=choice, parallel_tool_calls=False, extra_body={"seed": 3}
    ) as stream:
        streamed = stream.get_final_response().output[0]
    jsonschema.validate(json.loads(streamed.arguments), SCHEMA)
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    kept = by_openai.responses.create(input=[result], previous_response_id=first.id, **short)
    by_hand = by_openai.responses.create(input=[*HELLO, call.to_dict(), result], **short, store=False)
    assert (kept.output_text, kept.usage.input_tokens) == (by_hand.output_text, by_hand.usage.input_tokens)


def test_logprobs_and_a_schema_of_the_text(by_openai, model):
    asked: dict[str, Any] = {"model": model, "input": HELLO, "max_output_tokens": 300}
    answer = by_openai.responses.create(
        **asked, text={"format": {"type": "json_schema", "name": "weather", "schema": SCHEMA, "strict": True}}
    )
    jsonschema.validate(json.loads(answer.output_text), SCHEMA)
    scored = by_openai.responses.create(
        **{**asked, "max_output_tokens": 5}, top_logprobs=3, include=["message.output_text.logprobs"]
    )
    (part,) = scored.output[0].content
    assert b"".join(bytes(one.bytes) for one in part.logprobs).decode() == part.text
    assert all(len(one.top_logprobs) == 3 for one in part.logprobs)


# ---------------------------------------------------------------- Anthropic


def test_a_message_whole_and_streamed_say_what_a_chat_says(by_anthropic, by_openai, model):
    asked: dict[str, Any] = {
        "model": model,
        "messages": HELLO,
        "max_tokens": 12,
        **GREEDY,
        "system": "Be brief.",
    }
    whole = by_anthropic.messages.create(**asked)
    chat = by_openai.chat.completions.create(
        model=model, messages=[{"role": "system", "content": "Be brief."}, *HELLO], max_tokens=12, temperature=0
    )
    assert [block.type for block in whole.content] == ["text"]
    assert whole.content[0].text == chat.choices[0].message.content
    assert whole.stop_reason == REASONS[chat.choices[0].finish_reason]
    assert whole.stop_sequence is None
    used = whole.usage
    assert used.input_tokens + used.cache_read_input_tokens == chat.usage.prompt_tokens
    assert used.output_tokens == chat.usage.completion_tokens
    with by_anthropic.messages.stream(**asked) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == final.content[0].text == whole.content[0].text
    assert final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == used.output_tokens


def test_a_stop_sequence_is_named_and_taken_out(by_anthropic, model):
    asked: dict[str, Any] = {"model": model, "messages": HELLO, "max_tokens": 24, **GREEDY}
    text = by_anthropic.messages.create(**asked).content[0].text
    stop = text[len(text) // 2 :][:3]
    cut = by_anthropic.messages.create(**asked, stop_sequences=["never said", stop])
    assert (cut.stop_reason, cut.stop_sequence) == ("stop_sequence", stop)
    assert cut.content[0].text == text[: text.index(stop)]
    with by_anthropic.messages.stream(**asked, stop_sequences=["never said", stop]) as stream:
        final = stream.get_final_message()
    assert (final.stop_sequence, final.content[0].text) == (stop, cut.content[0].text)


def test_a_tool_is_used_and_its_result_goes_on(by_anthropic, model):
    asked: dict[str, Any] = {"model": model, "tools": THEIR_TOOLS, "max_tokens": 400, **GREEDY}
    choice = {"type": "tool", "name": "get_weather", "disable_parallel_tool_use": True}
    first = by_anthropic.messages.create(messages=HELLO, tool_choice=choice, **asked)
    assert first.stop_reason == "tool_use"
    (used,) = first.content
    jsonschema.validate(used.input, SCHEMA)
    with by_anthropic.messages.stream(messages=HELLO, tool_choice=choice, **asked) as stream:
        final = stream.get_final_message()
    assert (final.content[0].name, final.content[0].input) == (used.name, used.input)
    result = {"type": "tool_result", "tool_use_id": used.id, "content": [{"type": "text", "text": "rain"}]}
    then = [*HELLO, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    counted = by_anthropic.messages.count_tokens(model=model, messages=then, tools=THEIR_TOOLS)
    answer = by_anthropic.messages.create(messages=then, **{**asked, "max_tokens": 4})
    assert answer.usage.input_tokens + answer.usage.cache_read_input_tokens == counted.input_tokens
    fewer = by_anthropic.messages.count_tokens(model=model, messages=HELLO, tools=THEIR_TOOLS)
    assert fewer.input_tokens < counted.input_tokens


def test_an_answer_goes_on_with_a_prefill_and_keeps_to_a_schema(by_anthropic, model):
    begun = [*HELLO, {"role": "assistant", "content": "It joins"}]
    two = by_anthropic.messages.count_tokens(model=model, messages=begun).input_tokens
    assert two > by_anthropic.messages.count_tokens(model=model, messages=HELLO).input_tokens
    config = {"format": {"type": "json_schema", "schema": SCHEMA}}
    answer = by_anthropic.messages.create(model=model, messages=HELLO, max_tokens=300, output_config=config)
    jsonschema.validate(json.loads(answer.content[0].text), SCHEMA)


@pytest.mark.parametrize(
    ("more", "error", "words"),
    [
        ({"model": "gpt-9"}, anthropic.NotFoundError, "this cluster serves"),
        ({"extra_body": {"temperature": -1}}, anthropic.BadRequestError, "temperature"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            anthropic.BadRequestError,
            "messages[0].content[0].type",
        ),
        ({"messages": [{"role": "system", "content": "x"}]}, anthropic.BadRequestError, "the field system"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, anthropic.BadRequestError, "tools[0].type"),
        ({"tool_choice": {"type": "maybe"}}, anthropic.BadRequestError, "tool_choice.type"),
        ({"extra_body": {"container": "x"}}, anthropic.BadRequestError, "container is not served"),
    ],
)  # fmt: skip
def test_errors_have_anthropics_form(by_anthropic, model, more, error, words):
    with pytest.raises(error) as caught:
        by_anthropic.messages.create(**{"model": model, "messages": HELLO, "max_tokens": 4, **more})
    assert words in caught.value.body["error"]["message"]
    assert caught.value.body["type"] == "error"
    wanted = "not_found_error" if error is anthropic.NotFoundError else "invalid_request_error"
    assert caught.value.body["error"]["type"] == wanted


def test_fields_without_effect_are_named(by_anthropic, model):
    answer = by_anthropic.messages.with_raw_response.create(
        model=model,
        messages=[{"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]}],
        max_tokens=2,
        metadata={"user_id": "someone"},
        thinking={"type": "enabled", "budget_tokens": 1024},
        extra_body={"verve": 3},
    )
    assert answer.headers["x-twostroke-ignored"] == "verve, thinking.budget_tokens"
    assert answer.parse().content


# ---------------------------------------------------------------- Ollama


def test_an_ollama_chat_whole_and_streamed_say_the_same(by_ollama, by_openai, model):
    options = {"num_predict": 12, "temperature": 0, "num_ctx": 4096}
    whole = by_ollama.chat(model, HELLO, options=options)
    chat = by_openai.chat.completions.create(model=model, messages=HELLO, max_tokens=12, temperature=0)
    assert whole.message.content == chat.choices[0].message.content
    assert (whole.done, whole.done_reason) == (True, chat.choices[0].finish_reason)
    assert (whole.prompt_eval_count, whole.eval_count) == (chat.usage.prompt_tokens, chat.usage.completion_tokens)
    assert 0 < whole.prompt_eval_duration <= whole.total_duration
    parts = list(by_ollama.chat(f"{model}:latest", HELLO, options=options, stream=True))
    assert "".join(part.message.content for part in parts) == whole.message.content
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    assert len(parts) > 2
    assert parts[-1].eval_count == whole.eval_count


def test_ollama_tools_formats_and_results(by_ollama, model):
    answer = by_ollama.chat(model, HELLO, format=SCHEMA, options={"num_predict": 300, "seed": 2})
    jsonschema.validate(json.loads(answer.message.content), SCHEMA)
    call = {"function": {"name": "get_weather", "arguments": {"city": "Oslo", "days": 2}}}
    then = [
        *HELLO,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "rain", "tool_name": "get_weather"},
    ]
    plain = by_ollama.chat(model, then, options={"num_predict": 2})
    tools = by_ollama.chat(model, then, tools=TOOLS[:1], options={"num_predict": 2})
    assert tools.prompt_eval_count > plain.prompt_eval_count


def test_ollama_generates_with_and_without_the_template(by_ollama, by_openai, model):
    options = {"num_predict": 8, "temperature": 0}
    asked = by_ollama.generate(model, HELLO[0]["content"], options=options)
    chat = by_openai.chat.completions.create(model=model, messages=HELLO, max_tokens=8, temperature=0)
    assert asked.response == chat.choices[0].message.content
    raw = by_ollama.generate(model, "def add(a, b):\n    ", raw=True, options=options)
    plain = by_openai.completions.create(model=model, prompt="def add(a, b):\n    ", max_tokens=8, temperature=0)
    assert raw.response == plain.choices[0].text
    parts = list(by_ollama.generate(model, "def add(a, b):\n    ", raw=True, options=options, stream=True))
    assert "".join(part.response for part in parts) == raw.response
    assert by_ollama.generate(model).done_reason == "load"


def test_ollama_describes_what_is_served(by_ollama, by_openai, served, model):
    (listed,) = by_ollama.list().models
    assert listed.model == model
    assert listed.size == (BUNDLED / "model.safetensors").stat().st_size
    length = by_openai.models.retrieve(model).model_extra["max_model_len"]
    said = by_ollama.show(model)
    assert said.capabilities[:2] == ["completion", "tools"]
    assert said.template == HERMES
    assert said.modelinfo[f"{said.modelinfo['general.architecture']}.context_length"] == length
    (running,) = by_ollama.ps().models
    assert (running.name, running.digest, running.size_vram) == (model, listed.digest, listed.size)
    assert httpx.head(served.url, headers={"x-api-key": KEY}).status_code == 200
    missing = httpx.get(f"{served.url}/api/embed", headers={"x-api-key": KEY})
    assert (missing.status_code, "models that write text" in missing.json()["error"]) == (404, True)
    version = httpx.get(f"{served.url}/api/version", headers={"x-api-key": KEY}).json()["version"]
    assert tuple(map(int, version.split("."))) >= (0, 13, 4)  # what Codex asks for
    assert httpx.head(f"{served.url}/api/version", headers={"x-api-key": KEY}).status_code == 200


@pytest.mark.parametrize(
    ("more", "status", "words"),
    [
        ({"model": "llama3"}, 404, "this cluster serves"),
        ({"messages": [{"role": "user", "content": "x", "images": ["aGk="]}]}, 400, "messages[0].images"),
        ({"options": {"mirostat": 2}}, 400, "options.mirostat is not served"),
        ({"options": {"top_p": 7}}, 400, "top_p is 7"),
        ({"format": "xml"}, 400, "format is 'xml'"),
        ({"logprobs": True}, 400, "logprobs is not served"),
    ],
)
def test_errors_have_ollamas_form(served, model, more, status, words):
    body = {"model": model, "messages": HELLO, "stream": False, **more}
    reply = httpx.post(f"{served.url}/api/chat", json=body, headers={"x-api-key": KEY}, timeout=60)
    assert reply.status_code == status
    assert list(reply.json()) == ["error"]
    assert words in reply.json()["error"]


# ---------------------------------------------------------------- doors


@pytest.mark.parametrize(
    "path", ["/v1/messages", "/v1/messages/count_tokens", "/api/chat", "/api/generate", "/api/show", "/api/tags"]
)
def test_the_doors_stand_before_the_dialects_too(served, path):
    method = "GET" if path == "/api/tags" else "POST"
    reply = httpx.request(method, served.url + path, content=b"{}" if method == "POST" else None)
    assert reply.status_code == 401
    error = reply.json()["error"]
    if path.startswith("/api/"):
        assert isinstance(error, str)
    else:
        assert error["type"] == "authentication_error"
    if method == "POST":
        big = httpx.post(served.url + path, content=b" " * (256 * 1024 + 1), headers={"x-api-key": KEY})
        assert big.status_code == 413
