"""Hostile inputs that stopped this server, or others, once; each by hand."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import grpc
from attack import ANSWER_S, Behaviour, Body, Built, Input, Message
from neighbours import Served

LARGEST = (4 << 20) - 4096  # a body, just within the limit
FEW_IDLE, MANY_IDLE, HELD_BODIES = 625, 1_500, 150
HALF_HEADS, SILENT_GRPC, SILENT_CHECKS = 1_100, 400, 60
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
HOLD_S = 4.0

# ------------------------------------------------------------------ bodies


def completion(**fields: Any) -> Body:
    """A body of plain JSON."""
    return Body("/v1/completions", json.dumps({"prompt": "hi", "max_tokens": 2} | fields).encode())


def chat(**fields: Any) -> Body:
    """A body of plain JSON."""
    usual = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    return Body("/v1/chat/completions", json.dumps(usual | fields).encode())


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


# ------------------------------------------------------------------ connections


def _connect(served: Served) -> socket.socket:
    return socket.create_connection(("127.0.0.1", served.port), timeout=10)


def idle(served: Served, number: int) -> str:
    """Connections that say nothing."""
    with ExitStack() as stack, suppress(OSError):
        for _ in range(number):
            stack.enter_context(_connect(served))
        time.sleep(HOLD_S)
    return "held"


def half_heads(served: Served) -> str:
    """Connections that stop in the midst of a header, more than are taken; what others get meanwhile."""
    told = []
    with ExitStack() as stack, suppress(OSError):
        for _ in range(HALF_HEADS):
            stack.enter_context(_connect(served)).sendall(b"GET /health HTTP/1.1\r\nA: ")
        for _ in range(5):
            time.sleep(HOLD_S / 5)
            with _connect(served) as sock:
                sock.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
                told.append(sock.recv(64).split(b" ")[1].decode())
    return "others: " + " ".join(told)


def silent_grpc(served: Served, first: bytes) -> str:
    """Connections to the gRPC port that say nothing, or nothing more than HTTP/2's first words."""
    with ExitStack() as stack, suppress(OSError):
        for _ in range(SILENT_GRPC):
            sock = socket.create_connection(("127.0.0.1", served.grpc_port), timeout=10)
            stack.enter_context(sock).sendall(first)
        time.sleep(HOLD_S / 2)
        return _probe(served)
    return "refused"


def silent_checks(served: Served) -> str:
    """Health checks that send no message."""
    with grpc.insecure_channel(f"127.0.0.1:{served.grpc_port}") as channel:
        quiet = threading.Event()
        calls = [channel.stream_stream("/grpc.health.v1.Health/Check")(_waits(quiet)) for _ in range(SILENT_CHECKS)]
        time.sleep(HOLD_S / 2)
        told = _probe(served)
        quiet.set()
        for call in calls:
            call.cancel()
    return told


def _waits(quiet: threading.Event) -> Iterator[bytes]:
    quiet.wait(ANSWER_S)
    yield from ()


def _probe(served: Served) -> str:
    """What a health check is answered that means it."""
    with grpc.insecure_channel(f"127.0.0.1:{served.grpc_port}", (("grpc.use_local_subchannel_pool", 1),)) as channel:
        try:
            channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=10)
        except grpc.RpcError as error:
            return f"a probe: {error.code().name}"  # type: ignore[attr-defined]
    return "a probe: OK"


def held_bodies(served: Served) -> str:
    """Bodies that stop ten bytes short of their end."""
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {LARGEST}\r\n"
    head += f"Authorization: Bearer {served.key}\r\nContent-Type: application/json\r\n\r\n"
    data = head.encode() + b" " * (LARGEST - 10)
    with ExitStack() as stack:
        for _ in range(HELD_BODIES):
            with suppress(OSError):
                sock = stack.enter_context(_connect(served))
                sock.settimeout(0.5)
                sock.sendall(data)
        time.sleep(HOLD_S)
    return "held"


def endless_head(served: Served) -> str:
    """Header lines that do not end, in one connection."""
    with suppress(OSError), _connect(served) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n")
        for number in range(40_000):
            sock.sendall(b"X-H%d: " % number + b"v" * 4_000 + b"\r\n")
    return "cut off"


def endless_line(served: Served) -> str:
    """A first line that does not end."""
    with suppress(OSError), _connect(served) as sock:
        sock.sendall(b"GET /")
        for _ in range(3_000):
            sock.sendall(b"a" * 64_000)
    return "cut off"


def pipeline(served: Served) -> str:
    """Many requests in one go, no answer read."""
    with suppress(OSError), _connect(served) as sock:
        sock.settimeout(HOLD_S)
        sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 20_000)
        time.sleep(HOLD_S)
    return "not read"


def deaf(served: Served, path: str, fields: dict[str, Any]) -> str:
    """Asks for a long stream and reads none of it."""
    data = json.dumps({"max_tokens": 1_500, "ignore_eos": True, "stream": True, "logprobs": 5} | fields).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(data)}\r\n"
    head += f"Authorization: Bearer {served.key}\r\nContent-Type: application/json\r\n\r\n"
    with suppress(OSError), _connect(served) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.sendall(head.encode() + data)
        time.sleep(HOLD_S)
    return "not read"


def large_head(served: Served) -> str:
    """As many bytes of headers as anybody takes, again and again."""
    head = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n" + b"X-H: " + b"v" * 60_000 + b"\r\n\r\n"
    for _ in range(200):
        with suppress(OSError), _connect(served) as sock:
            sock.sendall(head)
            sock.recv(1)
    return "answered"


_BEHAVIOURS: dict[str, Behaviour] = {
    f"{FEW_IDLE} idle connections": partial(idle, number=FEW_IDLE),
    f"{MANY_IDLE} idle connections": partial(idle, number=MANY_IDLE),
    f"{HALF_HEADS} half heads": half_heads,
    f"{SILENT_GRPC} silent gRPC connections": partial(silent_grpc, first=b""),
    f"{SILENT_GRPC} gRPC connections with a preface": partial(silent_grpc, first=PREFACE),
    f"{SILENT_CHECKS} health checks without a message": silent_checks,
    f"{HELD_BODIES} bodies held back": held_bodies,
    "endless header lines": endless_head,
    "an endless first line": endless_line,
    "20,000 requests in a pipeline": pipeline,
    "a stream that nobody reads": partial(deaf, path="/v1/completions", fields={"prompt": "x"}),
    "heads of 60 KB": large_head,
}


def _all() -> list[Input]:
    found = []
    for face, builds in (("http", _BODIES), ("grpc", _MESSAGES)):
        for name, build in builds.items():
            found += [Input(f"{face} {name}", build), Input(f"{face} {name}, no key", build, has_key=False)]
    return found + [Input(name, partial(_given, one)) for name, one in _BEHAVIOURS.items()]


def _given(behaviour: Behaviour) -> Behaviour:
    return behaviour


KNOWN = _all()
