"""Streams of others while something hostile arrives: the gap between two pieces of one stream, as a client sees it.

Runs in a process of its own, so that it measures the server and not the attacker beside it. Knows no hostile input.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import grpc.aio

from twostroke.protos import common_pb2, inference_pb2

TOKENS = 500  # of one stream; then the next one begins: long ones make every step longer, and so every gap
RETRY_S = 0.2


@dataclass(frozen=True)
class Served:
    """Where the cluster answers, and a key that it takes."""

    port: int
    grpc_port: int
    key: str


@dataclass(frozen=True)
class Seen:
    """One window of time, over all streams."""

    gap_ms: float  # the longest between two pieces of one stream
    pieces: int
    broken: int  # streams that ended in an error or without their end
    running: int  # streams that had begun by the window's end
    errors: tuple[str, ...] = ()  # of those that broke, the first few


class Neighbours:
    """`window()` closes the window that began with the one before it."""

    def __init__(self, served: Served, num_http: int, num_grpc: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=_observe, args=(theirs, served, num_http, num_grpc), daemon=True)
        self._process.start()

    def window(self) -> Seen:
        """What was seen since the last call."""
        self._ours.send("window")
        seen: Seen = self._ours.recv()
        return seen

    def close(self) -> None:
        """End the streams."""
        self._process.kill()
        self._process.join()


class _Watch:
    def __init__(self, num_streams: int) -> None:
        self.last_s: list[float | None] = [None] * num_streams  # None: has not begun
        self.gap_s = 0.0
        self.pieces = self.broken = 0
        self.errors: list[str] = []

    def piece(self, stream: int) -> None:
        now_s = time.perf_counter()
        last_s, self.last_s[stream] = self.last_s[stream], now_s
        self.pieces += 1
        if last_s is not None:
            self.gap_s = max(self.gap_s, now_s - last_s)

    def end(self, stream: int, error: str = "") -> None:
        self.last_s[stream] = None
        if error:
            self.broken += 1
            self.errors.append(error[:200])

    def take(self) -> Seen:
        now_s = time.perf_counter()
        open_gaps = [now_s - last_s for last_s in self.last_s if last_s is not None]
        gap_s = max([self.gap_s, *open_gaps])  # also one that has not ended
        seen = Seen(gap_s * 1e3, self.pieces, self.broken, len(open_gaps), tuple(self.errors[:3]))
        self.gap_s, self.pieces, self.broken, self.errors = 0.0, 0, 0, []
        return seen


def _observe(pipe: Connection, served: Served, num_http: int, num_grpc: int) -> None:
    asyncio.run(_all(pipe, served, num_http, num_grpc))


async def _all(pipe: Connection, served: Served, num_http: int, num_grpc: int) -> None:
    watch = _Watch(num_http + num_grpc)
    asyncio.get_running_loop().add_reader(pipe.fileno(), lambda: (pipe.recv(), pipe.send(watch.take())))
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{served.grpc_port}", options=[("grpc.enable_http_proxy", 0)])
    streams = [_http_stream(watch, number, served) for number in range(num_http)]
    streams += [_grpc_stream(watch, number, channel, served.key) for number in range(num_http, num_http + num_grpc)]
    await asyncio.gather(*streams)


async def _http_stream(watch: _Watch, number: int, served: Served) -> None:
    body = {"prompt": f"Story {number}: once", "max_tokens": TOKENS, "stream": True, "ignore_eos": True}
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {served.key}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\nConnection: close\r\n\r\n"
    while True:
        error = ""
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
            writer.write(head.encode() + data)
            tail = b""
            while chunk := await reader.read(1 << 16):
                if b"data: {" in chunk:
                    watch.piece(number)
                tail = (tail + chunk)[-400:]
            writer.close()
            if b"data: [DONE]" not in tail:
                error = tail.decode(errors="replace") or "closed without an answer"
        except OSError as failure:
            error = repr(failure)
        watch.end(number, error)
        if error:
            await asyncio.sleep(RETRY_S)


async def _grpc_stream(watch: _Watch, number: int, channel: grpc.aio.Channel, key: str) -> None:
    call: Any = channel.unary_stream("/twostroke.v1.Inference/GenerateStream")
    sampling = common_pb2.SamplingParams(max_tokens=TOKENS, ignore_eos=True)
    message = inference_pb2.GenerateRequest(text=f"Story {number}: once", sampling=sampling).SerializeToString()
    while True:
        error = ""
        try:
            async for _ in call(message, metadata=(("authorization", f"Bearer {key}"),)):
                watch.piece(number)
        except grpc.aio.AioRpcError as failure:
            error = f"{failure.code().name}: {failure.details()}"
        watch.end(number, error)
        if error:
            with suppress(grpc.aio.AioRpcError):
                await asyncio.sleep(RETRY_S)
