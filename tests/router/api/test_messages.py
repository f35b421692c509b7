"""Messages of the API, checked: what is taken, what it becomes, what is refused by name. No template here."""

from __future__ import annotations

import json
from typing import Any

import pytest

from twostroke.client.messages import add_messages
from twostroke.core.errors import InvalidRequest
from twostroke.protos import inference_pb2
from twostroke.router.api.grpc.chat_wire import MAX_ITEMS, chat_messages
from twostroke.router.api.ignored import MAX_NAMES, Ignored
from twostroke.router.api.messages import MAX_MESSAGES, MAX_PARTS, check_messages
from twostroke.router.api.toolcalls import MAX_CALLS, MAX_DEPTH

USER = {"role": "user", "content": "hi"}
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"city": "Zürich", "n": [1, null]}'}}
PARSED = {
    "id": "c1",
    "type": "function",
    "function": {"name": "look", "arguments": {"city": "Zürich", "n": [1, None]}},
}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "sunny"}


def text(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": one} for one in texts]


def assistant(content: Any = "ok", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def with_arguments(arguments: Any) -> dict[str, Any]:
    return {"id": "c1", "type": "function", "function": {"name": "look", "arguments": arguments}}


def checked(messages: list[Any]) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    ignored = Ignored()
    return check_messages(messages, ignored), ignored.names()


GOOD: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "text": (USER, USER),
    "empty text": ({"role": "user", "content": ""}, {"role": "user", "content": ""}),
    "parts": ({"role": "user", "content": text("a", "b")}, {"role": "user", "content": text("a", "b")}),
    "bare texts as parts": ({"role": "user", "content": ["a"]}, {"role": "user", "content": text("a")}),
    "the parts of an answer": (
        assistant([{"type": "output_text", "text": "a"}, {"type": "refusal", "refusal": "no"}]),
        assistant(text("a", "no")),
    ),
    "developer": ({"role": "developer", "content": "x"}, {"role": "developer", "content": "x"}),
    "a name": ({**USER, "name": "ann"}, {**USER, "name": "ann"}),
    "calls": (assistant("let me look", tool_calls=[CALL]), assistant("let me look", tool_calls=[PARSED])),
    "calls and an empty text": (assistant("", tool_calls=[CALL]), assistant("", tool_calls=[PARSED])),
    "calls and null": (assistant(None, tool_calls=[CALL]), assistant(None, tool_calls=[PARSED])),
    "calls and no content": ({"role": "assistant", "tool_calls": [CALL]}, assistant(None, tool_calls=[PARSED])),
    "calls and no parts": (assistant([], tool_calls=[CALL]), assistant(None, tool_calls=[PARSED])),
    "arguments as an object": (
        assistant(None, tool_calls=[with_arguments({"a": 1})]),
        assistant(None, tool_calls=[with_arguments({"a": 1})]),
    ),
    "arguments that are no JSON": (
        assistant(None, tool_calls=[with_arguments('{"a": ')]),
        assistant(None, tool_calls=[with_arguments('{"a": ')]),
    ),
    "arguments with NaN": (
        assistant(None, tool_calls=[with_arguments('{"a": NaN}')]),
        assistant(None, tool_calls=[with_arguments('{"a": NaN}')]),
    ),
    "no arguments": (
        assistant(None, tool_calls=[with_arguments("")]),
        assistant(None, tool_calls=[with_arguments({})]),
    ),
    "reasoning only": (assistant(None, reasoning_content="why"), assistant("", reasoning_content="why")),
    "an empty turn": ({"role": "assistant"}, assistant("")),
    "an empty turn of null": (assistant(None, tool_calls=[]), assistant("")),
    "an empty turn without parts": (assistant([]), assistant("")),
    "reasoning by its other name": (assistant(reasoning="why"), assistant(reasoning_content="why")),
    "reasoning by its third": (assistant(thinking="why"), assistant(reasoning_content="why")),
    "a refusal": (assistant(None, refusal="I won't"), assistant("I won't")),
    "the openai client's nulls": (
        assistant(
            refusal=None, audio=None, annotations=[], function_call=None, tool_calls=None, reasoning_content=None
        ),
        assistant(),
    ),
    "no calls": (assistant(tool_calls=[]), assistant()),
    "a result": (RESULT, RESULT),
    "a result of parts": ({**RESULT, "content": text("a")}, {**RESULT, "content": text("a")}),
    "an empty result": ({**RESULT, "content": None}, {**RESULT, "content": ""}),
    "the older function call": (
        assistant(None, function_call={"name": "look", "arguments": '{"a": 1}'}),
        assistant(None, tool_calls=[{**with_arguments({"a": 1}), "id": "call00001"}]),
    ),
    "the older result": (
        {"role": "function", "name": "look", "content": "x"},
        {"role": "tool", "name": "look", "content": "x"},
    ),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_message_becomes_what_it_means(name):
    given, expected = GOOD[name]
    messages, ignored = checked([USER, given])
    assert messages == [USER, expected]
    assert ignored == ()


@pytest.mark.parametrize("name", GOOD)
def test_a_message_means_the_same_over_grpc(name):
    request = inference_pb2.ChatRequest()
    add_messages(request, [USER, GOOD[name][0]])
    arrived = chat_messages(inference_pb2.ChatRequest.FromString(request.SerializeToString()).messages)
    assert checked(arrived) == checked([USER, GOOD[name][0]])


def test_the_wire_holds_no_more_than_is_built():
    request = inference_pb2.ChatRequest()
    for count, field in ((MAX_MESSAGES + 1, None), (MAX_ITEMS + 1, "parts"), (MAX_ITEMS + 1, "tool_calls")):
        request.Clear()
        message = request.messages.add(role="user")
        for _ in range(count):
            request.messages.add() if field is None else getattr(message, field).add()
        with pytest.raises(InvalidRequest) as caught:
            chat_messages(request.messages)
        assert caught.value.param == "messages"


def test_an_older_call_and_its_result_share_an_id():
    call = assistant(None, function_call={"name": "look", "arguments": "{}"})
    messages, _ = checked([USER, call, {"role": "function", "name": "look", "content": "x"}, call])
    assert messages[1]["tool_calls"][0]["id"] == messages[2]["tool_call_id"] == "call00001"
    assert messages[3]["tool_calls"][0]["id"] == "call00003"


def test_what_nothing_knows_is_kept_for_the_template_and_parts_lose_it_by_name():
    part = {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}, "annotations": []}
    call = {**CALL, "index": 0, "function": {**CALL["function"], "strict": True}}
    messages, ignored = checked(
        [{"role": "user", "content": [part], "agent": "build"}, assistant(None, tool_calls=[call])]
    )
    assert messages[0] == {"role": "user", "content": text("a"), "agent": "build"}
    assert ignored == ("messages.content.cache_control", "messages.tool_calls.index", "messages.tool_calls.strict")


@pytest.mark.parametrize(
    ("given", "ignored"),
    [
        (assistant(thinking={"content": "why", "signature": "s"}), ("messages.thinking.signature",)),
        (assistant(reasoning={"text": "why"}), ()),
        (assistant(thinking=[{"type": "thinking", "thinking": "wh"}, "y"]), ()),
        (assistant([{"type": "thinking", "thinking": "why"}, {"type": "text", "text": "ok"}]), ()),
        (assistant("ok", reasoning_content="why", thinking={"signature": "s"}), ()),
    ],
)
def test_reasoning_comes_as_gateways_write_it(given, ignored):
    (message,), names = checked([given])
    assert message["reasoning_content"] == "why"
    assert message["content"] in ("ok", text("ok"))
    assert "thinking" not in message
    assert "reasoning" not in message
    assert names == ignored


def test_one_result_answers_one_call():
    call = assistant(None, function_call={"name": "look", "arguments": "{}"})
    result = {"role": "function", "name": "look", "content": "x"}
    _, first, second = checked([call, result, result])[0]
    assert first["tool_call_id"] == "call00000"
    assert "tool_call_id" not in second


def test_a_refusal_beside_content_is_named():
    assert checked([assistant("ok", refusal="no")]) == ([assistant("ok")], ("messages.refusal",))


def test_reasoning_without_text_is_named():
    (message,), names = checked([assistant(thinking=[{"type": "redacted_thinking", "data": "x"}])])
    assert message == assistant()
    assert names == ("messages.thinking",)


def test_the_names_of_what_is_ignored_are_few_and_safe_to_show():
    part = {"type": "text", "text": "a", "x\r\nset-cookie: 1": 1, "ü" * 500: 1} | {f"k{n}": 1 for n in range(200)}
    _, ignored = checked([{"role": "user", "content": [part]}])
    assert len(ignored) == MAX_NAMES
    assert all(name.isascii() and name.isprintable() and len(name) < 100 for name in ignored)


def deep(levels: int) -> str:
    return "[" * levels + "]" * levels


BAD: list[tuple[Any, str]] = [
    ([], "messages"),
    ([USER] * (MAX_MESSAGES + 1), "messages"),
    ([7], "messages[0]"),
    ([{}], "messages[0].role"),
    ([{"role": ["user"], "content": "x"}], "messages[0].role"),
    ([{"role": {"a": 1}, "content": "x"}], "messages[0].role"),
    ([{"role": "wizard" * 100_000, "content": "x"}], "messages[0].role"),
    ([{"role": "user"}], "messages[0].content"),
    ([{"role": "user", "content": None}], "messages[0].content"),
    ([{"role": "user", "content": []}], "messages[0].content"),
    ([{"role": "user", "content": 7}], "messages[0].content"),
    ([{"role": "user", "content": {"type": "text", "text": "x"}}], "messages[0].content"),
    ([{"role": "user", "content": "\ud800"}], "messages[0].content"),
    ([{"role": "user", "content": text("\ud800")}], "messages[0].content[0].text"),
    ([{"role": "user", "content": text("x") * (MAX_PARTS + 1)}], "messages[0].content"),
    ([{"role": "user", "content": [7]}], "messages[0].content[0]"),
    ([{"role": "user", "content": [{"text": "x"}]}], "messages[0].content[0].type"),
    ([{"role": "user", "content": [{"type": ["text"], "text": "x"}]}], "messages[0].content[0].type"),
    ([{"role": "user", "content": [{"type": {"a": 1}, "text": "x"}]}], "messages[0].content[0].type"),
    (
        [{"role": "user", "content": [*text("x"), {"type": "image_url", "image_url": {"url": "x"}}]}],
        "messages[0].content[1].type",
    ),
    ([{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}], "messages[0].content[0].type"),
    ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
    ([{"role": "user", "content": [{"type": "text", "text": ["x"]}]}], "messages[0].content[0].text"),
    ([{**USER, "name": ["x"]}], "messages[0].name"),
    ([{**RESULT, "tool_call_id": 7}], "messages[0].tool_call_id"),
    ([assistant(reasoning_content=5)], "messages[0].reasoning_content"),
    ([assistant(thinking=[1])], "messages[0].thinking"),
    ([assistant(refusal=7)], "messages[0].refusal"),
    ([assistant(None, audio={"id": "a"})], "messages[0].audio"),
    ([{**USER, "tool_calls": [CALL]}], "messages[0].tool_calls"),
    ([{**USER, "function_call": {"name": "f"}}], "messages[0].function_call"),
    ([assistant(tool_calls="x")], "messages[0].tool_calls"),
    ([assistant(tool_calls=[CALL] * (MAX_CALLS + 1))], "messages[0].tool_calls"),
    ([assistant(tool_calls=["x"])], "messages[0].tool_calls[0]"),
    ([assistant(tool_calls=[{}])], "messages[0].tool_calls[0].function"),
    ([assistant(tool_calls=[{**CALL, "type": "custom"}])], "messages[0].tool_calls[0].type"),
    ([assistant(tool_calls=[{**CALL, "type": ["function"]}])], "messages[0].tool_calls[0].type"),
    ([assistant(tool_calls=[{**CALL, "id": 1}])], "messages[0].tool_calls[0].id"),
    ([assistant(tool_calls=[{"function": {"arguments": "{}"}}])], "messages[0].tool_calls[0].function.name"),
    ([assistant(tool_calls=[with_arguments("\ud800")])], "messages[0].tool_calls[0].function.arguments"),
    ([assistant(tool_calls=[with_arguments(deep(MAX_DEPTH + 1))])], "messages[0].tool_calls[0].function.arguments"),
    ([assistant(tool_calls=[with_arguments(deep(200_000))])], "messages[0].tool_calls[0].function.arguments"),
    ([assistant(tool_calls=[with_arguments(json.loads(deep(60)))])], "messages[0].tool_calls[0].function.arguments"),
    ([assistant(None, function_call="look")], "messages[0].function_call"),
]


@pytest.mark.parametrize(("messages", "param"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_what_is_wrong_is_named_in_few_words(messages, param):
    with pytest.raises(InvalidRequest) as caught:
        checked(messages)
    assert caught.value.param == param
    assert param in caught.value.message
    assert len(caught.value.message) < 300


def test_arguments_as_deep_as_may_be_are_taken():
    messages, _ = checked([USER, assistant(None, tool_calls=[with_arguments(deep(MAX_DEPTH))])])
    assert messages[1]["tool_calls"][0]["function"]["arguments"] == json.loads(deep(MAX_DEPTH))


def test_what_was_sent_is_not_changed():
    given = [USER, assistant(None, tool_calls=[CALL]), {"role": "function", "name": "f", "content": "x"}]
    before = json.dumps(given)
    checked(given)
    assert json.dumps(given) == before
