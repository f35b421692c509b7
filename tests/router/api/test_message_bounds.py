"""Bounds of protobuf messages on their bytes: what is read passes, what is too much is refused before it is built."""

import sys

import pytest

from twostroke.core.errors import ContextLengthExceeded, DeadlineExceeded, InvalidRequest
from twostroke.protos import common_pb2, inference_pb2
from twostroke.router.api.grpc import chat_wire, message_bounds
from twostroke.router.api.grpc.call_wire import Said, chat_call, generate_call, tokenize_call
from twostroke.router.api.grpc.message_bounds import MAX_FIELDS, check_bounds

CHAT = inference_pb2.ChatRequest.DESCRIPTOR
GENERATE = inference_pb2.GenerateRequest.DESCRIPTOR
TOKENIZE = inference_pb2.TokenizeRequest.DESCRIPTOR
Message = inference_pb2.ChatMessage
Part = inference_pb2.TextPart


def refused(kind, raw: bytes) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        check_bounds(raw, kind)
    return caught.value


def sampling(**fields) -> bytes:
    return inference_pb2.GenerateRequest(text="x", sampling=common_pb2.SamplingParams(**fields)).SerializeToString()


def test_the_largest_messages_that_are_read_pass():
    parts = [Part(text="x") for _ in range(8)]
    chat = [Message(role="user", parts=parts) for _ in range(2048)]
    check_bounds(inference_pb2.ChatRequest(messages=chat).SerializeToString(), CHAT)
    ids = common_pb2.TokenIds(ids=range(500_000))
    check_bounds(inference_pb2.GenerateRequest(token_ids=ids).SerializeToString(), GENERATE)
    full = {
        "stop": ["x"] * 16,
        "stop_token_ids": range(256),
        "bad_words": ["x"] * 128,
        "logit_bias": dict.fromkeys(range(1024), 1.0),
    }
    check_bounds(sampling(**full), GENERATE)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop_token_ids": range(1000, 1257)}, "stop_token_ids"),
        ({"bad_words": [""] * 129}, "bad_words"),
        ({"logit_bias": dict.fromkeys(range(1025), 1.0)}, "logit_bias"),
    ],
)
def test_one_entry_more_is_refused_by_name_and_bound(fields, param):
    error = refused(GENERATE, sampling(**fields))
    assert error.param == param
    assert str(len(next(iter(fields.values()))) - 1) in error.message


def test_more_token_ids_than_any_prompt_has_are_not_built():
    ids = common_pb2.TokenIds(ids=[1] * (message_bounds.MAX_ENTRIES["ids"] + 1))
    assert refused(GENERATE, inference_pb2.GenerateRequest(token_ids=ids).SerializeToString()).param == "ids"


def test_entries_count_over_the_whole_message_however_they_are_spread():
    once = b"\x22\x03\x32\x01x"  # sampling { stop: "x" }: repeated, it is merged
    check_bounds(once * 16, GENERATE)
    assert refused(GENERATE, once * 17).param == "stop"
    unpacked = b"\x22\x02\x38\x05"
    assert refused(GENERATE, unpacked * 257).param == "stop_token_ids"


@pytest.mark.parametrize("name", ["messages", "parts", "tool_calls"])
def test_messages_and_what_is_in_them_are_counted(name):
    inner = {"messages": b"\x12\x00", "parts": b"\x12\x02\x1a\x00", "tool_calls": b"\x12\x02\x2a\x00"}[name]
    most = message_bounds.MAX_ENTRIES[name]
    raw = inner * (most + 1) if name == "messages" else _one_message(inner[2:] * (most + 1))
    assert refused(CHAT, raw).param == name


def _one_message(body: bytes) -> bytes:
    size = len(body)
    return b"\x12" + bytes([size & 0x7F | 0x80, size >> 7 & 0x7F | 0x80, size >> 14]) + body


def test_the_chat_of_tokenize_is_counted_too():
    chat = inference_pb2.TokenizeChat(messages=[Message()] * 2049)
    assert refused(TOKENIZE, inference_pb2.TokenizeRequest(chat=chat).SerializeToString()).param == "messages"


@pytest.mark.parametrize("field", [b"\xa0\x06\x00", b"\x12\x00", b"\xa5\x06\0\0\0\0", b"\xa1\x06" + bytes(8)])
def test_fields_of_any_kind_are_counted(field):
    check_bounds(field * MAX_FIELDS, GENERATE)
    assert "fields" in refused(GENERATE, field * (MAX_FIELDS + 1)).message


@pytest.mark.parametrize(
    "raw",
    [
        b"\x12",
        b"\x12\x05x",
        b"\x12\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
        b"\xa0\x06" + b"\x80" * 1000,
        b"\xa3\x06\xa4\x06",
        b"\x0f",
        b"\xa1\x06\0",
        b"\x22\x05\x32\x09xxxxxxxxxx",
    ],
    ids=lambda raw: raw[:12].hex(),
)
def test_bytes_that_are_no_message_are_refused(raw):
    assert "cannot be read" in refused(GENERATE, raw).message


def test_the_walk_stops_at_the_bound(monkeypatch):
    seen = 0

    def counted(raw, place):
        nonlocal seen
        seen += 1
        return varint(raw, place)

    varint = message_bounds._varint
    monkeypatch.setattr(message_bounds, "_varint", counted)
    refused(CHAT, b"\x12\x00" * 1_000_000)
    assert seen <= 2 * 2049


# ---------------------------------------------------------------- messages as calls


class _Models:
    def facts(self, name: str) -> "_Models":
        return self

    max_model_len = 100


def said(message, left_s: float | None = 5.0) -> Said:
    return Said(message, None, left_s, _Models())  # type: ignore[arg-type]


def test_ids_beyond_the_context_are_never_copied():
    fits = inference_pb2.GenerateRequest(token_ids=common_pb2.TokenIds(ids=range(99)))
    assert generate_call(said(fits)).prompt == list(range(99))
    with pytest.raises(ContextLengthExceeded, match="has 100 tokens; the model's context is 100"):
        generate_call(said(inference_pb2.GenerateRequest(token_ids=common_pb2.TokenIds(ids=range(100)))))


@pytest.mark.parametrize("left_s", [0.0, -1.0])
def test_a_deadline_that_is_over_is_not_none(left_s):
    chat = inference_pb2.ChatRequest(messages=[Message(role="user", content="x")])
    tokenize = inference_pb2.TokenizeRequest(text="x")
    for read, message in (
        (generate_call, inference_pb2.GenerateRequest(text="x")),
        (chat_call, chat),
        (tokenize_call, tokenize),
    ):
        with pytest.raises(DeadlineExceeded):
            read(said(message, left_s))
        assert read(said(message, None)).timeout_s is None
        assert read(said(message, 3.0)).timeout_s == 3.0


@pytest.mark.parametrize(
    "text",
    ["[" + "[]," * 20_000 + "[]]", '{"a":[' + "1," * 20_000 + "1]}", '["' + '","' * 40_000 + '"]'],
    ids=["lists", "numbers", "texts"],
)
def test_json_with_too_many_values_is_not_parsed(text, monkeypatch):
    monkeypatch.setattr(chat_wire.json, "loads", lambda *_, **__: pytest.fail("it was parsed"))
    with pytest.raises(InvalidRequest, match="at most") as caught:
        chat_wire.template_options(inference_pb2.ChatOptions(documents=text))
    assert caught.value.param == "documents"


def test_marks_within_texts_are_no_values():
    text = '[{"text":"' + 'a, [b], {c}, \\\\ \\" ' * 20_000 + '"}]'
    (document,) = chat_wire.template_options(inference_pb2.ChatOptions(documents=text))["documents"]
    assert sys.getsizeof(document["text"]) > 200_000
