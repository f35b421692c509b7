"""Both clients over real gRPC against a protocol peer: one set of tests, run with Client and with AsyncClient."""

from __future__ import annotations

import asyncio
import gc
import time
import tracemalloc
from collections.abc import Iterator
from typing import Any, cast

import pytest
from support.session.awaited import Awaited, AwaitedStream

from twostroke import AsyncClient, Client
from twostroke.client.calls import StreamReader, generate_stream
from twostroke.core.errors import (
    ERROR_BY_CODE,
    Cancelled,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    Overloaded,
    TokensLost,
    TwostrokeError,
    Unauthenticated,
    Unavailable,
)
from twostroke.protos import common_pb2, inference_pb2


@pytest.fixture(params=[Client, Awaited], ids=["sync", "async"])
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def client(kind: Any, address: str) -> Iterator[Any]:
    made = kind(address, timeout_s=10.0)
    yield made
    made.close()


def test_generates(client, peer):
    sampling = {"temperature": 0, "stop": "\n", "seed": 2**63}
    answer = client.generate("hello", max_tokens=3, n=2, request_id="mine", priority=-4, **sampling)
    assert answer.text == "0.0 0.1 0.2 "
    assert [choice.token_ids for choice in answer.choices] == [(0, 1, 2), (1000, 1001, 1002)]
    assert answer.choices[1].finish_reason == "length"
    assert answer.usage.total_tokens == 7 + 6
    assert answer.usage.cached_tokens == 3
    assert answer.request_id == "mine"
    (seen,) = peer.seen
    assert seen.text == "hello"
    assert seen.sampling.HasField("temperature")
    assert not seen.sampling.HasField("top_p")
    assert list(seen.sampling.stop) == ["\n"]
    assert seen.sampling.seed == 2**63
    assert seen.priority == -4


def test_generates_from_token_ids(client, peer):
    client.generate((5, 6, 7))
    client.generate([])
    assert [list(seen.token_ids.ids) for seen in peer.seen] == [[5, 6, 7], []]
    assert {seen.WhichOneof("prompt") for seen in peer.seen} == {"token_ids"}


def test_streams_what_it_generates_whole(client):
    whole = client.generate("hello", max_tokens=20, n=3)
    chunks = list(client.generate_stream("hello", max_tokens=20, n=3))
    for choice in whole.choices:
        mine = [chunk for chunk in chunks if chunk.choice == choice.index]
        assert "".join(chunk.text for chunk in mine) == choice.text
        assert tuple(id_ for chunk in mine for id_ in chunk.token_ids) == choice.token_ids
        assert next(chunk.finish_reason for chunk in mine if chunk.finish_reason) == choice.finish_reason
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_chats(client, peer):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    whole = client.chat(messages, max_tokens=5)
    assert "".join(chunk.text for chunk in client.chat_stream(messages, max_tokens=5)) == whole.text
    for seen in peer.seen:
        assert [{"role": m.role, "content": m.content} for m in seen.messages] == messages


def test_an_answer_of_the_openai_client_is_a_message(client, peer):
    function = {"name": "look", "arguments": '{"city": "Paris"}'}
    answer = {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": [{"id": "c1", "type": "function", "function": function}],
        "reasoning": "why",
    }
    question = {
        "role": "user",
        "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
        "name": "ann",
    }
    client.chat([question, answer, {"role": "tool", "tool_call_id": "c1", "content": "x"}])
    asked, called, result = peer.seen[-1].messages
    assert [part.text for part in asked.parts] == ["a", "b"]
    assert (asked.HasField("content"), asked.name) == (False, "ann")
    call = called.tool_calls[0]
    assert (call.id, call.name, call.arguments) == ("c1", "look", '{"city": "Paris"}')
    assert (called.HasField("content"), called.reasoning_content) == (False, "why")
    assert (result.tool_call_id, result.content) == ("c1", "x")


def test_what_the_chat_template_is_told(client, peer):
    messages = [{"role": "user", "content": "hi"}]
    client.chat(messages, chat_template_kwargs={"enable_thinking": False}, reasoning_effort="low")
    client.tokenize(messages, add_generation_prompt=False, documents=[{"text": "x"}])
    told, asked = peer.seen[-2].options, peer.seen[-1].chat.options
    assert (told.chat_template_kwargs, told.reasoning_effort) == ('{"enable_thinking": false}', "low")
    assert not told.HasField("add_generation_prompt")
    assert (asked.HasField("add_generation_prompt"), asked.add_generation_prompt) == (True, False)
    assert asked.documents == '[{"text": "x"}]'
    for ask in (client.generate, client.tokenize):
        with pytest.raises(TypeError, match="add_generation_prompt"):
            ask("text", add_generation_prompt=True)
    with pytest.raises(InvalidRequest) as caught:
        client.chat(messages, chat_template_kwargs={"a": float("nan")})
    assert caught.value.param == "chat_template_kwargs"


def test_asks_the_smaller_questions(client):
    assert client.tokenize("abc").ids == (97, 98, 99)
    assert bytes(client.tokenize([{"role": "user", "content": "é"}]).ids).decode() == "user:é;"
    assert [card.id for card in client.models()] == ["tiny"]
    assert client.abort("r-1") is True
    assert client.abort("other") is False
    assert client.explain("r-1") == {"request_id": "r-1"}
    assert client.cluster() == {"workers": []}
    for wrong in ("broken", "list"):
        with pytest.raises(InternalError, match="JSON"):
            client.explain(wrong)


# ---------------------------------------------------------------- giving up


def leave_by_close(stream):
    next(stream)
    stream.close()
    assert list(stream) == []


def leave_the_block(stream):
    with stream:
        next(stream)


def leave_by_exception(stream):
    with pytest.raises(ZeroDivisionError), stream:  # noqa: PT012
        next(stream)
        raise ZeroDivisionError


def forget(stream):
    next(stream)
    if isinstance(stream, AwaitedStream):
        stream.drop()
    del stream
    gc.collect()


@pytest.mark.parametrize("leave", [leave_by_close, leave_the_block, leave_by_exception, forget])
def test_the_server_sees_at_once_that_nobody_reads(client, peer, leave):
    streams = [client.generate_stream("!slow", max_tokens=1000)]
    leave(streams.pop())
    assert peer.cancelled.wait(1.0)


def test_breaking_out_of_a_loop_cancels(address, peer):
    with Client(address) as client:
        for chunk in client.generate_stream("!slow", max_tokens=1000):
            if chunk.first_index == 2:
                break
        assert peer.cancelled.wait(1.0)


async def test_breaking_out_of_an_async_loop_cancels(address, peer):
    async with AsyncClient(address) as client:
        async for chunk in client.generate_stream("!slow", max_tokens=1000):
            if chunk.first_index == 2:
                break
        assert await asyncio.to_thread(peer.cancelled.wait, 1.0)


async def test_cancelling_the_waiting_task_cancels_the_request(address, peer):
    async with AsyncClient(address) as client:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await client.generate("!hang")
        assert await asyncio.to_thread(peer.cancelled.wait, 1.0)
        peer.cancelled.clear()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(client.generate_stream("!hang")), 0.2)
        assert await asyncio.to_thread(peer.cancelled.wait, 1.0)


async def test_closing_the_client_ends_what_waits_with_a_type(address):
    client = AsyncClient(address)
    stream = client.generate_stream("!hang")
    waiting = [asyncio.create_task(client.generate("!hang")), asyncio.create_task(anext(stream))]
    await asyncio.sleep(0.2)
    await client.close()
    results = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 60)
    assert [type(result) for result in results] == [Cancelled, Cancelled]


async def test_closing_the_plain_client_ends_what_waits_with_a_type(address):
    client = Client(address)
    stream = client.generate_stream("!hang")
    waiting = [asyncio.to_thread(client.generate, "!hang"), asyncio.to_thread(lambda: next(stream))]
    tasks = [asyncio.create_task(one) for one in waiting]
    await asyncio.sleep(0.3)
    client.close()
    results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 60)
    assert [type(result) for result in results] == [Cancelled, Cancelled]


# ---------------------------------------------------------------- deadlines


def test_a_call_ends_at_its_deadline(client, peer):
    started_s = time.monotonic()
    with pytest.raises(DeadlineExceeded, match="timeout_s"):
        client.generate("!hang", timeout_s=0.3)
    with pytest.raises(DeadlineExceeded):
        list(client.generate_stream("!slow", max_tokens=1000, timeout_s=0.3))
    assert time.monotonic() - started_s < 3
    assert peer.cancelled.wait(1.0)
    client.generate("x")
    assert peer.time_left_s[0] < 0.6
    assert 5 < peer.time_left_s[-1] < 11  # the client's own, where a call has none


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan"), float("inf"), "5"])
def test_a_deadline_must_be_a_time(client, timeout_s):
    with pytest.raises(InvalidRequest, match="timeout_s"):
        client.generate("x", timeout_s=timeout_s)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("code", ERROR_BY_CODE)
def test_every_error_of_the_tree_arrives_as_itself(client, code):
    for ask in (lambda p: list(client.generate_stream(p)), client.generate):
        with pytest.raises(TwostrokeError) as caught:
            ask(f"!error {code} 7500")
        assert type(caught.value) is ERROR_BY_CODE[code]
        assert caught.value.message == "naïve ☃ text"
        assert caught.value.param == "sampling.top_p"
        assert caught.value.retry_after_s == 7.5


def test_a_newer_releases_error_is_still_an_error(client, peer, monkeypatch):
    monkeypatch.setattr(InvalidRequest, "code", "from_the_future")
    with pytest.raises(InternalError, match="naïve"):
        client.generate("!error invalid_value 0")


def test_an_error_of_any_length_arrives(client):
    with pytest.raises(InternalError, match="☃☃…") as caught:
        client.generate("!long")
    assert caught.value.param.endswith("x…")


def test_a_busy_server_says_when_to_come_back(client, peer):
    with pytest.raises(Overloaded, match="queue is full") as caught:
        client.generate("!busy")
    assert caught.value.retry_after_s == 2.5
    assert peer.attempts == 1  # RESOURCE_EXHAUSTED is not retried behind the caller's back


def test_what_is_unavailable_for_a_moment_is_tried_again(client, peer):
    assert client.generate("!flaky 2").text
    assert peer.attempts == 3


def test_retries_are_few(client, peer):
    with pytest.raises(Unavailable, match="soon"):
        client.generate("!flaky 50")
    assert peer.attempts == 3


def test_a_server_that_will_be_away_for_long_is_not_pestered(client, peer):
    with pytest.raises(Unavailable) as caught:
        client.generate("!error unavailable 30000")
    assert (peer.attempts, caught.value.retry_after_s) == (1, 30.0)


def test_streams_are_never_retried(client, peer):
    with pytest.raises(Unavailable):
        list(client.generate_stream("!flaky 2"))
    assert peer.attempts == 1


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ("INVALID_ARGUMENT", InvalidRequest),
        ("PERMISSION_DENIED", Unauthenticated),
        ("RESOURCE_EXHAUSTED", Overloaded),
        ("UNIMPLEMENTED", Unavailable),
        ("ABORTED", InternalError),
        ("CANCELLED", Cancelled),
        ("DEADLINE_EXCEEDED", DeadlineExceeded),
    ],
)
def test_a_status_without_our_details_has_a_type_too(client, status, expected):
    for ask in (lambda p: list(client.generate_stream(p)), client.generate):
        with pytest.raises(expected) as caught:
            ask(f"!bare {status}")
        assert type(caught.value) is expected


@pytest.mark.parametrize("prompt", ["!skip", "!repeat", "!short", "!mute"])
def test_a_lost_piece_is_noticed(client, peer, prompt):
    stream = client.generate_stream(prompt, max_tokens=5, n=2)
    with pytest.raises(TokensLost):
        list(stream)
    assert list(stream) == []


# ---------------------------------------------------------------- what never reaches the wire


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"max_tokens": 2**40}, "max_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"seed": 2**64}, "seed"),
        ({"n": 0}, "n"),
        ({"n": -2}, "n"),
        ({"stop": 3}, "stop"),
        ({"stop": ["a", 3]}, "stop"),
        ({"stop": "\ud800"}, "stop"),
        ({"stop_token_ids": [1, -1]}, "stop_token_ids"),
        ({"min_p": "low"}, "min_p"),
        ({"bad_words": 3}, "bad_words"),
        ({"bad_words": ["a", 3]}, "bad_words"),
        ({"logit_bias": {-1: 2.0}}, "logit_bias"),
        ({"logit_bias": {"a": 2.0}}, "logit_bias"),
        ({"logit_bias": [7]}, "logit_bias"),
        ({"logprobs": -1}, "logprobs"),
        ({"prompt_logprobs": 1.5}, "prompt_logprobs"),
        ({"request_id": 7}, "request_id"),
        ({"temperature": [0.5]}, "temperature"),
        ({"seed": [1, 2]}, "seed"),
        ({"ignore_eos": 2**70}, "ignore_eos"),
        ({"ignore_eos": 1}, "ignore_eos"),
        ({"skip_special_tokens": 0}, "skip_special_tokens"),
        ({"temperature": True}, "temperature"),
        ({"max_tokens": True}, "max_tokens"),
        ({"logit_bias": {7: True}}, "logit_bias"),
        ({"logit_bias": {7: 10**400}}, "logit_bias"),
        ({"bad_words": "word"}, "bad_words"),
        ({"bad_words": {"word": 1}}, "bad_words"),
        ({"stop": b"a"}, "stop"),
        ({"stop_token_ids": {}}, "stop_token_ids"),
        ({"n": 1.5}, "n"),
        ({"n": "2"}, "n"),
        ({"n": [2]}, "n"),
        ({"n": 2**40}, "n"),
        ({"seed": -(2**63) - 1}, "seed"),
        ({"seed": 10**5000}, "seed"),
        ({"top_k": -2}, "top_k"),
        ({"priority": 2**40}, "priority"),
        ({"priority": "high"}, "priority"),
        ({"priority": True}, "priority"),
    ],
)
def test_a_value_that_cannot_be_sent_is_named(client, peer, options, param):
    for ask in (client.generate, client.generate_stream):
        with pytest.raises(InvalidRequest) as caught:
            ask("x", **options)
        assert caught.value.param == param
    assert peer.seen == []


def test_numbers_with_a_sign_mean_what_they_mean_over_http(client, peer):
    client.generate("x", seed=-1, top_k=-1, n=None)
    (request,) = peer.seen
    assert (request.sampling.seed, request.sampling.top_k, request.num_choices) == (2**64 - 1, 0, 0)
    assert request.sampling.HasField("top_k")


@pytest.mark.parametrize("prompt", [b"text", {"text": 1}])
def test_a_prompt_whose_parts_would_pass_for_token_ids_is_refused(client, peer, prompt):
    with pytest.raises(InvalidRequest, match="give a list"):
        client.generate(prompt)
    assert peer.seen == []


def piece(choice: int, first_index: int, *token_ids: int, is_finished: bool = False, is_last: bool = False) -> Any:
    finish = common_pb2.FINISH_REASON_STOP if is_finished else common_pb2.FINISH_REASON_UNSPECIFIED
    usage = common_pb2.Usage() if is_last else None
    return inference_pb2.GenerateChunk(
        choice=choice, first_index=first_index, token_ids=token_ids, finish_reason=finish, usage=usage
    )


def test_a_stream_whose_last_piece_comes_before_the_end_of_a_choice_is_incomplete():
    reader = StreamReader(3)
    for message in (piece(0, 0, 5), piece(1, 0, 6, is_finished=True), piece(0, 1, is_finished=True, is_last=True)):
        reader.read(message)
    with pytest.raises(TokensLost, match=r"choices \[2\] are unfinished"):
        reader.finish()


def test_a_choice_that_is_finished_has_no_further_tokens():
    reader = StreamReader(1)
    reader.read(piece(0, 0, 5, is_finished=True))
    with pytest.raises(TokensLost, match="got tokens from index 1"):
        reader.read(piece(0, 1, 6))
    with pytest.raises(TokensLost, match="a piece is of choice 1; asked for 1"):
        reader.read(piece(1, 0, 6))


def test_a_stream_of_more_choices_than_memory_holds_is_the_server_s_to_refuse():
    options = cast(Any, {"n": 2**32 - 1})
    tracemalloc.start()
    try:
        generate_stream("x", options)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ("hi", "messages"),
        ({"role": "user", "content": "x"}, "messages"),
        ([{"role": "user"}], "messages[0]"),
        ([{"role": "user", "content": "x"}, {"role": "user", "content": 3}], "messages[1].content"),
        (["hi"], "messages[0]"),
        ([{"content": "x"}], "messages[0]"),
        ([{"role": "user", "content": "x", "agent": "build"}], "messages[0].agent"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": [{"type": ["text"], "text": "x"}]}], "messages[0].content[0].type"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {"a": 1}}]}],
            "messages[0].content[0].cache_control",
        ),
        ([{"role": "assistant", "content": "x", "name": 3}], "messages[0].name"),
        ([{"role": "assistant", "content": "x", "audio": {"id": "a"}}], "messages[0].audio"),
        ([{"role": "assistant", "tool_calls": "x"}], "messages[0].tool_calls"),
        ([{"role": "assistant", "tool_calls": [{"type": "custom"}]}], "messages[0].tool_calls[0]"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {1, 2}}}]}],
            "messages[0].tool_calls[0].function.arguments",
        ),
    ],
)
def test_messages_of_the_wrong_form_are_named(client, peer, messages, param):
    with pytest.raises(InvalidRequest) as caught:
        client.chat(messages)
    assert caught.value.param == param
    assert peer.seen == []


@pytest.mark.parametrize("prompt", [3, None, [1, "2"], [-1], "\udfff"])
def test_a_prompt_that_is_none_is_named(client, prompt):
    with pytest.raises(InvalidRequest) as caught:
        client.generate(prompt)
    assert caught.value.param == "prompt"


def test_an_unknown_option_names_the_nearest(client):
    with pytest.raises(TypeError, match=r"'max_token'.*did you mean 'max_tokens'"):
        client.generate("x", max_token=3)
