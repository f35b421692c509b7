"""Small things of the dialects: stop sequences and which one ended an answer, thinking, usage, Ollama's words."""

from types import SimpleNamespace
from typing import Any

import pytest
from support.fakes.scripted_router import HELLO, MODEL

from twostroke.core.errors import InternalError, InvalidRequest
from twostroke.core.request import FinishReason
from twostroke.router.api.dialects.anthropic_requests import asked_of
from twostroke.router.api.dialects.anthropic_responses import Message
from twostroke.router.api.dialects.errors import anthropic_error
from twostroke.router.api.dialects.ollama_requests import asked_of_chat, asked_of_generate
from twostroke.router.api.dialects.ollama_responses import Reply
from twostroke.router.api.dialects.one_choice import OneChoice
from twostroke.router.api.messages import MAX_PARTS
from twostroke.router.api.output import GivenCall, ParsedDelta
from twostroke.router.requests.pieces import OutputDelta, TokenUsage

EOS = 2
BODY: dict[str, Any] = {"model": MODEL, "max_tokens": 16, "messages": HELLO}


def one_choice(*stops: str) -> OneChoice:
    request: Any = SimpleNamespace(answer=None, sampling=SimpleNamespace(stop_token_ids=()))
    model: Any = SimpleNamespace(tokenizer=SimpleNamespace(eos_ids=(EOS,)))
    return OneChoice(request, model, stops)


def piece(text: str, token_id: int = 7, finish: FinishReason | None = None, usage: TokenUsage | None = None) -> Any:
    return OutputDelta(0, 0, (token_id,), text, finish, usage)


def text(*said: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": one} for one in said]


# ---------------------------------------------------------------- Anthropic


def test_stop_sequences_stay_in_the_text_until_it_is_known_which_one_ended_it() -> None:
    asked, _ = asked_of({**BODY, "stop_sequences": ["END", "."]}, strict=True)
    assert (asked.stops, asked.chat.stop) == (("END", "."), ["END", "."])
    assert asked.chat.include_stop_str_in_output is True
    plain, _ = asked_of(BODY, strict=True)
    assert (plain.stops, plain.chat.stop, plain.chat.include_stop_str_in_output) == ((), None, None)


def test_texts_stand_before_and_after_results_as_the_user_wrote_them() -> None:
    result = {"type": "tool_result", "tool_use_id": "t", "content": "one"}
    asked, _ = asked_of(
        {**BODY, "messages": [{"role": "user", "content": [*text("a"), result, *text("b")]}]}, strict=True
    )
    assert [(message["role"], message["content"]) for message in asked.chat.messages] == [
        ("user", text("a")),
        ("tool", "one"),
        ("user", text("b")),
    ]
    too_many = {**BODY, "messages": [{"role": "user", "content": text("x") * (MAX_PARTS + 1)}]}
    with pytest.raises(InvalidRequest, match=f"at most {MAX_PARTS} blocks") as caught:
        asked_of(too_many, strict=True)
    assert caught.value.param == "messages[0].content"


@pytest.mark.parametrize(
    ("thinking", "shows", "template"),
    [
        (None, False, None),
        ({"type": "disabled"}, False, {"enable_thinking": False}),
        ({"type": "enabled", "budget_tokens": 1024}, True, {"enable_thinking": True}),
    ],
)
def test_thoughts_are_shown_to_who_asks_for_them(thinking: Any, shows: bool, template: Any) -> None:
    asked, _ = asked_of({**BODY, "thinking": thinking}, strict=True)
    assert (asked.shows_thinking, asked.chat.chat_template_kwargs) == (shows, template)


@pytest.mark.parametrize(
    ("last_id", "finish", "content", "reason", "stop"),
    [
        (7, FinishReason.STOP, "Hello ", "stop_sequence", "BEND"),
        (EOS, FinishReason.STOP, "Hello BEND", "end_turn", None),
        (7, FinishReason.LENGTH, "Hello BEND", "max_tokens", None),
    ],
)
def test_the_longest_stop_sequence_that_ended_a_message_is_named(
    last_id: int, finish: FinishReason, content: str, reason: str, stop: str | None
) -> None:
    choice = one_choice("END", "BEND")
    message = Message("msg", MODEL, choice, 10, shows_thinking=True)
    message.add(choice.take(piece("Hello ", usage=TokenUsage(10, 3, 4))))
    message.add(choice.take(piece("BEND", last_id, finish)))
    whole = message.whole()
    assert [block["text"] for block in whole["content"]] == [content]
    assert (whole["stop_reason"], whole["stop_sequence"]) == (reason, stop)
    assert (whole["usage"]["input_tokens"], whole["usage"]["cache_read_input_tokens"]) == (6, 4)
    assert whole["usage"]["output_tokens"] == 3


def test_a_stop_sequence_that_ended_nothing_is_text() -> None:
    choice = one_choice("END")
    said = [choice.take(piece("END")).content, choice.take(piece(" and on", 7, FinishReason.LENGTH)).content]
    assert said == ["", "END and on"]


def test_blocks_of_a_stream_close_before_the_next_begins() -> None:
    choice = one_choice()
    message = Message("msg", MODEL, choice, 10, shows_thinking=True)
    call = GivenCall(0, "c", "f", "{}")
    given = [ParsedDelta("", "Hm."), ParsedDelta("a"), ParsedDelta("b", calls=(call,))]
    kinds = [event["type"].removeprefix("content_block_") for parsed in given for event in message.events(parsed)]
    assert kinds == ["start", "delta", "stop", "start", "delta", "delta", "stop", "start", "delta"]
    hidden = Message("msg", MODEL, choice, 10, shows_thinking=False)
    assert list(hidden.events(ParsedDelta("", "Hm."))) == []


def test_a_fault_of_the_server_is_named_as_one() -> None:
    assert anthropic_error(InternalError("x"))["error"]["type"] == "api_error"


# ---------------------------------------------------------------- Ollama


def test_the_words_of_ollama_have_their_meaning() -> None:
    for num_predict in (-1, -2):
        asked, _ = asked_of_chat(
            {"model": MODEL, "messages": HELLO, "options": {"num_predict": num_predict}}, strict=True
        )
        assert asked.chat is not None
        assert asked.chat.max_tokens == -1
    for stream, is_streamed in ((None, True), (True, True), (False, False)):
        asked, _ = asked_of_chat({"model": MODEL, "messages": HELLO, "stream": stream}, strict=True)
        assert asked.is_streamed is is_streamed
    with pytest.raises(InvalidRequest, match="must be true, false or one of low, medium, high"):
        asked_of_chat({"model": MODEL, "messages": HELLO, "think": "loud"}, strict=True)
    asked, _ = asked_of_generate({"model": MODEL, "prompt": "x"}, strict=True)
    assert asked.chat is not None
    assert asked.completion is not None, "for a model without a template"


def test_results_without_a_name_follow_the_order_of_the_calls() -> None:
    calls = [{"function": {"name": name, "arguments": {}}} for name in ("f", "g")]
    messages = [*HELLO, {"role": "assistant", "tool_calls": calls}, *[{"role": "tool", "content": "x"}] * 2]
    asked, _ = asked_of_chat({"model": MODEL, "messages": messages}, strict=True)
    assert asked.chat is not None
    ids = [call["id"] for call in asked.chat.messages[1]["tool_calls"]]
    assert [message["tool_call_id"] for message in asked.chat.messages[2:]] == ids


def test_a_piece_that_shows_nothing_is_no_object_and_a_call_alone_is_one() -> None:
    choice = one_choice()
    reply = Reply(MODEL, choice, 10, 0.0, lambda: 1.0, is_chat=True, shows_thinking=False)
    assert reply.part(ParsedDelta("", "Hm.")) is None
    called = reply.part(ParsedDelta(calls=(GivenCall(0, "c", "f", "{}"),)))
    assert called is not None
    assert called["message"]["tool_calls"][0]["function"]["name"] == "f"
    spoken = reply.part(ParsedDelta("a", "Hm."))
    assert spoken is not None
    assert "thinking" not in spoken["message"]
    choice.take(piece("a", finish=FinishReason.LENGTH))
    assert reply.last()["done_reason"] == "length"
