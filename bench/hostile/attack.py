"""One hostile input, sent from a process of its own: built first, then sent on a word, several at once.

An input is a body, a gRPC message, or a way to behave on a connection. Knows no measurement.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection

import grpc
from neighbours import Served

ANSWER_S = 60.0
BUILD_S = 120.0


@dataclass(frozen=True)
class Body:
    """An HTTP request whose body is hostile."""

    path: str
    data: bytes
    headers: tuple[tuple[str, str], ...] = (("Content-Type", "application/json"),)


@dataclass(frozen=True)
class Message:
    """A gRPC request whose bytes are hostile."""

    method: str  # of twostroke.v1.Inference
    data: bytes


Behaviour = Callable[[Served], str]
"""Anything else: talks to the server by itself and says in a few words what it was answered."""

Built = Body | Message | Behaviour


@dataclass(frozen=True)
class Input:
    """A hostile input by name. `build` is called in the attacker's process."""

    name: str
    build: Callable[[], Built]
    has_key: bool = True


class Attack:
    """One input on its way: `Attack(…)` builds it, `send` sends it `times` at once and returns the answers."""

    def __init__(self, find: Callable[[str], Input], name: str, served: Served, times: int) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=_attack, args=(theirs, find, name, served, times), daemon=True)
        self._process.start()
        if not self._ours.poll(BUILD_S):
            raise RuntimeError(f"{name} was not built within {BUILD_S:g} s")
        self._ours.recv()

    def send(self) -> str:
        """How often which answer came."""
        self._ours.send("go")
        answers = self._ours.recv() if self._ours.poll(ANSWER_S + 10) else "no answer"
        self._process.kill()
        self._process.join()
        return str(answers)


def _attack(pipe: Connection, find: Callable[[str], Input], name: str, served: Served, times: int) -> None:
    # An attacker has a machine of its own: here it takes what time the others leave.
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    given = find(name)
    built = given.build()
    pipe.send("built")
    pipe.recv()
    answers: Counter[str] = Counter()
    threads = [threading.Thread(target=_once, args=(built, given.has_key, served, answers)) for _ in range(times)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(ANSWER_S)
    pipe.send(", ".join(f"{count} × {answer}" for answer, count in answers.items()) or "no answer")


def _once(built: Built, has_key: bool, served: Served, answers: Counter[str]) -> None:
    try:
        if isinstance(built, Body):
            answer = post(served, built, served.key if has_key else None)
        elif isinstance(built, Message):
            answer = call(served, built, served.key if has_key else None)
        else:
            answer = built(served)
    except OSError as error:
        answer = type(error).__name__
    answers[answer] += 1


def post(served: Served, body: Body, key: str | None) -> str:
    """Send it as a whole; the status line's number, or how the connection ended."""
    lines = [f"POST {body.path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {len(body.data)}", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in body.headers]
    lines += [] if key is None else [f"Authorization: Bearer {key}"]
    with socket.create_connection(("127.0.0.1", served.port), timeout=ANSWER_S) as sock:
        with suppress(BrokenPipeError, ConnectionResetError):  # refused by its head: the answer is there all the same
            sock.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + body.data)
        head = b""
        while b"\r\n" not in head and (piece := sock.recv(4096)):
            head += piece
        end_s = time.monotonic() + ANSWER_S
        with suppress(OSError):
            while time.monotonic() < end_s and sock.recv(1 << 16):
                pass  # to its end: what is asked for is computed
        return head.split(b" ")[1].decode() if head.startswith(b"HTTP/1.1 ") else "closed"


def call(served: Served, message: Message, key: str | None) -> str:
    """The status of the call."""
    metadata = () if key is None else (("authorization", f"Bearer {key}"),)
    options = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(f"127.0.0.1:{served.grpc_port}", options=options) as channel:
        method = f"/twostroke.v1.Inference/{message.method}"
        try:
            if message.method.endswith("Stream"):
                for _ in channel.unary_stream(method)(message.data, metadata=metadata, timeout=ANSWER_S):
                    pass
            else:
                channel.unary_unary(method)(message.data, metadata=metadata, timeout=ANSWER_S)
        except grpc.RpcError as error:
            return str(error.code().name)
        return "OK"
