"""Connections that behave badly; each by hand."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import grpc
from attack import ANSWER_S, Behaviour
from neighbours import Served

from twostroke.protos import common_pb2, inference_pb2

LARGEST = (4 << 20) - 4096  # a body, just within the limit
FEW_IDLE, MANY_IDLE, HELD_BODIES = 625, 1_500, 150
HALF_HEADS, SILENT_GRPC, SILENT_CHECKS, DEAF_STREAMS = 1_100, 400, 60, 20
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
HOLD_S = 4.0


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


def deaf_grpc(served: Served) -> str:
    """Asks for long streams over HTTP/2 whose windows have no room: nothing of them can ever be sent."""
    sampling = common_pb2.SamplingParams(max_tokens=1_500, ignore_eos=True)
    message = inference_pb2.GenerateRequest(text="x", sampling=sampling).SerializeToString()
    headers = (
        (":method", "POST"),
        (":scheme", "http"),
        (":path", "/twostroke.v1.Inference/GenerateStream"),
        (":authority", "127.0.0.1"),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
        ("authorization", f"Bearer {served.key}"),
    )
    fields = b"".join(b"\0" + _short_string(name) + _short_string(value) for name, value in headers)
    with suppress(OSError), socket.create_connection(("127.0.0.1", served.grpc_port), timeout=10) as sock:
        sock.sendall(PREFACE[:24] + _http2_frame(4, 0, 0, struct.pack(">HI", 4, 0)))  # SETTINGS_INITIAL_WINDOW_SIZE: 0
        for stream in range(1, 2 * DEAF_STREAMS, 2):
            sock.sendall(_http2_frame(1, 4, stream, fields))  # HEADERS, END_HEADERS
            sock.sendall(_http2_frame(0, 1, stream, struct.pack(">BI", 0, len(message)) + message))  # DATA, END_STREAM
        time.sleep(HOLD_S)
        return "not read"
    return "cut off"


def _http2_frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """RFC 9113, section 4.1."""
    return len(payload).to_bytes(3, "big") + struct.pack(">BBI", kind, flags, stream) + payload


def _short_string(text: str) -> bytes:
    """A string of at most 126 bytes in HPACK, without Huffman coding (RFC 7541, section 5.2)."""
    assert len(text) < 127
    return bytes([len(text)]) + text.encode()


def large_head(served: Served) -> str:
    """As many bytes of headers as anybody takes, again and again."""
    head = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n" + b"X-H: " + b"v" * 60_000 + b"\r\n\r\n"
    for _ in range(200):
        with suppress(OSError), _connect(served) as sock:
            sock.sendall(head)
            sock.recv(1)
    return "answered"


BEHAVIOURS: dict[str, Behaviour] = {
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
    f"{DEAF_STREAMS} gRPC streams with a window of zero": deaf_grpc,
    "heads of 60 KB": large_head,
}
