"""Hostile inputs by the hundred: size × shape × field × face, with and without a key, drawn from a seed.

Fields come from the API's own lists and message descriptors, so that a field that is added is drawn, too.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from attack import Body, Built, Input, Message
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from pydantic import BaseModel

from twostroke.protos import inference_pb2
from twostroke.router.api.dialects.anthropic_requests import MessagesBody
from twostroke.router.api.dialects.ollama_requests import OllamaChat, OllamaGenerate
from twostroke.router.api.fields import ACCEPTED, REFUSED, ChatBody, CompletionBody

SIZES = (64 << 10, 512 << 10, (4 << 20) - 4096)
SHARE_WITH_KEY = 0.7

# ------------------------------------------------------------------ JSON

JSON_SHAPES: dict[str, Callable[[int, random.Random], str]] = {
    "ints": lambda size, _: "[" + "1," * (size // 2) + "1]",
    "big ints": lambda size, _: "[" + f"{2**62}," * (size // 20) + "1]",
    "one long int": lambda size, _: "1" * size,
    "floats": lambda size, _: "[" + "0.1," * (size // 4) + "1]",
    "mixed list": lambda size, _: "[" + '1,"a",' * (size // 6) + "1]",
    "empty lists": lambda size, _: "[" + "[]," * (size // 3) + "[]]",
    "lists of one": lambda size, _: "[" + "[1]," * (size // 4) + "[1]]",
    "empty objects": lambda size, _: "[" + "{}," * (size // 3) + "{}]",
    "short texts": lambda size, _: "[" + '"a",' * (size // 4) + '"a"]',
    "nulls": lambda size, _: "[" + "null," * (size // 5) + "null]",
    "many keys": lambda size, _: "{" + ",".join(f'"k{n:07}":1' for n in range(size // 13)) + "}",
    "one key again and again": lambda size, _: "{" + '"k":1,' * (size // 6) + '"k":1}',
    "deep lists": lambda size, _: "[" * (size // 2) + "]" * (size // 2),
    "deep objects": lambda size, _: '{"a":' * (size // 6) + "1" + "}" * (size // 6),
    "long text": lambda size, _: '"' + "a" * size + '"',
    "words": lambda size, draw: '"' + " ".join(_word(draw) for _ in range(size // 6)) + '"',
    "spaces": lambda size, _: '"' + " " * size + '1"',
    "newlines": lambda size, _: '"' + "\\n" * (size // 2) + '1"',
    "escapes": lambda size, _: '"' + "\\u0041" * (size // 6) + '"',
    "marks": lambda size, _: '"' + "e\u0301" * (size // 3) + '"',
    "quotes": lambda size, _: '"' + '\\"' * (size // 2) + '"',
    "blanks around": lambda size, _: " " * size + "1",
    "messages": lambda size, _: (
        "[" + '{"role":"user","content":"hi"},' * (size // 31) + '{"role":"user","content":""}]'
    ),
    "one message of parts": lambda size, _: (
        '[{"role":"user","content":[' + '{"type":"text","text":"a"},' * (size // 27) + '{"type":"text","text":"a"}]}]'
    ),
    "one message of calls": lambda size, _: (
        '[{"role":"user","content":"a"},{"role":"assistant","tool_calls":[{"id":"1","type":"function","function":'
        '{"name":"f","arguments":[' + "[]," * (size // 3) + "[]]}}]}]"
    ),
    "a message of many fields": lambda size, _: (
        '[{"role":"user","content":"a",' + ",".join(f'"k{n:07}":1' for n in range(size // 13)) + "}]"
    ),
}

_TURNS = '[{"role":"user","content":"hi"}]'
_OLLAMA = '"model":"twostroke-bundled","options":{"num_predict":2}'


@dataclass(frozen=True)
class _Face:
    """A path: its body, a usual value of the field that it must have, and fields for the model and a short answer."""

    body: type[BaseModel]
    largest: tuple[str, ...]  # fields that hold the most, the necessary one first
    usual: str
    short: str = '"model":"twostroke-bundled","max_tokens":2'


_FACES = {
    "/v1/completions": _Face(CompletionBody, ("prompt",), '"hi"'),
    "/v1/chat/completions": _Face(ChatBody, ("messages", "chat_template_kwargs", "tools", "response_format"), _TURNS),
    "/v1/messages": _Face(MessagesBody, ("messages", "system", "tools"), _TURNS),
    "/api/chat": _Face(OllamaChat, ("messages", "tools", "format"), _TURNS, _OLLAMA),
    "/api/generate": _Face(OllamaGenerate, ("prompt", "system", "format"), '"hi"', _OLLAMA),
}


def _word(draw: random.Random) -> str:
    return "".join(draw.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(5))


def _json(path: str, field: str, shape: str, size: int, seed: int) -> Body:
    value = JSON_SHAPES[shape](size, random.Random(seed))
    face = _FACES[path]
    name = face.largest[0]
    rest = "" if field == name else f'"{name}":{face.usual},'
    return Body(path, f'{{{rest}{face.short},"{field}":{value}}}'.encode())


def _unknown_names(path: str, size: int) -> Body:
    face = _FACES[path]
    names = ",".join(f'"unknown_{number}":1' for number in range(size // 19))
    return Body(path, f'{{"{face.largest[0]}":{face.usual},{face.short},{names}}}'.encode())


# ------------------------------------------------------------------ protobuf


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _tagged(number: int, wire_type: int) -> bytes:
    return _varint(number << 3 | wire_type)


def _framed(number: int, data: bytes) -> bytes:
    return _tagged(number, 2) + _varint(len(data)) + data


def _nested(number: int, size: int) -> bytes:
    data = b""
    while len(data) < min(size, 4096):
        data = _framed(number, data)
    return data * (size // len(data))


MESSAGE_SHAPES: dict[str, Callable[[int, int], bytes]] = {
    "empty, again and again": lambda number, size: _framed(number, b"") * (size // 2),
    "a byte, again and again": lambda number, size: _framed(number, b"a") * (size // 3),
    "long": lambda number, size: _framed(number, b"a" * size),
    "spaces": lambda number, size: _framed(number, b" " * size + b"1"),
    "packed ones": lambda number, size: _framed(number, b"\x01" * size),
    "varints": lambda number, size: (_tagged(number, 0) + b"\x01") * (size // 2),
    "not of UTF-8": lambda number, size: _framed(number, b"\xff" * size),
    "nested": _nested,
    "groups": lambda number, size: _tagged(number, 3) * (size // 4) + _tagged(number, 4) * (size // 4),
    "cut short": lambda number, size: _tagged(number, 2) + _varint(size * 2) + b"a" * size,
}
_RPCS = {
    "Generate": inference_pb2.GenerateRequest,
    "GenerateStream": inference_pb2.GenerateRequest,
    "Chat": inference_pb2.ChatRequest,
    "ChatStream": inference_pb2.ChatRequest,
    "Tokenize": inference_pb2.TokenizeRequest,
    "Abort": inference_pb2.AbortRequest,
    "Explain": inference_pb2.ExplainRequest,
}


def _paths(descriptor: Descriptor, depth: int = 3) -> list[tuple[FieldDescriptor, ...]]:
    """Every way to a field, through at most `depth` messages."""
    found: list[tuple[FieldDescriptor, ...]] = []
    for field in descriptor.fields:
        found.append((field,))
        if field.message_type is not None and depth > 1:
            found += [(field, *rest) for rest in _paths(field.message_type, depth - 1)]
    return found


def _message(rpc: str, path: tuple[int, ...], shape: str, size: int) -> Message:
    data = MESSAGE_SHAPES[shape](path[-1], size)
    for number in reversed(path[:-1]):
        data = _framed(number, data)
    usual: Any = _RPCS[rpc]()
    if "Generate" in rpc and path[0] not in (2, 3):
        usual.text = "hi"
    if "Chat" in rpc:
        usual.messages.add(role="user", content="hi")
    return Message(rpc, usual.SerializeToString() + data)


# ------------------------------------------------------------------ drawn


def fuzzed(number: int, seed: int) -> list[Input]:
    """`number` inputs, half of them over each face."""
    draw = random.Random(seed)
    return [_drawn_http(draw, n) if n % 2 else _drawn_grpc(draw, n) for n in range(number)]


def _drawn_http(draw: random.Random, number: int) -> Input:
    path, has_key, size = draw.choice(list(_FACES)), draw.random() < SHARE_WITH_KEY, draw.choice(SIZES)
    face = _FACES[path]
    fields = sorted({*face.body.model_fields})
    others = [*sorted(ACCEPTED), *sorted(REFUSED), "unknown", "x" * 300]
    field, shape = draw.choice(draw.choice((fields, fields, others))), draw.choice(list(JSON_SHAPES))
    if draw.random() < 0.2:
        field = draw.choice(face.largest)
    if draw.random() < 0.05:
        return _input(f"http {path} unknown names", size, has_key, lambda: _unknown_names(path, size))
    seed = draw.randrange(1 << 30)
    name = f"http {path} {field[:20]}: {shape}"
    return _input(name, size, has_key, lambda: _json(path, field, shape, size, seed))


def _drawn_grpc(draw: random.Random, number: int) -> Input:
    rpc, has_key, size = draw.choice(list(_RPCS)), draw.random() < SHARE_WITH_KEY, draw.choice(SIZES)
    fields = draw.choice(_paths(_RPCS[rpc].DESCRIPTOR))
    shape = draw.choice(list(MESSAGE_SHAPES))
    numbers = tuple(field.number for field in fields)
    name = f"grpc {rpc} {'.'.join(field.name for field in fields)}: {shape}"
    return _input(name, size, has_key, lambda: _message(rpc, numbers, shape, size))


def _input(name: str, size: int, has_key: bool, build: Callable[[], Built]) -> Input:
    return Input(f"{name}, {size >> 10} KiB{'' if has_key else ', no key'}", build, has_key)
