"""Items of a Responses body as a chat, and the fold of an answer: pure, so they are tried without a router."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.fakes.scripted_worker import HERMES, MODEL, make_model

from twostroke.core.errors import (
    Cancelled,
    InvalidRequest,
    Overloaded,
    TwostrokeError,
    UnsupportedParameter,
    WorkerLost,
)
from twostroke.core.request import AnswerForm, FinishReason, Request, SamplingParams
from twostroke.router.api.dialects.responses.fields import in_their_words, wanted_of
from twostroke.router.api.dialects.responses.items import MAX_ITEMS, check_calls, check_number, items_of, messages_of
from twostroke.router.api.dialects.responses.reply import Reply, Shape
from twostroke.router.api.ignored import Ignored
from twostroke.router.api.models import ServedModel
from twostroke.router.journal.merged import merged
from twostroke.router.requests.pieces import OutputDelta, TokenUsage
from twostroke.text.parsing.parsers import parsers_of
from twostroke.text.token_text import TokenTexts
from twostroke.text.tokenizer import Tokenizer

BODY: dict[str, Any] = {"model": MODEL, "input": "Hi"}
FUNCTION: dict[str, Any] = {"type": "function", "name": "f", "parameters": {"type": "object"}}


def chat_of(body: dict[str, Any]) -> Any:
    wanted, _ = wanted_of({**BODY, **body}, strict=True)
    return wanted.chat(wanted.items()[0])


def test_a_conversation_becomes_a_chat():
    conversation = [
        {"role": "developer", "content": "Obey."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "s"}], "content": []},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "b", "annotations": []}]},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a": 1}'},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "more"}]},
        {"type": "function_call", "call_id": "c2", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "one"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "two"}]},
        {"role": "assistant", "content": "c"},
        {"role": "assistant", "content": [{"type": "output_text", "text": "d"}, {"type": "refusal", "refusal": "e"}]},
        {"type": "reasoning", "summary": [], "encrypted_content": "gAAA"},
        {"role": "user", "content": []},
    ]
    chat = chat_of({"input": conversation, "instructions": "Be brief."})
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    assert chat.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": "Obey."},
        {"role": "user", "content": "a"},
        {
            "role": "assistant",
            "content": "b",
            "reasoning_content": "s\nmore",
            "tool_calls": [
                {"id": "c1", **call},
                {"id": "c2", "type": "function", "function": {"name": "f", "arguments": "{}"}},
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "one"},
        {"role": "tool", "tool_call_id": "c2", "content": "two"},
        {"role": "assistant", "content": "c"},
        {"role": "assistant", "content": [{"type": "text", "text": "d"}, {"type": "text", "text": "e"}]},
        {"role": "user", "content": ""},
    ]
    assert chat.continue_final_message is None


def test_stored_items_are_their_own_input():
    ignored = Ignored()
    once = items_of(
        [
            {"role": "user", "content": "a"},
            {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "t"}]},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}", "id": "x" * 200},
            {"type": "function_call_output", "call_id": "c", "output": None},
        ],
        ignored,
    )
    assert items_of(once, ignored) == once
    assert [item["id"].partition("_")[0] for item in once] == ["msg", "rs", "fc", "fco"]
    assert len({item["id"] for item in once}) == 4
    assert not ignored.names()


def test_every_field_has_its_place_in_the_chat():
    chat = chat_of(
        {
            "max_output_tokens": 7,
            "temperature": 0.5,
            "top_p": 0.25,
            "seed": 3,
            "stop": ["x"],
            "tools": [{**FUNCTION, "strict": True, "description": "d"}],
            "tool_choice": {"type": "function", "name": "f"},
            "parallel_tool_calls": False,
            "reasoning": {"effort": "low", "summary": None},
            "text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}},
            "top_logprobs": 4,
        }
    )
    assert (chat.max_tokens, chat.temperature, chat.top_p, chat.seed, chat.stop) == (7, 0.5, 0.25, 3, ["x"])
    function = {"name": "f", "parameters": {"type": "object"}, "strict": True, "description": "d"}
    assert chat.tools == [{"type": "function", "function": function}]
    assert chat.tool_choice == {"type": "function", "function": {"name": "f"}}
    assert (chat.parallel_tool_calls, chat.reasoning_effort) == (False, "low")
    assert (chat.logprobs, chat.top_logprobs) == (True, 4)
    schema = {"name": "n", "schema": {"type": "object"}, "strict": True}
    assert chat.response_format == {"type": "json_schema", "json_schema": schema}
    among = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "f"}]}
    named = {"type": "function", "function": {"name": "f"}}
    expected = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [named]}}
    assert chat_of({"tools": [FUNCTION], "tool_choice": among}).tool_choice == expected
    assert chat_of({"text": {"format": {"type": "json_object"}}}).response_format == {"type": "json_object"}
    assert chat_of({"text": {"format": {"type": "text"}, "verbosity": "low"}}).response_format is None


@pytest.mark.parametrize(
    ("more", "kind", "param"),
    [
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, UnsupportedParameter, "input[0].type"),
        ({"input": [{"type": "web_search_call", "id": "ws"}]}, UnsupportedParameter, "input[0].type"),
        ({"input": [{"type": "custom_tool_call_output"}]}, UnsupportedParameter, "input[0].type"),
        ({"input": [{"type": ["message"]}]}, InvalidRequest, "input[0].type"),
        ({"input": [{"type": {}}]}, InvalidRequest, "input[0].type"),
        ({"input": [{}]}, InvalidRequest, "input[0].type"),
        ({"input": [{"role": "tool", "content": "x"}]}, InvalidRequest, "input[0].role"),
        ({"input": [{"role": ["user"], "content": "x"}]}, InvalidRequest, "input[0].role"),
        ({"input": [{"role": "user", "content": 7}]}, InvalidRequest, "input[0].content"),
        ({"input": [{"role": "user", "content": [7]}]}, InvalidRequest, "input[0].content[0]"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            UnsupportedParameter,
            "input[0].content[0].type",
        ),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, UnsupportedParameter, None),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, InvalidRequest, None),
        ({"input": [{"role": "user", "content": [{"type": "input_text", "text": "x"}] * 1025}]}, InvalidRequest, None),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, InvalidRequest, "input[0].call_id"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, InvalidRequest, "input[0].call_id"),
        ({"input": [{"type": "reasoning", "content": "x"}]}, InvalidRequest, "input[0].content"),
        ({"input": [{"type": "reasoning", "summary": [{"text": 7}]}]}, InvalidRequest, None),
        ({"tools": [{"type": "mcp"}]}, UnsupportedParameter, "tools[0].type"),
        ({"tools": [{"name": "f"}]}, InvalidRequest, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, InvalidRequest, "tools[0].function"),
        ({"tools": [FUNCTION], "tool_choice": {"type": "mcp"}}, UnsupportedParameter, "tool_choice"),
        ({"tools": [FUNCTION], "tool_choice": {"name": "f"}}, InvalidRequest, "tool_choice"),
        ({"reasoning": {"summary": "long"}}, InvalidRequest, "reasoning.summary"),
        ({"reasoning": {"effort": 7}}, InvalidRequest, "reasoning.effort"),
        ({"truncation": "left"}, InvalidRequest, "truncation"),
        ({"metadata": {"a": 1}}, InvalidRequest, "metadata"),
        ({"metadata": {"a" * 65: "b"}}, InvalidRequest, "metadata"),
        ({"metadata": {str(number): "" for number in range(17)}}, InvalidRequest, "metadata"),
        ({"user": "u" * 513}, InvalidRequest, "user"),
        ({"prompt": {"id": "p"}}, UnsupportedParameter, "prompt"),
        ({"context_management": [{"type": "compaction"}]}, UnsupportedParameter, "context_management"),
        ({"verve": 1}, InvalidRequest, "verve"),
        ({"input": "", "instructions": "x"}, InvalidRequest, "input"),
        ({"input": [{"type": "function_call_output", "call_id": "", "output": "x"}]}, InvalidRequest, None),
        ({"include": ["junk"]}, InvalidRequest, "include[0]"),
        ({"text": {"verbosity": "loud"}}, InvalidRequest, "text.verbosity"),
        ({"text": {"verbosity": ["low"]}}, InvalidRequest, "text.verbosity"),
        ({"text": {"format": {"type": "xml"}}}, InvalidRequest, "text.format"),
        ({"stream_options": "all"}, InvalidRequest, "stream_options"),
        ({"instructions": "\ud800"}, InvalidRequest, "instructions"),
        ({"input": [{"role": "user", "content": "x"}] * 2049}, InvalidRequest, "input"),
    ],
)
def test_what_is_wrong_is_named_by_the_clients_own_path(more, kind, param):
    with pytest.raises(InvalidRequest) as caught:
        chat_of(more)
    assert type(caught.value) is kind
    assert param is None or caught.value.param == param
    assert caught.value.param.partition("[")[0].partition(".")[0] in more


def test_what_is_wrong_is_told_with_the_values_that_are_served():
    for body, said in (
        ({"include": ["junk"]}, r"include\[0\] is 'junk'; must be one of message.output_text.logprobs, reasoning.enc"),
        ({"text": {"verbosity": 3}}, r"text.verbosity is 3; must be one of low, medium, high"),
    ):
        with pytest.raises(InvalidRequest, match=said):
            wanted_of({**BODY, **body}, strict=False)


CALLED, ANSWERED = (
    lambda name: {"type": "function_call", "call_id": name, "name": "f", "arguments": "{}"},
    lambda name: {"type": "function_call_output", "call_id": name, "output": "x"},
)


@pytest.mark.parametrize(
    ("items", "said"),
    [
        ([CALLED("a"), CALLED("b"), ANSWERED("b"), ANSWERED("a")], None),
        ([CALLED("a"), {"role": "user", "content": "x"}, ANSWERED("a"), ANSWERED("a")], None),
        ([ANSWERED("a")], "No tool call found for function call output with call_id 'a'"),
        ([ANSWERED("a"), CALLED("a")], "No tool call found for function call output with call_id 'a'"),
        ([CALLED("a")], "No tool output found for function call 'a'"),
        ([CALLED("a"), CALLED("b"), ANSWERED("a"), {"role": "user", "content": "x"}], "No tool output .* call 'b'"),
        ([CALLED("a"), ANSWERED("a"), CALLED("a")], "No tool output found for function call 'a'"),
    ],
)
def test_calls_have_their_outputs_and_outputs_their_calls(items, said):
    conversation = items_of(items, Ignored())
    if said is None:
        check_calls(conversation)
        return
    with pytest.raises(InvalidRequest, match=said) as caught:
        check_calls(conversation)
    assert caught.value.param == "input"


def test_a_turn_of_reasoning_alone_has_text_for_templates_that_join_it():
    thought = {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "t"}]}
    (message,) = messages_of(items_of([thought], Ignored()), None)
    assert message == {"role": "assistant", "content": "", "reasoning_content": "t"}


def test_tools_of_other_servers_are_left_out_beside_functions():
    wanted, ignored = wanted_of({**BODY, "tools": [{"type": "web_search"}, FUNCTION, {"type": "mcp"}]}, strict=True)
    assert [tool["function"]["name"] for tool in wanted.offer.tools] == ["f"]
    assert ignored == ["tools.web_search", "tools.mcp"]
    assert wanted.said()["tools"] == [
        {"type": "function", "description": None, "parameters": {"type": "object"}, "strict": False, "name": "f"}
    ]


def test_errors_of_the_validator_have_the_names_of_this_api():
    error = in_their_words(Overloaded("max_tokens is 9", param="max_tokens", retry_after_s=3.0))
    assert (type(error), error.message, error.param) == (Overloaded, "max_output_tokens is 9", "max_output_tokens")
    assert error.retry_after_s == 3.0
    tool = in_their_words(InvalidRequest("tools[1].function.name is 7", param="tools[1].function.name"))
    assert (tool.message, tool.param) == ("tools[1].name is 7", "tools[1].name")
    other = InvalidRequest("top_p is 9", param="top_p")
    assert in_their_words(other) is other


def test_a_conversation_is_bounded():
    check_number(MAX_ITEMS, "input")
    with pytest.raises(InvalidRequest, match="at most 4096"):
        check_number(MAX_ITEMS + 1, "input")


@given(st.lists(st.sampled_from(["user", "assistant", "reasoning", "call", "output"]), max_size=12))
def test_no_item_is_lost_and_their_order_is_kept(kinds: list[str]):
    made = {
        "user": lambda n: {"role": "user", "content": f"user{n};"},
        "assistant": lambda n: {"role": "assistant", "content": f"assistant{n};"},
        "reasoning": lambda n: {"type": "reasoning", "content": [{"text": f"reasoning{n};"}]},
        "call": lambda n: {"type": "function_call", "call_id": f"call{n};", "name": "f", "arguments": "{}"},
        "output": lambda n: {"type": "function_call_output", "call_id": "c", "output": f"output{n};"},
    }
    messages = messages_of(items_of([made[kind](place) for place, kind in enumerate(kinds)], Ignored()), None)
    told = [f"{kind}{place};" for place, kind in enumerate(kinds)]
    text = json.dumps(messages)
    assert all(text.count(one) == 1 for one in told)
    for kind in made:
        places = [text.index(one) for one in told if one.startswith(kind)]
        assert places == sorted(places)


# ---------------------------------------------------------------- the fold


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    tokenizer = Tokenizer.load(make_model(tmp_path_factory.mktemp("fold") / "model"))
    texts = TokenTexts(tokenizer)
    return ServedModel(MODEL, 4096, tokenizer.vocab_size, tokenizer, None, texts, parsers=parsers_of(HERMES))


CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "–"}}\n</tool_call>'
TEXTS = ["plain", "<think>why – so</think>ok " + CALL, CALL + CALL + " after " + CALL, "a<think>b</think>c", ""]


def shape(**more: Any) -> Shape:
    wanted, _ = wanted_of({**BODY, "tools": [FUNCTION], **more}, strict=True)
    return Shape(wanted.said(), 7, has_logprobs=False)


def request() -> Request:
    tools = ({"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}},)
    form = AnswerForm("<|assistant|>", tools)
    return Request("resp_0", MODEL, (1, 2), SamplingParams(400), 1, "d", 60.0, is_chat=True, answer=form)


def pieces_of(served: ServedModel, text: str, cuts: list[int], reason: FinishReason) -> list[OutputDelta]:
    """The text in pieces that are cut there, with the tokens of each."""
    places = sorted({0, *(cut % (len(text) + 1) for cut in cuts), len(text)})
    pieces, index = [], 0
    for start, end in itertools.pairwise(places):
        ids = tuple(served.tokenizer.encode(text[start:end], False))
        pieces.append(OutputDelta(0, index, ids, text[start:end]))
        index += len(ids)
    return [*pieces, OutputDelta(0, index, (), "", reason, TokenUsage(2, index, 1))]


def folded(reply: Reply, pieces: list[OutputDelta]) -> list[dict[str, Any]]:
    events = list(reply.begin())
    for piece in pieces:
        events += reply.take(piece)
    return events + list(reply.end())


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.sampled_from(TEXTS),
    st.lists(st.integers(0, 200), max_size=20),
    st.sampled_from([FinishReason.STOP, FinishReason.LENGTH]),
    st.booleans(),
)
def test_the_events_add_up_to_the_object_however_the_text_was_cut(served, text, cuts, reason, in_background):
    asked = shape(background=in_background, reasoning={"summary": "auto"})
    pieces = pieces_of(served, text, cuts, reason)
    reply = Reply(asked, request(), served)
    events = folded(reply, pieces)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    final = events[-1]["response"]
    assert final == reply.whole()
    assert final["status"] == ("incomplete" if reason is FinishReason.LENGTH else "completed")
    assert built(events) == final["output"]
    assert folded(Reply(asked, request(), served), pieces) == events, "who folds again gets the same"
    once = folded(Reply(asked, request(), served), merged(pieces))[-1]["response"]
    once["usage"]["output_tokens_details"] = final["usage"]["output_tokens_details"]
    assert once == final, "the whole does not depend on the pieces"


def built(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The output, made of added items and deltas alone; each must be closed before the next begins."""
    output: list[dict[str, Any]] = []
    is_open = False
    for event in events:
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert not is_open
            assert event["output_index"] == len(output)
            is_open = True
            output.append(json.loads(json.dumps(event["item"])))
        elif kind == "content_part.added":
            output[-1]["content"].append(dict(event["part"]))
        elif kind == "reasoning_summary_part.added":
            output[-1]["summary"].append(dict(event["part"]))
        elif kind in ("output_text.delta", "reasoning_text.delta"):
            output[-1]["content"][event["content_index"]]["text"] += event["delta"]
        elif kind == "reasoning_summary_text.delta":
            output[-1]["summary"][event["summary_index"]]["text"] += event["delta"]
        elif kind == "function_call_arguments.delta":
            output[-1]["arguments"] += event["delta"]
        elif kind == "output_item.done":
            assert is_open
            is_open = False
            output[-1]["status"] = event["item"]["status"]
        if "item_id" in event:
            assert (event["item_id"], event["output_index"]) == (output[-1]["id"], len(output) - 1)
    assert not is_open
    return output


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (WorkerLost("gone"), "failed", "server_error"),
        (Overloaded("full"), "failed", "rate_limit_exceeded"),
        (InvalidRequest("bad"), "failed", "invalid_prompt"),
        (Cancelled("left"), "cancelled", None),
    ],
)
def test_a_response_that_failed_says_why_and_keeps_what_it_said(served, error: TwostrokeError, status, code):
    reply = Reply(shape(), request(), served)
    events = [*reply.begin(), *reply.take(OutputDelta(0, 0, (5,), "half an ans")), *reply.fail(error)]
    final = events[-1]["response"]
    assert (events[-1]["type"], final["status"]) == ("response.failed", status)
    assert final["error"] == (None if code is None else {"code": code, "message": error.message})
    assert final["output"][0]["status"] == "incomplete"
    assert final["output"][0]["content"][0]["text"] == "half an ans"
    assert final["usage"] is None


def test_an_error_inside_the_conversation_names_the_input():
    error = in_their_words(InvalidRequest("messages[1].tool_calls: none are shown", param="messages[1].tool_calls"))
    assert (error.param, error.message) == ("input", "input: messages[1].tool_calls: none are shown")
