"""Hostile inputs that stopped this server, or others, once; each by hand."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import partial
from typing import Any

from attack import Behaviour, Body, Built, Input, Message
from connections import BEHAVIOURS, LARGEST

# ------------------------------------------------------------------ bodies


def completion(**fields: Any) -> Body:
    """A body of plain JSON."""
    return Body("/v1/completions", json.dumps({"prompt": "hi", "max_tokens": 2} | fields).encode())


def chat(**fields: Any) -> Body:
    """A body of plain JSON."""
    usual = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    return Body("/v1/chat/completions", json.dumps(usual | fields).encode())


def anthropic(below: str = "", **fields: Any) -> Body:
    """A body of Anthropic's."""
    usual = {"model": "twostroke-bundled", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    return Body(f"/v1/messages{below}", json.dumps(usual | fields).encode())


def ollama(**fields: Any) -> Body:
    """A body of Ollama's."""
    usual = {"messages": [{"role": "user", "content": "hi"}], "options": {"num_predict": 2}}
    return Body("/api/chat", json.dumps({"model": "twostroke-bundled"} | usual | fields).encode())


def tool(schema: dict[str, Any], number: int = 0) -> dict[str, Any]:
    """A function with one argument of this schema."""
    parameters = {"type": "object", "properties": {"x": schema}}
    return {"type": "function", "function": {"name": f"f{number}", "parameters": parameters}}


def raw(text: str, path: str = "/v1/completions") -> Body:
    """A body that no library would write."""
    return Body(path, text.encode())


def words(size: int) -> str:
    """English-looking text of `size` bytes."""
    draw = random.Random(size)
    return " ".join("".join(draw.choices("etaoinshrdlu", k=draw.randint(1, 9))) for _ in range(size // 6))[:size]


_BODIES: dict[str, Callable[[], Built]] = {
    "stop: 2 M numbers": lambda: raw('{"prompt":"x","stop":[1' + ",1" * 2_050_000 + "]}"),
    "messages: 2 M numbers": lambda: raw('{"messages":[1' + ",1" * 2_050_000 + "]}", "/v1/chat/completions"),
    "prompt: 1 M of ids and texts": lambda: raw('{"prompt":[1' + ',"a"' * 1_000_000 + "]}"),
    "prompt: 2 M ids": lambda: raw('{"prompt":[1' + ",1" * 2_050_000 + "]}"),
    "prompt: 900,000 lists": lambda: raw('{"prompt":[' + "[1]," * 900_000 + "[1]]}"),
    "370,000 unknown fields": lambda: raw(
        '{"prompt":"x",' + ",".join(f'"u{number}":1' for number in range(370_000)) + "}"
    ),
    "one unknown field of 4 MB": lambda: raw('{"prompt":"x","' + "u" * LARGEST + '":1}'),
    "a message of 270,000 unknown fields": lambda: raw(
        '{"messages":[{"role":"user","content":"x",' + ",".join(f'"u{n}":1' for n in range(270_000)) + "}]}",
        "/v1/chat/completions",
    ),
    "chat_template_kwargs: 300,000 names": lambda: chat(chat_template_kwargs={f"k{n}": 1 for n in range(300_000)}),
    "arguments: 1.3 M lists": lambda: raw(
        '{"messages":[{"role":"user","content":"x"},{"role":"assistant","tool_calls":[{"id":"1","type":"function",'
        '"function":{"name":"f","arguments":[' + "[]," * 1_300_000 + "[]]}}]}]}",
        "/v1/chat/completions",
    ),
    "deep lists": lambda: raw('{"prompt":' + "[" * 2_000_000 + "]" * 2_000_000 + "}"),
    "a role of 1 MB": lambda: chat(messages=[{"role": "r" * 1_000_000, "content": "x"}]),
    "a prompt of 128 KiB": lambda: completion(prompt=words(128 << 10)),
    "a prompt of 512 KiB": lambda: completion(prompt=words(512 << 10)),
    "a prompt of 4 MiB": lambda: completion(prompt=words(LARGEST - 100)),
    "4 MB of spaces": lambda: completion(prompt=" " * (LARGEST - 100) + "1"),
    "4 MB without a space": lambda: completion(prompt="a" * (LARGEST - 100)),
    "a chat of 4 MB": lambda: chat(messages=[{"role": "user", "content": words(LARGEST - 200)}]),
    "a chat of 2,000 messages": lambda: chat(messages=[{"role": "user", "content": words(1_000)}] * 2_000),
    "128 bad words of 1 KB": lambda: completion(bad_words=["\U0001f600" * 256] * 128),
    "1,024 biases": lambda: completion(logit_bias={str(n): 1.0 for n in range(1_024)}),
    "prompt_logprobs of 4,000 tokens": lambda: completion(prompt=list(range(100, 1_100)) * 3, prompt_logprobs=5),
    "64 prompts with their scores": lambda: completion(prompt=[words(500)] * 64, prompt_logprobs=3, max_tokens=1),
    "a list of 1,000 prompts": lambda: completion(prompt=["hi"] * 1_000),
    "a tool of 4 MB": lambda: chat(tools=[tool({"enum": ["x" * 100] * 38_000})], tool_choice="required"),
    "128 tools of 30 KB": lambda: chat(tools=[tool({"enum": ["x" * 100] * 290}, n) for n in range(128)]),
    "a schema that is slow to compile": lambda: completion(
        guided_json={"allOf": [{"type": "string", "pattern": f".*a{n}.*"} for n in range(200)]}
    ),
    "a schema of 600,000 values": lambda: raw('{"prompt":"x","guided_json":{"enum":[' + "1," * 600_000 + "1]}}"),
    "a regex of 100 M repeats": lambda: completion(guided_regex="((((a{100}){100}){100}){100})"),
    "Anthropic: a system of 4 MB": lambda: anthropic(system=words(LARGEST - 200)),
    "Anthropic: 2,000 messages of 1 KB": lambda: anthropic(
        messages=[{"role": "user", "content": words(1_000)}] * 2_000
    ),
    "Anthropic: 130,000 blocks": lambda: anthropic(
        messages=[{"role": "user", "content": [{"type": "text", "text": "x"}] * 130_000}]
    ),
    "Anthropic: 4 MB to count": lambda: anthropic("/count_tokens", system=words(LARGEST - 200)),
    "Ollama: a chat of 4 MB": lambda: ollama(messages=[{"role": "user", "content": words(LARGEST - 200)}]),
    "Ollama: 130,000 stops": lambda: ollama(options={"stop": ["x"] * 130_000}),
}

# ------------------------------------------------------------------ messages

_MESSAGES: dict[str, Callable[[], Built]] = {
    "2 M empty messages": lambda: Message("Chat", b"\x12\x00" * (LARGEST // 2)),
    "2 M empty parts": lambda: Message("Chat", _framed(2, b"\x0a\x04user" + b"\x1a\x00" * (LARGEST // 2 - 10))),
    "4 M token ids": lambda: Message("Generate", _framed(3, _framed(1, b"\x01" * (LARGEST - 20)))),
    "4 M stop ids": lambda: Message("Generate", b"\x12\x02hi" + _framed(4, _framed(7, b"\x01" * (LARGEST - 20)))),
    "2 M empty stops": lambda: Message("Generate", b"\x12\x02hi" + _framed(4, b"\x32\x00" * (LARGEST // 2 - 20))),
    "2 M unknown fields": lambda: Message("Generate", b"\x12\x02hi" + b"\x78\x01" * (LARGEST // 2 - 20)),
    "a text of 4 MB": lambda: Message("Generate", _framed(2, words(LARGEST - 20).encode())),
    "4 MB to count": lambda: Message("Tokenize", _framed(2, words(LARGEST - 20).encode())),
}


def _framed(number: int, data: bytes) -> bytes:
    length, out = len(data), bytearray([number << 3 | 2])
    while length > 127:
        out.append(length & 127 | 128)
        length >>= 7
    return bytes([*out, length]) + data


def _all() -> list[Input]:
    found = []
    for face, builds in (("http", _BODIES), ("grpc", _MESSAGES)):
        for name, build in builds.items():
            found += [Input(f"{face} {name}", build), Input(f"{face} {name}, no key", build, has_key=False)]
    return found + [Input(name, partial(_given, one)) for name, one in BEHAVIOURS.items()]


def _given(behaviour: Behaviour) -> Behaviour:
    return behaviour


KNOWN = _all()
