"""Hostile messages of the clients' gRPC port, by name: which method, which bytes. All within 4 MiB; knows no server.

Each is small on the wire and large in another way: objects, entries, depth, numbers, texts, or time to refuse it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from twostroke.protos import common_pb2, inference_pb2

MOST_BYTES = 4 << 20

INFERENCE = "/twostroke.v1.Inference/"
_CHAT, _CHAT_STREAM = INFERENCE + "Chat", INFERENCE + "ChatStream"
_GENERATE, _GENERATE_STREAM = INFERENCE + "Generate", INFERENCE + "GenerateStream"
_TOKENIZE = INFERENCE + "Tokenize"
_INFER_METHOD = "/inference.GRPCInferenceService/ModelInfer"
_INFER = {  # repeated fields of KServe's request
    "empty inputs": b"\x2a\x00",
    "empty outputs": b"\x32\x00",
    "empty data": b"\x3a\x00",
    "empty parameters": b"\x22\x00",
}
_HEALTH = "/grpc.health.v1.Health/"
_REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"


@dataclass(frozen=True, slots=True)
class HostileMessage:
    """One message. `raw` makes its bytes, which nobody keeps."""

    name: str
    method: str
    raw: Callable[[], bytes]


def hostile_messages(most_bytes: int = MOST_BYTES) -> Iterator[HostileMessage]:
    """All of them, as long as `most_bytes` allows."""
    room = most_bytes - 64  # what surrounds the repeated part
    for method in (_CHAT, _CHAT_STREAM, _TOKENIZE):
        yield HostileMessage(
            f"{_short(method)}: empty messages", method, lambda m=method: _messages(m, b"\x12\x00", room)
        )
        yield HostileMessage(
            f"{_short(method)}: one message of empty parts",
            method,
            lambda m=method: _messages(m, _field(2, b"\x1a\x00" * (room // 2)), 1),
        )
        yield HostileMessage(
            f"{_short(method)}: one message of empty tool calls",
            method,
            lambda m=method: _messages(m, _field(2, b"\x2a\x00" * (room // 2)), 1),
        )
        yield HostileMessage(
            f"{_short(method)}: messages with a role and a part",
            method,
            lambda m=method: _messages(m, _field(2, b"\x0a\x04user\x1a\x03\x0a\x01x"), room),
        )
        yield HostileMessage(
            f"{_short(method)}: a role of one long text",
            method,
            lambda m=method: _messages(m, _field(2, _field(1, b"u" * room)), 1),
        )
        yield HostileMessage(
            f"{_short(method)}: spaces",
            method,
            lambda m=method: _messages(m, _field(2, b"\x0a\x04user" + _field(2, b" " * (room - 8) + b"1")), 1),
        )
    for method in (_GENERATE, _GENERATE_STREAM):
        for name, entry in _ENTRIES.items():
            yield HostileMessage(
                f"{_short(method)}: {name}",
                method,
                lambda e=entry: b"\x12\x01x" + _field(4, e * (room // len(e))),
            )
        yield HostileMessage(
            f"{_short(method)}: packed stop_token_ids",
            method,
            lambda: b"\x12\x01x" + _field(4, _field(7, b"\x00" * room)),
        )
        yield HostileMessage(
            f"{_short(method)}: sampling again and again",
            method,
            lambda: b"\x12\x01x" + _field(4, b"\x32\x01x") * (room // 5),
        )
        yield HostileMessage(f"{_short(method)}: packed ids", method, lambda: _field(3, _field(1, b"\x05" * room)))
        yield HostileMessage(
            f"{_short(method)}: packed ids of five bytes",
            method,
            lambda: _field(3, _field(1, b"\xff\xff\xff\xff\x0f" * (room // 5))),
        )
        yield HostileMessage(
            f"{_short(method)}: ids that are not packed", method, lambda: _field(3, b"\x08\x05" * (room // 2))
        )
        yield HostileMessage(f"{_short(method)}: prompts again and again", method, lambda: b"\x12\x01x" * (room // 3))
        yield HostileMessage(
            f"{_short(method)}: unknown numbers", method, lambda: b"\x12\x01x" + b"\xa0\x06\x00" * (room // 3)
        )
        yield HostileMessage(
            f"{_short(method)}: one unknown field", method, lambda: b"\x12\x01x" + _field(100, b"x" * room)
        )
        yield HostileMessage(f"{_short(method)}: a long user", method, lambda: b"\x12\x01x" + _field(7, b"u" * room))
        yield HostileMessage(f"{_short(method)}: a long model", method, lambda: b"\x12\x01x" + _field(1, b"m" * room))
        yield HostileMessage(
            f"{_short(method)}: a long request id", method, lambda: b"\x12\x01x" + _field(6, b"r" * room)
        )
        yield HostileMessage(f"{_short(method)}: a long text", method, lambda: _field(2, b"word " * (room // 5)))
        yield HostileMessage(
            f"{_short(method)}: a text of wide characters",
            method,
            lambda: _field(2, "\U0001f600".encode() * (room // 4)),
        )
        yield HostileMessage(f"{_short(method)}: invalid UTF-8", method, lambda: _field(2, b"x" * room + b"\xff"))
        yield HostileMessage(f"{_short(method)}: nested groups", method, lambda: b"\xa3\x06" * (room // 2))
        yield HostileMessage(
            f"{_short(method)}: a number without end", method, lambda: b"\x12\x01x\xa0\x06" + b"\x80" * room
        )
        yield HostileMessage(
            f"{_short(method)}: a length beyond the end", method, lambda: b"\x12\xff\xff\xff\xff\x0f" + b"x" * room
        )
        yield HostileMessage(f"{_short(method)}: noise", method, lambda: bytes(range(256)) * (room // 256))
        yield HostileMessage(
            f"{_short(method)}: bad words, as many and long as there may be",
            method,
            lambda: inference_pb2.GenerateRequest(
                text="x",
                num_choices=8,
                sampling=common_pb2.SamplingParams(
                    max_tokens=1, bad_words=[f"{n:03}" + "\U0001f600" * 253 for n in range(128)]
                ),
            ).SerializeToString(),
        )
    for name, text in _JSON_TEXTS.items():
        for field in ("chat_template_kwargs", "documents"):
            yield HostileMessage(
                f"Chat: {field} of {name}",
                _CHAT,
                lambda f=field, t=text: inference_pb2.ChatRequest(
                    messages=[inference_pb2.ChatMessage(role="user", content="x")],
                    options=inference_pb2.ChatOptions(**{f: t(room - 64)}),
                ).SerializeToString(),
            )
    for name, entry in _INFER.items():
        yield HostileMessage(f"ModelInfer: {name}", _INFER_METHOD, lambda e=entry: e * (room // len(e)))
    yield HostileMessage("ModelInfer: a long name", _INFER_METHOD, lambda: _field(5, _field(1, b"n" * room)))
    yield HostileMessage("ModelInfer: packed shape", _INFER_METHOD, lambda: _field(5, _field(3, b"\x01" * room)))
    yield HostileMessage(
        "ModelInfer: packed numbers", _INFER_METHOD, lambda: _field(5, _field(5, _field(3, b"\x01" * room)))
    )
    for method in ("Explain", "Abort"):
        yield HostileMessage(f"{method}: a long request id", INFERENCE + method, lambda: _field(1, b"r" * room))
    for method in ("ListModels", "Cluster"):
        yield HostileMessage(f"{method}: unknown numbers", INFERENCE + method, lambda: b"\xa0\x06\x00" * (room // 3))
    for method in (_HEALTH + "Check", _HEALTH + "Watch"):
        yield HostileMessage(f"{_short(method)}: a long name", method, lambda: _field(1, b"s" * room))
        yield HostileMessage(f"{_short(method)}: unknown numbers", method, lambda: b"\xa0\x06\x00" * (room // 3))
    yield HostileMessage("reflection: a long symbol", _REFLECTION, lambda: _field(4, b"s" * room))
    yield HostileMessage("reflection: unknown numbers", _REFLECTION, lambda: b"\xa0\x06\x00" * (room // 3))
    yield HostileMessage("a method that is not there", INFERENCE + "Nothing", lambda: b"\x12\x00" * (room // 2))


# Entries of SamplingParams on the wire.
_ENTRIES = {
    "empty stop": b"\x32\x00",
    "stop of one letter": b"\x32\x01x",
    "stop_token_ids that are not packed": b"\x38\x05",
    "empty logit_bias": b"\x72\x00",
    "logit_bias": b"\x72\x0b\x08\x05\x11\x00\x00\x00\x00\x00\x00\xf0\x3f",
    "empty bad_words": b"\x7a\x00",
    "empty bad_word_ids": b"\x82\x01\x00",
    "temperatures": b"\x11\x00\x00\x00\x00\x00\x00\xf0\x3f",
}

_JSON_TEXTS: dict[str, Callable[[int], str]] = {
    "empty lists": lambda room: "[" + "[]," * (room // 3 - 2) + "[]]",
    "names": lambda room: "{" + ",".join(f'"a{n}":0' for n in range(room // 13)) + "}",
    "numbers": lambda room: '{"a":[' + "1," * (room // 2 - 8) + "1]}",
    "one long number": lambda room: '{"a":' + "1" * (room - 8) + "}",
    "depth": lambda room: "[" * (room // 2) + "]" * (room // 2),
    "objects in depth": lambda room: '{"a":' * (room // 6) + "1" + "}" * (room // 6),
    "one long text": lambda room: json.dumps([{"text": "x, " * (room // 3 - 10)}]),
    "escapes": lambda room: '{"a":"' + "\\u0041" * (room // 6 - 4) + '"}',
}


def _messages(method: str, field: bytes, room: int) -> bytes:
    """As many of a field of messages as fit, where the method has it."""
    if method != _TOKENIZE:
        return field * max(1, room // len(field))
    inner = field.replace(b"\x12", b"\x0a", 1) * max(1, room // len(field))  # TokenizeChat has messages as 1
    return _field(3, inner)


def _field(number: int, value: bytes) -> bytes:
    """A field of bytes, a text or a message."""
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def _short(method: str) -> str:
    return method.rpartition("/")[2]
