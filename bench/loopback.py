"""Loopback without us, from a process of its own: a bare gRPC stream, a TCP socket, a copy through shared memory."""

from __future__ import annotations

import asyncio
import multiprocessing
import socket
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

import grpc
import grpc.aio
import numpy as np

from twostroke.kv.handover.transports.grpc import CHANNEL_OPTIONS, SERVER_OPTIONS
from twostroke.kv.handover.transports.shared_memory import OwnRing, open_ring
from twostroke.protos import handover_pb2

METHOD = ("bench.Raw", "Stream")
SLOTS = 8


class Loopback:
    """A child process that sends messages of any size in three ways; use it as a context manager."""

    def __enter__(self) -> Loopback:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        self._rings: dict[int, tuple[OwnRing, np.ndarray[Any, Any]]] = {}
        self._tcp_port, self._grpc_port = self._pipe.recv()
        return self

    def __exit__(self, *_: object) -> None:
        for ring, _ in self._rings.values():
            ring.close()
        self._pipe.close()  # the child ends when its end of the pipe does
        self._process.join(10)

    def copy_s(self, message_bytes: int, count: int) -> float:
        """Seconds for the child to copy `count` messages into a ring, and for us to copy them out, side by side."""
        if message_bytes not in self._rings:
            ring = OwnRing(SLOTS, message_bytes)
            self._rings[message_bytes] = ring, np.ones((SLOTS, message_bytes), np.uint8)
            self.copy_s(message_bytes, SLOTS)  # maps all pages
        ring, target = self._rings[message_bytes]
        self._pipe.send((ring.offer().SerializeToString(), message_bytes, count))
        self._pipe.recv()
        self._pipe.send(None)
        began_s = time.perf_counter()
        for number in range(count):
            self._pipe.recv_bytes()
            place = number % SLOTS
            np.copyto(target[place], np.frombuffer(ring.slot(place), np.uint8, message_bytes))
            self._pipe.send_bytes(b"")
        return time.perf_counter() - began_s

    def tcp_s(self, message_bytes: int, count: int) -> float:
        """Seconds to receive `count` messages with `recv_into`."""
        buffer = memoryview(bytearray(message_bytes))
        with socket.create_connection(("127.0.0.1", self._tcp_port)) as connection:
            connection.sendall(message_bytes.to_bytes(8, "little") + count.to_bytes(8, "little"))
            began_s = time.perf_counter()
            for _ in range(count):
                _receive(connection, buffer)
            return time.perf_counter() - began_s

    async def grpc_s(self, message_bytes: int, count: int) -> float:
        """Seconds to read `count` messages of one stream on a channel that is open already."""
        async with grpc.aio.insecure_channel(f"127.0.0.1:{self._grpc_port}", options=CHANNEL_OPTIONS) as channel:
            await channel.channel_ready()
            began_s = time.perf_counter()
            call: Any = channel.unary_stream("/" + "/".join(METHOD))(b"%d %d" % (message_bytes, count))
            received = 0
            async for message in call:
                received += len(message)
            elapsed_s = time.perf_counter() - began_s
        assert received == message_bytes * count, f"{received} bytes of {message_bytes * count}"
        return elapsed_s


def _receive(connection: socket.socket, buffer: memoryview) -> None:
    filled = 0
    while filled < len(buffer):
        got = connection.recv_into(buffer[filled:])
        if not got:
            raise ConnectionError("the sender ended early")
        filled += got


def _serve(pipe: Connection) -> None:
    """The child: TCP in a thread, gRPC on the loop, until the parent closes the pipe."""
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=_serve_tcp, args=(listener,), daemon=True).start()
    try:
        import uvloop  # as the worker process does

        factory = uvloop.new_event_loop
    except ImportError:
        factory = asyncio.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(_serve_grpc(pipe, listener.getsockname()[1]))


def _serve_tcp(listener: socket.socket) -> None:
    while True:
        connection, _ = listener.accept()
        with connection:
            order = bytearray(16)
            _receive(connection, memoryview(order))
            message = bytes(int.from_bytes(order[:8], "little"))
            for _ in range(int.from_bytes(order[8:], "little")):
                connection.sendall(message)


async def _serve_grpc(pipe: Connection, tcp_port: int) -> None:
    async def stream(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        size_bytes, count = map(int, request.split())
        message = bytes(size_bytes)
        for _ in range(count):
            await context.write(message)

    handler: Any = grpc.unary_stream_rpc_method_handler(stream)  # type: ignore[arg-type]
    server = grpc.aio.server(options=SERVER_OPTIONS)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(METHOD[0], {METHOD[1]: handler}),))
    grpc_port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    pipe.send((tcp_port, grpc_port))
    await asyncio.to_thread(_wait_for_end, pipe)
    await server.stop(0)


def _wait_for_end(pipe: Connection) -> None:
    """Copy into the parent's rings until it closes the pipe."""
    sources: dict[int, np.ndarray[Any, Any]] = {}
    mapped: dict[bytes, Any] = {}
    while True:
        try:
            offer, message_bytes, count = pipe.recv()
        except EOFError:
            return
        if offer not in mapped:
            mapped[offer] = open_ring(handover_pb2.SharedMemory.FromString(offer))
        ring, source = mapped[offer], sources.setdefault(message_bytes, np.ones((SLOTS, message_bytes), np.uint8))
        pipe.send(None)
        pipe.recv()
        for number in range(count):
            if number >= SLOTS:
                pipe.recv_bytes()  # a slot is free
            place = number % SLOTS
            np.copyto(np.frombuffer(ring.slot(place), np.uint8, message_bytes), source[place])
            pipe.send_bytes(b"")
        for _ in range(min(count, SLOTS)):
            pipe.recv_bytes()
